"""How many tokens the rows of a training have, and what `max_length` leaves of them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from graftllm.errors import TrainingError
from graftllm.progress import say
from graftllm.records import Message
from graftllm.rendering import render

Row = dict[str, Any]  # `prompt`, and one or several answers to it, each as messages


def longest(tokenizer: PreTrainedTokenizerBase, data: Sequence[Row], max_length: int, label: str) -> int:
    """Return how many tokens the row with the most characters has, all of its answers together.

    Where it has more than `max_length` it is told, under the label, how many rows have.

    Raises:
        TrainingError: `max_length` leaves no answer a token to learn.
    """
    most = max(data, key=lambda row: sum(len(turn["content"]) for one in _conversations(row) for turn in one))
    lengths = _lengths(tokenizer, most)
    if max(lengths) > max_length:
        if all(len(render(tokenizer, row["prompt"], answer_next=True)) >= max_length for row in data):
            raise TrainingError(
                f"{label}: max_length {max_length} ends every row before its answer, so there is nothing to learn; "
                "raise it."
            )
        cut = sum(max(_lengths(tokenizer, row)) > max_length for row in data)
        say(
            f"{label}: {cut:,} of {len(data):,} rows have more than max_length {max_length} tokens; the ends of their "
            "answers are not learnt"
        )
    return sum(min(length, max_length) for length in lengths)


def _conversations(row: Row) -> list[list[Message]]:
    return [row["prompt"] + turn for key, turn in row.items() if key != "prompt"]


def _lengths(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    return [len(render(tokenizer, one, answer_next=False)) for one in _conversations(row)]
