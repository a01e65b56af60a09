"""Conversations -> token ids, by a tokenizer's chat template; and rows of them -> one tensor."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.errors import RecordError, first_line
from graftllm.records import Message, Prompt

Answered = tuple[list[int], int]  # token ids, and the position where the answer begins
_OFFSET = 2  # positions that some models (OPT, BART) keep before the first


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


def render_answered(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Answered:
    """Return the token ids of a prompt with its answer, and the position where the answer begins.

    A prompt without an answer is rendered alone; the position is then its length. It is at least 1: nothing
    foretells the first token, though a question may be tokenized otherwise from there on.
    """
    question = render(tokenizer, prompt.question, answer_next=True)
    if prompt.answer is None:
        return question, len(question)
    answered = (*prompt.question, Message(role="assistant", content=prompt.answer))
    whole = render(tokenizer, answered, answer_next=False)
    differing = (i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b)
    start = next(differing, min(len(question), len(whole)))
    return whole, max(1, start)


def cut(rows: Sequence[Answered], *limits: int | None) -> list[Answered]:
    """Return rows of at most so many tokens; None is no limit.

    >>> cut([([7, 8, 9], 2), ([7], 1)], 5, 2, None)
    [([7, 8], 2), ([7], 1)]
    """
    most = _least(limits)
    return [(ids[:most], min(first, len(ids[:most]))) for ids, first in rows]


def parted(rows: Sequence[Answered], *limits: int | None) -> list[Answered]:
    """Return rows of at most so many tokens, as `cut` does, but a row without an answer in as many parts as it takes.

    >>> parted([([7, 8, 9], 2), ([7, 8, 9], 3)], 2)
    [([7, 8], 2), ([7, 8], 2), ([9], 1)]
    """
    most = _least(limits)
    found: list[Answered] = []
    for ids, first in rows:
        starts = [0] if most is None or first < len(ids) else range(0, len(ids), most)
        found += [(part, min(first, len(part))) for part in (ids[start:][:most] for start in starts)]
    return found


def _least(limits: Sequence[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def pad(
    sequences: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    side: Literal["left", "right"] = "right",
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids of one length and their attention mask, both of shape (rows, longest).

    On the right, causal models never see the padding, whatever their positions, so it is 0, which every vocabulary has;
    on the left, where answers can go on, it is the tokenizer's pad token. They are on `device`, by default the model's.

    Raises:
        RecordError: a row is longer than the positions that the model has learned, or has a token that the model does
            not know.
    """
    longest, most = max(len(sequence) for sequence in sequences), context_length(model)
    if most is not None and longest > most:
        check_length(longest, learned_positions(model), tokenizer)
    words, highest = input_embedding(model), max((max(sequence, default=0) for sequence in sequences), default=0)
    if isinstance(words, nn.Embedding) and highest >= words.num_embeddings:
        raise RecordError(
            f"{tokenizer.name_or_path}: its token {highest} has no row in the model's embedding of "
            f"{words.num_embeddings:,}; take the tokenizer that the model was trained with, or resize the embedding."
        )
    filler = padding_token(tokenizer, model) or 0 if side == "left" else 0
    ids = torch.full((len(sequences), longest), filler)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if side == "left" else 0
        ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    where = model.device if device is None else device
    return ids.to(where), mask.to(where)


def padding_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int | None:
    """Return what rows are filled up with: the tokenizer's pad token, or 0 where the model has no row for that."""
    token, words = cast(int | None, tokenizer.pad_token_id), input_embedding(model)
    beyond = token is not None and isinstance(words, nn.Embedding) and token >= words.num_embeddings
    return 0 if beyond else token


def input_embedding(model: PreTrainedModel) -> nn.Module | None:
    """Return the module that looks up the tokens; None where transformers knows of none."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # as models of text and something else have it
        return None


def learned_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has a vector for; None where it computes them."""
    most = context_length(model)
    words = input_embedding(model)
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    return most if most is not None and any(most <= size <= most + _OFFSET for size in tables) else None


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model was made to read at once; None where its config does not say."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if most is not None and most > 0 else None  # XLNet says -1


def ends_of(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of the model's generation config, else the tokenizer's."""
    ends: Any = None if model is None else cast(Any, model.generation_config).eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def check_length(tokens: int, positions: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse rows that a model has no positions for; `positions` is None for one that has for all.

    Raises:
        RecordError: there are fewer than `tokens`.
    """
    if positions is not None and tokens > positions:
        raise RecordError(
            f"{tokenizer.name_or_path}: expected rows of at most {positions} tokens, the positions that the model has "
            f"learned, found one of {tokens}; shorten it or leave it out."
        )
