"""Methods that add deltas up as they are: averages, task arithmetic, regression."""

import torch
from torch import Tensor

from graftllm.compression.roles import role_of
from graftllm.errors import FusionError
from graftllm.fusion.methods.tasks import Knobs, Merge, Tasks, along

_OFF_DIAGONAL = 0.9  # what is left of second moments off the diagonal; RegMean's guard against few tokens
_RIDGE = 1e-6  # of the mean second moment; inputs that no token moved fall back to the average
_LEAST = 1e-30  # mean second moment, so that a layer whose inputs are all zeros has a ridge, too


def linear(tasks: Tasks, knobs: Knobs) -> Merge:
    """The weighted average: scale * sum_t w_t delta_t / sum_t w_t.

    Raises:
        FusionError: the weights sum to zero.
    """
    total = float(tasks.weights.sum())
    if abs(total) < 1e-8:
        raise FusionError(
            f"merge: expected weights (FILE:WEIGHT) whose sum is not 0, because an average divides by it; found "
            f"{total:g}. Change one, or take task-arithmetic, which adds up."
        )
    return lambda name, stack, task: tasks.weighted(stack).sum(0) * (knobs.scale / total)


def task_arithmetic(tasks: Tasks, knobs: Knobs) -> Merge:
    """The weighted sum: scale * sum_t w_t delta_t."""
    return lambda name, stack, task: tasks.weighted(stack).sum(0) * knobs.scale


def regmean(tasks: Tasks, knobs: Knobs) -> Merge:
    """The matrix whose outputs are nearest to each tuned model's on its own inputs; the average elsewhere.

    delta = (sum_t w_t delta_t G_t) (sum_t w_t G_t)^-1 with G_t the second moments of the layer's input in
    model t, off-diagonal entries times 0.9. The base cancels, so deltas do where the paper has weights.
    Embeddings are averaged, those tied to the head too: its moments say nothing of a look-up.

    Raises:
        FusionError: a weight is below zero, or all are zero.
    """
    average = linear(tasks, knobs)
    if float(tasks.weights.min()) < 0:
        raise FusionError(
            f"merge: regmean expects weights (FILE:WEIGHT) of at least 0, because no input is seen less than never; "
            f"found {float(tasks.weights.min()):g}. Change it, or take task-arithmetic, which subtracts."
        )

    def merge(name: str, stack: Tensor, task: int) -> Tensor:
        looked_up = role_of(name, tuple(stack.shape[1:])) == "embedding"
        if stack.ndim != 3 or looked_up or any(name not in seen.moments for seen in tasks.calibrations):
            return average(name, stack, task)
        transposed = name in tasks.calibrations[0].transposed
        matrices = (stack.mT if transposed else stack).double()  # (n, d_out, d_in)
        grams = torch.stack([_guarded(seen.moments[name].double()) for seen in tasks.calibrations])
        grams *= along(tasks.weights.double(), grams)
        merged = torch.linalg.solve(grams.sum(0), (matrices @ grams).sum(0), left=False)
        return knobs.scale * (merged.mT if transposed else merged).float()

    return merge


def _guarded(gram: Tensor) -> Tensor:
    """Return second moments with smaller off-diagonal entries and a ridge."""
    diagonal = gram.diagonal()
    ridge = _RIDGE * diagonal.mean().clamp(min=_LEAST)
    return _OFF_DIAGONAL * gram + torch.diag((1 - _OFF_DIAGONAL) * diagonal + ridge)
