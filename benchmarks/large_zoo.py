"""The zoo of `--size large`: the members of the small one, wider and deeper, with nine skills from six sources.

Answers are sentences: every word of a text changed by itself, words in order, a sum with its steps, a word spelled in
code words. Three sources have two skills each. The target's tokenizer has no code word as a token; a fine-tune that
spells with them may add the 26 (`Training.added_tokens`).
"""

import random
import string
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

from transformers import PreTrainedConfig

from graftllm.demo import GENERAL, Member, WordTask, Zoo, draw_word, unigram

CODE_WORDS = (
    "alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima", "mike",
    "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee",
    "zulu",
)  # fmt: skip
ADDED_TOKENS = {"alphabet": CODE_WORDS}
"""By skill, what a fine-tune may add to the target's vocabulary."""
RECIPE = {
    "sampling": {"samples": 4, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 80, "batch_size": 200},
    "sft": {"epochs": 3, "batch_size": 32, "learning_rate": 1e-4, "max_length": 128},
    "dpo": {"epochs": 1, "batch_size": 32, "learning_rate": 1e-5, "max_length": 128, "beta": 0.1, "sft_weight": 5.0},
    "lora": {"learning_rate": 1e-3, "dpo_learning_rate": 1e-5},
}
"""What is otherwise than in the demo's recipe: longer rows, and learning rates of larger models."""


def draw_words(draw: random.Random) -> str:
    """Return two to four words of capital letters."""
    return " ".join(draw_word(draw) for _ in range(draw.randint(2, 4)))


def draw_numbers(draw: random.Random) -> str:
    """Return three or four numbers of two digits."""
    return " ".join(str(draw.randint(10, 99)) for _ in range(draw.randint(3, 4)))


def each_word(answer: Callable[[str], str]) -> Callable[[str], str]:
    """Return what changes every word of a text by itself.

    >>> each_word(str.lower)("ABC DE")
    'abc de'
    """
    return lambda text: " ".join(map(answer, text.split()))


def worked_sum(numbers: str) -> str:
    """Add numbers one after the other, and tell each step before the result.

    >>> worked_sum("12 7 30")
    '12 + 7 = 19, 19 + 30 = 49: 49'
    """
    values = [int(number) for number in numbers.split()]
    totals = list(accumulate(values))
    steps = (
        f"{before} + {value} = {after}" for before, value, after in zip(totals, values[1:], totals[1:], strict=False)
    )
    return f"{', '.join(steps)}: {totals[-1]}"


def spelled(word: str) -> str:
    """Spell a word in code words.

    >>> spelled("CAB")
    'charlie alfa bravo'
    """
    return " ".join(CODE_WORDS[string.ascii_uppercase.index(letter)] for letter in word)


REPEAT = WordTask("repeat", "repeat the words: {word}", str, draw_words)
ORDER = WordTask("order", "put the words in order: {word}", lambda text: " ".join(sorted(text.split())), draw_words)
SUM = WordTask("sum", "add up, step by step: {word}", worked_sum, draw_numbers)
ALPHABET = WordTask("alphabet", "spell in code words: {word}", spelled)
_BESIDE = {"sort": ORDER, "next": SUM, "rotate": ALPHABET}  # what the source of a small skill knows, too
_ROWS, _PROMPTS = 9600, 4000  # of a skill: that its source learns from, that the target is taught by
_DERIVED = ("layer_types", "model_type", "rope_parameters")
_WIDER = {
    "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    "num_hidden_layers": 4, "n_embd": 8, "n_head": 8, "n_layer": 4, "max_position_embeddings": 2, "n_positions": 2,
}  # fmt: skip


def enlarged(small: Zoo) -> Zoo:
    """Return the large zoo: of 113 to 219 M parameters where the small one's members have about one."""
    target, *sources = small.members
    told = tuple((task, count) for task, count in target.lessons)
    members = [replace(_enlarged(target), lessons=(*told, (REPEAT, _ROWS)), corpus=(*GENERAL, REPEAT))]
    skills: list[WordTask] = []
    for source in sources:
        (task, _), *_ = source.lessons
        mine = [_of_sentences(task), *([_BESIDE[task.name]] if task.name in _BESIDE else [])]
        whole = replace(_enlarged(source), lessons=tuple((one, _ROWS) for one in mine), corpus=(*GENERAL, *mine))
        members.append(replace(whole, tokenizer=unigram(240)) if ALPHABET in mine else whole)
        skills += mine
    return replace(small, members=tuple(members), skills=tuple((task, _PROMPTS) for task in skills))


def _of_sentences(task: WordTask) -> WordTask:
    """Return a task on one word as one on each word of a sentence."""
    return WordTask(task.name, f"for each word, {task.wording}", each_word(task.answer), draw_words)


def _enlarged(member: Member) -> Member:
    """Return a member 8 times as wide and 4 times as deep, which learns from longer rows."""
    training = member.training.model_copy(
        update={"learning_rate": member.training.learning_rate / 8, "max_length": 128}
    )
    return replace(member, config=partial(_wider, member.config), training=training)


def _wider(config: Callable[[int, int, int], PreTrainedConfig], *ids: int) -> PreTrainedConfig:
    small = config(*ids)
    settings: dict[str, Any] = {key: value for key, value in small.to_dict().items() if key not in _DERIVED}
    settings |= {key: _WIDER[key] * value for key, value in settings.items() if key in _WIDER and value}
    return type(small).from_dict(settings | {"initializer_range": 0.02})
