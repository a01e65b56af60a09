"""How many prompts a recipe has, and how long they are: counted where they lie here, else assumed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from graftllm.records import Prompt
from graftllm.rendering import render
from graftllm.sampling.prompts import load_prompts, without_duplicates
from graftllm.transfer_options import PromptSet

_MEASURED = 500  # prompts whose length is taken for that of all
_CHARACTERS = 4  # in a token, where the target's tokenizer is not here


@dataclass(frozen=True)
class Assumed:
    """What is taken for what cannot be counted.

    Attributes:
        prompts: of each set that is not here and has no limit.
        tests: of each set of test prompts of that kind.
        prompt_tokens: of a prompt that is not here.
        answer_tokens: of an answer; half of the most that is allowed if None.
    """

    prompts: int = 10_000
    tests: int = 1_000
    prompt_tokens: int = 200
    answer_tokens: int | None = None

    def answer(self, most: int) -> float:
        """Return the tokens of an answer of which at most so many are allowed."""
        return most / 2 if self.answer_tokens is None else min(self.answer_tokens, most)


@dataclass(frozen=True)
class Prompts:
    """How many prompts there are, the tokens of one, and a sentence about what was not counted."""

    count: int
    tokens: float
    notes: tuple[str, ...] = ()


def count_prompts(
    sets: Sequence[PromptSet], assumed: Assumed, tokenizer: PreTrainedTokenizerBase | None, *, tests: bool = False
) -> Prompts:
    """Count the prompts of sets; those that lie on this machine are read, each once.

    Args:
        sets: files and data sets.
        assumed: for sets that are not here.
        tokenizer: of the target; without it a token has four characters.
        tests: whether they are test prompts.

    Raises:
        RecordError: a file that is here is no set of prompts.
    """
    here: list[PromptSet] = []
    elsewhere, notes = 0, []
    for one in sets:
        for origin in one.files or (one.dataset or "",):
            if Path(origin).exists():
                here.append(one.model_copy(update={"files": (origin,)} if one.files else {}))
                continue
            name = Path(origin).name if one.files else origin
            count, why = (
                (one.limit, "its limit") if one.limit else (assumed.tests if tests else assumed.prompts, "assumed")
            )
            notes.append(f"{name}: not here, {count:,} prompts ({why})")
            elsewhere += count
    found = without_duplicates(load_prompts(here)) if here else []
    tokens = len(found) * _mean_tokens(found, tokenizer) + elsewhere * assumed.prompt_tokens
    return Prompts(len(found) + elsewhere, tokens / max(1, len(found) + elsewhere), tuple(notes))


def _mean_tokens(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase | None) -> float:
    some = prompts[:: max(1, len(prompts) // _MEASURED)]
    if tokenizer is not None:
        lengths = [len(render(tokenizer, prompt.question, answer_next=True)) for prompt in some]
    else:
        lengths = [sum(len(turn["content"]) for turn in prompt.question) // _CHARACTERS for prompt in some]
    return sum(lengths) / max(1, len(some))
