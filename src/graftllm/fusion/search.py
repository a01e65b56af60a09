"""LoraHub (arXiv 2307.13269): mixing weights by a derivative-free search on a few answered prompts."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.errors import FusionError
from graftllm.records import Prompt
from graftllm.rendering import pad, render_answered

EVALUATIONS = 40  # as published
_BOUND = 1.5  # of each weight, as published
_PENALTY = 0.05  # of the mean absolute weight, as in the authors' code; their paper writes the sum
_FIRST_STEP = 0.5
_BATCH = 64


def search_weights(loss: Callable[[Tensor], float], tasks: int, *, seed: int, evaluations: int = EVALUATIONS) -> Tensor:
    """Return the weights of least loss + 0.05 * mean |w| that a (1+1) evolution strategy finds.

    It starts at zeros, which are the base, and its step grows by half with each success and shrinks
    otherwise so that one success in five keeps it. (The paper uses nevergrad's; any such search does.)

    Args:
        loss: of mixing weights, shape (n,).
        tasks: n.
        seed: of the trials.
        evaluations: how often `loss` is called.

    Returns:
        Shape (n,), each between -1.5 and 1.5.
    """
    draw = torch.Generator().manual_seed(seed)

    def cost(weights: Tensor) -> float:
        return loss(weights) + _PENALTY * float(weights.abs().mean())

    best = torch.zeros(tasks)
    least, step = cost(best), _FIRST_STEP
    for _ in range(evaluations - 1):
        trial = (best + step * torch.randn(tasks, generator=draw)).clamp(-_BOUND, _BOUND)
        found = cost(trial)
        if found < least:
            best, least, step = trial, found, step * 1.5
        else:
            step *= 1.5**-0.25
    return best


@torch.inference_mode()
def answer_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Prompt]) -> float:
    """Return the mean negative log-likelihood of the rows' answers under a live model, in nats a token.

    A row without an assistant message is answered by its reference.

    Raises:
        FusionError: a row has neither.
    """
    if silent := next((row for row in rows if row.answer is None), None):
        raise FusionError(f"--rows: row {silent.id!r} has neither an assistant message nor a reference; add one.")
    total, count = 0.0, 0
    for start in range(0, len(rows), _BATCH):
        rendered = [render_answered(tokenizer, row) for row in rows[start : start + _BATCH]]
        ids, mask = pad([tokens for tokens, _ in rendered], tokenizer, model)
        log_p = cast(Any, model)(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
        found = log_p.gather(2, ids[:, 1:, None])[..., 0]  # (rows, longest - 1)
        answers = torch.zeros_like(found, dtype=torch.bool)
        for row, (tokens, first) in enumerate(rendered):
            answers[row, first - 1 : len(tokens) - 1] = True
        total -= float(found[answers].sum())
        count += int(answers.sum())
    return total / max(1, count)
