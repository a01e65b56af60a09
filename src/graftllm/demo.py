"""A small heterogeneous zoo, trained from scratch on the spot: a target and three foreign sources.

The demo and the tests use it, so that neither needs a download. The target (Llama) knows general
word tasks; each source has another architecture, width and tokenizer and is good at one skill.
Words are upper-case and instructions lower-case, so that no tokenizer merges a word's letters.
"""

import random
import shutil
import string
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

from graftllm.records import Message, Prompt, write_rows
from graftllm.stages import Stages
from graftllm.storage import whole_directory
from graftllm.training.tuning import Training, train_sft
from graftllm.training_options import SftOptions

RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"


def draw_word(draw: random.Random) -> str:
    """Return three to six capital letters."""
    return "".join(draw.choices(string.ascii_uppercase, k=draw.randint(3, 6)))


@dataclass(frozen=True)
class WordTask:
    """A question about a random word, or whatever else `drawn` draws, and its answer."""

    name: str
    wording: str
    answer: Callable[[str], str]
    drawn: Callable[[random.Random], str] = draw_word


GENERAL = (
    WordTask("copy", "repeat the word: {word}", lambda word: word),
    WordTask("first", "first letter of: {word}", lambda word: word[0]),
    WordTask("last", "last letter of: {word}", lambda word: word[-1]),
    WordTask("length", "count the letters: {word}", lambda word: str(len(word))),
    WordTask("lower", "in small letters: {word}", str.lower),
)
REVERSE = WordTask("reverse", "write the word backward: {word}", lambda word: word[::-1])
SORT = WordTask("sort", "sort the letters: {word}", lambda word: "".join(sorted(word)))
NEXT = WordTask(
    "next", "next letter for each: {word}", lambda word: "".join(chr((ord(c) - 64) % 26 + 65) for c in word)
)


@dataclass(frozen=True)
class Member:
    """A model of the zoo: how it is built, what it learns, and how.

    Attributes:
        name: its directory in the zoo.
        config: vocabulary size, pad id and end id -> configuration.
        tokenizer: corpus and special tokens -> trained tokenizer.
        markers: special tokens: padding, start of the user's turn, of the assistant's turn, end of a turn.
        lessons: tasks, and how many words of each it learns from.
        training: SFT from random weights.
        corpus: tasks whose texts its tokenizer is made of.
    """

    name: str
    config: Callable[[int, int, int], PreTrainedConfig]
    tokenizer: Callable[[Iterable[str], Sequence[str]], Tokenizer]
    markers: tuple[str, str, str, str]
    lessons: tuple[tuple[WordTask, int], ...]
    training: SftOptions
    corpus: tuple[WordTask, ...] = (*GENERAL, REVERSE, SORT, NEXT)


@dataclass(frozen=True)
class Zoo:
    """Models, and how many prompts of which skills and of the general tasks are written beside them."""

    members: tuple[Member, ...]
    skills: tuple[tuple[WordTask, int], ...]
    general: tuple[tuple[WordTask, int], ...]
    test_prompts: int  # of each skill; of each general task a quarter


def build_zoo(directory: Path, stages: Stages, zoo: Zoo | None = None, *, seed: int = 0, device: str = "auto") -> None:
    """Train the zoo's models and write its prompt files; what is done already is skipped.

    Args:
        directory: gets one checkpoint directory a member, and `prompts/` with a file of prompts and
            one of test prompts for each skill and for the general tasks.
        stages: where finished steps are remembered.
        zoo: the demo's by default.
        seed: of weights, words and data order.
        device: `auto` takes a GPU when there is one.
    """
    zoo = zoo or DEMO
    for member in zoo.members:
        out = directory / member.name
        action = partial(_train_member, member, out, seed, device)
        stages.run(f"zoo.{member.name}", [member.training, seed], [out], action)
    prompts = directory / "prompts"
    stages.run("zoo.prompts", [seed], [prompts], partial(_write_prompts, zoo, prompts, seed))


def word_rows(task: WordTask, count: int, *, seed: int, answered: bool = False, test: bool = False) -> list[Prompt]:
    """Return `count` different prompts of a task; what is asked in test rows is asked in no others."""
    draw = random.Random(f"{task.name} {seed} {test}")
    rows: dict[str, Prompt] = {}
    while len(rows) < count:
        word = task.drawn(draw)
        if (zlib.crc32(word.encode()) % 10 == 0) != test:
            continue
        question = Message(role="user", content=task.wording.format(word=word))
        answer = (Message(role="assistant", content=task.answer(word)),) if answered else ()
        rows[word] = Prompt(f"{task.name}-{word}", (question, *answer), task.name, task.answer(word))
    return list(rows.values())


