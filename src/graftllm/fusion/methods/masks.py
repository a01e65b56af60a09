"""Methods that keep one merged delta and, for each task, which of its entries are the task's."""

import torch
from torch import Tensor

from graftllm.fusion.methods.tasks import Knobs, Merge, Tasks, flat

_VOTES = 2  # tasks that must count an entry as their own for the consensus to keep it


def emr(tasks: Tasks, knobs: Knobs) -> Merge:
    """One model a task: elect signs, keep the largest agreeing entry, mask it for the task, rescale.

    unified = gamma * max_t |delta_t| over entries with the sign gamma of the mean; the mask keeps entries where the
    task has that sign; rescaled by sum |delta_t| / sum |mask_t * unified| over the whole model, as the paper has it
    (the authors' code divides sums of per-parameter means).
    """
    own = torch.zeros(len(tasks.names), dtype=torch.float64)
    masked = own.clone()
    for stack in tasks.stacks():
        unified = _unified(stack)
        own += flat(stack).abs().sum(1, dtype=torch.float64)
        masked += flat((stack * unified > 0) * unified.abs()).sum(1, dtype=torch.float64)
    rescale = (knobs.scale * own / torch.where(masked == 0, 1, masked)).tolist()

    def merge(name: str, stack: Tensor, task: int) -> Tensor:
        unified = _unified(stack)
        return rescale[task] * unified * (stack[task] * unified > 0)

    return merge


def tall_mask(tasks: Tasks, knobs: Knobs) -> Merge:
    """One model a task: the sum of all deltas where |delta_t| > threshold * |sum - delta_t|, the base elsewhere."""

    def merge(name: str, stack: Tensor, task: int) -> Tensor:
        total = tasks.weighted(stack).sum(0)
        return knobs.scale * total * _own(tasks.weighted(stack), total, knobs.threshold)[task]

    return merge


def consensus(tasks: Tasks, knobs: Knobs) -> Merge:
    """The sum of all deltas where at least two tasks' TALL-masks have the entry, times scale; one model for all."""

    def merge(name: str, stack: Tensor, task: int) -> Tensor:
        total = tasks.weighted(stack).sum(0)
        votes = _own(tasks.weighted(stack), total, knobs.threshold).sum(0)
        return knobs.scale * total * (votes >= min(_VOTES, len(stack)))

    return merge


def _unified(stack: Tensor) -> Tensor:
    """Return the largest magnitude among entries that have the sign of the mean, with that sign; - where it is zero."""
    sign = torch.where(stack.sum(0) > 0, 1.0, -1.0)
    return sign * (stack * sign).amax(0).clamp(min=0)


def _own(stack: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Return each task's TALL-mask, shape (n, *shape)."""
    return stack.abs() > threshold * (total - stack).abs()
