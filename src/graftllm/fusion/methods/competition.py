"""PCB-Merging (arXiv 2410.02396): entries compete within a model and between models, and the winners are averaged."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from graftllm.fusion.methods.quantiles import order_statistics
from graftllm.fusion.methods.tasks import Knobs, Merge, Tasks, along

_CLIPPED = 1e-4  # share of a model's smallest and largest magnitudes that are brought to the next ones
_TINY = 1e-12


def pcb(tasks: Tasks, knobs: Knobs) -> Merge:
    """Merge by W, the parameter competition: scale * sum_t W_t w_t delta_t / sum_t W_t, magnitudes clipped.

    The score of an entry is exp(n s^2) tanh(delta_t sum_t delta_t), s its magnitude between the model's smallest
    and largest; W is the score between the model's `density` quantile and its largest. All quantiles are those
    of whole models. This is the authors' code; their paper writes softmaxes. Scores are divided by exp(n), which W
    does not see, because exp(89) is no float32.
    """
    clip, _ = order_statistics(
        lambda: (stack.abs() for stack in tasks.stacks()),
        lambda total: [int(total * _CLIPPED), max(0, int(total * (1 - _CLIPPED) - 1))],
    )
    low, high = clip.unbind(1)

    def scores(stack: Tensor) -> Tensor:
        magnitudes = _between(stack.abs(), low, high)
        return torch.exp(len(stack) * (magnitudes.square() - 1)) * torch.tanh(stack * stack.sum(0))

    bounds, _ = order_statistics(
        _each(tasks, scores), lambda total: [min(total - 1, int(total * (1 - knobs.density))), total - 1]
    )
    weakest, strongest = bounds.unbind(1)

    def merge(name: str, stack: Tensor, task: int) -> Tensor:
        winners = _between(scores(stack), weakest, strongest)
        clipped = stack.sign() * torch.clamp(stack.abs(), along(low, stack), along(high, stack))
        return knobs.scale * (winners * tasks.weighted(clipped)).sum(0) / winners.sum(0).clamp(min=_TINY)

    return merge


def _each(tasks: Tasks, scores: Callable[[Tensor], Tensor]) -> Callable[[], Iterable[Tensor]]:
    return lambda: (scores(stack) for stack in tasks.stacks())


def _between(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return where values lie between each task's bounds: 0 at or below the lower one, 1 at or above the upper one."""
    below, above = along(low, values), along(high, values)
    width = above - below
    return ((torch.clamp(values, below, above) - below) / torch.where(width > 0, width, 1)).clamp(max=1)