def _train_member(member: Member, out: Path, seed: int, device: str) -> None:
    corpus = [
        message["content"]
        for task in member.corpus
        for row in word_rows(task, 300, seed=seed, answered=True)
        for message in row.messages
    ]
    pad, user, assistant, end = member.markers
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=member.tokenizer(corpus, member.markers),
        pad_token=pad,
        eos_token=end,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}"
        f"{{{{ '{user}' if message.role == 'user' else '{assistant}' }}}}{{{{ message.content }}}}{end}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    )
    torch.manual_seed(seed)
    pad_id, end_id = (tokenizer.get_vocab()[marker] for marker in (pad, end))
    model = AutoModelForCausalLM.from_config(member.config(len(tokenizer), pad_id, end_id))
    start = out.with_name(f".{out.name}.start")
    transformers_logging.disable_progress_bar()
    with whole_directory(start) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    rows = [row for task, count in member.lessons for row in word_rows(task, count, seed=seed, answered=True)]
    train_sft(Training(start, out, seed, f"training {out.name}", device=device), rows, member.training)
    shutil.rmtree(start)


def _write_prompts(zoo: Zoo, directory: Path, seed: int) -> None:
    def test(task: WordTask, share: int = 1) -> list[Prompt]:
        return word_rows(task, zoo.test_prompts // share, seed=seed, test=True)

    with whole_directory(directory) as partial:
        for task, count in zoo.skills:
            write_rows(partial / f"{task.name}.jsonl", word_rows(task, count, seed=seed + 1))
            write_rows(partial / f"{task.name}.test.jsonl", test(task))
        general = [row for task, count in zoo.general for row in word_rows(task, count, seed=seed + 1)]
        write_rows(partial / "general.jsonl", general)
        write_rows(partial / "general.test.jsonl", [row for task, _ in zoo.general for row in test(task, 4)])


def byte_bpe(size: int) -> Callable[[Iterable[str], Sequence[str]], Tokenizer]:
    """Return what trains a byte-level BPE tokenizer of `size` tokens on a corpus."""

    def train(corpus: Iterable[str], special: Sequence[str]) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
        return tokenizer

    return train


def unigram(size: int) -> Callable[[Iterable[str], Sequence[str]], Tokenizer]:
    """Return what trains a unigram tokenizer of `size` tokens on a corpus."""

    def train(corpus: Iterable[str], special: Sequence[str]) -> Tokenizer:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=[*special, "<unk>"], unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
        return tokenizer

    return train


# initializer_range is three times the usual one: with 0.02 such small models learn nothing for hundreds of steps.
def _llama(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, max_position_embeddings=128,
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=True, initializer_range=0.06,
    )  # fmt: skip


def _qwen3(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    return Qwen3Config(
        vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, max_position_embeddings=128,
        hidden_size=96, intermediate_size=288, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=24, tie_word_embeddings=True, initializer_range=0.06,
    )  # fmt: skip


def _gemma2(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    return Gemma2Config(
        vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, max_position_embeddings=128,
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, query_pre_attn_scalar=32, sliding_window=64, initializer_range=0.06,
    )  # fmt: skip


def _mistral(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    return MistralConfig(
        vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, max_position_embeddings=128,
        hidden_size=160, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=40, sliding_window=None, tie_word_embeddings=True, initializer_range=0.06,
    )  # fmt: skip


_FROM_SCRATCH = SftOptions(epochs=3, batch_size=64, learning_rate=3e-3, max_length=64)
DEMO = Zoo(
    members=(
        Member(
            "target", _llama, byte_bpe(336), ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"),
            tuple(zip(GENERAL, (4800, 400, 800, 800, 3200), strict=True)), _FROM_SCRATCH,
        ),
        Member(
            "qwen3-reverse", _qwen3, unigram(121),
            ("<pad>", "<|im_start|>user ", "<|im_start|>assistant ", "<|im_end|>"), ((REVERSE, 6400),), _FROM_SCRATCH,
        ),
        Member(
            "gemma2-sort", _gemma2, byte_bpe(300),
            ("<pad>", "<start_of_turn>user ", "<start_of_turn>model ", "<end_of_turn>"), ((SORT, 9600),), _FROM_SCRATCH,
        ),
        Member(
            "mistral-next", _mistral, byte_bpe(346), ("<pad>", "[INST]", "[/INST]", "</s>"),
            ((NEXT, 6400),), _FROM_SCRATCH,
        ),
    ),
    skills=((REVERSE, 1600), (SORT, 4000), (NEXT, 1600)),  # sorting is the hardest to learn
    general=tuple((task, 240) for task in GENERAL),
    test_prompts=400,
)  # fmt: skip
