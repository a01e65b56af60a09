"""Conversations -> token ids, by a tokenizer's chat template; and rows of them -> one tensor."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from graftllm.errors import RecordError, first_line
from graftllm.records import Message, Prompt


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_next: bool) -> list[int]:
    """Return the token ids of a conversation by the tokenizer's chat template.

    Without a template the contents stand one below the other. `answer_next` opens the assistant's turn.

    Raises:
        RecordError: the template refuses such a conversation, as some do a system message.
    """
    try:
        return rendered(tokenizer, messages, answer_next=answer_next)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages) or "nobody"
        raise RecordError(
            f"{tokenizer.name_or_path}: its chat template refuses a conversation of {roles} ({first_line(error)}). "
            "Leave such messages out, or give the model another chat template."
        ) from error


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_next: bool) -> list[int]:
    """Render as `render` does, but let the template's own error through."""
    if tokenizer.chat_template is not None:
        conversation = cast(Any, [dict(message) for message in messages])
        return cast(
            list[int],
            tokenizer.apply_chat_template(
                conversation, add_generation_prompt=answer_next, tokenize=True, return_dict=False
            ),
        )
    text = "\n".join(message["content"] for message in messages) + ("\n" if answer_next else "")
    return tokenizer(text)["input_ids"]


def render_answered(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[list[int], int]:
    """Return the token ids of a prompt with its answer, and the position where the answer begins.

    A prompt without an answer is rendered alone; the position is then its length.
    """
    question = render(tokenizer, prompt.question, answer_next=True)
    if prompt.answer is None:
        return question, len(question)
    answered = (*prompt.question, Message(role="assistant", content=prompt.answer))
    whole = render(tokenizer, answered, answer_next=False)
    start = next(
        (i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), min(len(question), len(whole))
    )
    return whole, start


def pad(
    sequences: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    side: Literal["left", "right"] = "right",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids of one length and their attention mask, both of shape (rows, longest).

    On the right, causal models never see the padding, whatever their positions, so it is 0, which every vocabulary has;
    on the left, where answers can go on, it is the tokenizer's pad token.
    """
    longest = max(len(sequence) for sequence in sequences)
    filler = cast(int | None, tokenizer.pad_token_id) or 0 if side == "left" else 0
    ids = torch.full((len(sequences), longest), filler)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if side == "left" else 0
        ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    return ids.to(device), mask.to(device)
