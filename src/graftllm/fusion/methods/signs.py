"""Methods that drop entries, or elect a sign for every entry and let only those who agree take part."""

from collections.abc import Callable

import torch
from torch import Tensor

from graftllm.fusion.methods.quantiles import order_statistics
from graftllm.fusion.methods.tasks import Knobs, Merge, Tasks, along, drawn, flat

_DELLA_SPREAD = 0.15  # a row's largest and smallest entries are kept with density +- this probability
_OUTLIERS = 0.01  # share of the largest entries that breadcrumbs drop


def ties(tasks: Tasks, knobs: Knobs) -> Merge:
    """Trim, elect, average: the largest `density` of each whole model, signs by their sum, the mean of who agrees.

    An entry whose sum is zero takes the sign that most entries have, as in the authors' code.
    """
    kept = _thresholds(tasks, knobs.density)
    votes = sum(_trimmed(tasks.weighted(stack), stack, kept).sum(0).sign().sum() for stack in tasks.stacks())
    majority = -1.0 if votes < 0 else 1.0
    return lambda name, stack, task: (
        knobs.scale * _mean_of_agreeing(tasks, _trimmed(tasks.weighted(stack), stack, kept), majority)
    )


def ties_tensor(tasks: Tasks, knobs: Knobs) -> Merge:
    """TIES with the trimming of each parameter alone, and + where a sum is zero, as mergekit does."""

    def merge(name: str, stack: Tensor, task: int) -> Tensor:
        kept = _ranked(stack, lambda total: total - max(1, int(knobs.density * total)))
        return knobs.scale * _mean_of_agreeing(tasks, _trimmed(tasks.weighted(stack), stack, kept))

    return merge


def dare(tasks: Tasks, knobs: Knobs) -> Merge:
    """Drop entries at random, divide the others by the density, add up."""
    return lambda name, stack, task: knobs.scale * _dropped(tasks, knobs, name, stack, knobs.density).sum(0)


def dare_ties(tasks: Tasks, knobs: Knobs) -> Merge:
    """Drop entries at random, divide the others by the density, then elect and average as TIES does."""
    return lambda name, stack, task: (
        knobs.scale * _mean_of_agreeing(tasks, _dropped(tasks, knobs, name, stack, knobs.density))
    )


def della(tasks: Tasks, knobs: Knobs) -> Merge:
    """As DARE-TIES, but the larger an entry is in its row, the more probably it is kept."""
    spread = min(_DELLA_SPREAD, knobs.density / 2, 1 - knobs.density)

    def merge(name: str, stack: Tensor, task: int) -> Tensor:
        rows = stack.reshape(*stack.shape[:2], -1) if stack.ndim > 2 else stack[:, None]  # (n, rows, columns)
        ranks = rows.abs().argsort(-1).argsort(-1) / max(1, rows.shape[-1] - 1)  # 0 smallest, 1 largest
        probability = (knobs.density + (2 * ranks - 1) * spread).reshape(stack.shape)
        return knobs.scale * _mean_of_agreeing(tasks, _dropped(tasks, knobs, name, stack, probability))

    return merge


def breadcrumbs(tasks: Tasks, knobs: Knobs) -> Merge:
    """Drop each parameter's largest 1 % of entries, and its smallest ones until `density` of them are left; add up."""

    def merge(name: str, stack: Tensor, task: int) -> Tensor:
        def bounds(total: int) -> tuple[int, int]:
            kept = max(1, int(knobs.density * total))
            lowest = max(0, total - kept - int(_OUTLIERS * total))
            return lowest, lowest + kept - 1

        low, high = (_ranked(stack, lambda total, end=end: bounds(total)[end]) for end in (0, 1))
        return knobs.scale * (_trimmed(tasks.weighted(stack), stack, low) * (stack.abs() <= along(high, stack))).sum(0)

    return merge


def sce(tasks: Tasks, knobs: Knobs) -> Merge:
    """Select the entries that vary most between models, weigh models by what is left of them, erase the minority.

    As mergekit does it: only selected entries change, models weigh the same where their mean squares sum
    to less than 1e-6, and a weight below 1e-6 is divided by that.
    """

    def merge(name: str, stack: Tensor, task: int) -> Tensor:
        selected = stack * _most_varying(stack, knobs.density)
        squares = flat(selected).square().mean(1)
        shares = squares / squares.sum() if squares.sum() >= 1e-6 else torch.full_like(squares, 1 / len(squares))
        return knobs.scale * _erased(selected, shares, floor=1e-6)

    return merge


def sce_fuseai(tasks: Tasks, knobs: Knobs) -> Merge:
    """SCE as its authors do it: the selection only weighs the models, and all entries are merged."""

    def merge(name: str, stack: Tensor, task: int) -> Tensor:
        squares = flat(stack * _most_varying(stack, knobs.density)).double().square().mean(1)
        shares = squares / squares.sum() if squares.sum() > 0 else torch.full_like(squares, 1 / len(squares))
        return knobs.scale * _erased(stack, shares.float(), floor=0)

    return merge


def _thresholds(tasks: Tasks, density: float) -> Tensor:
    """Return for each task the smallest magnitude among the largest `density` of all its entries, shape (n,)."""

    def smallest_kept(total: int) -> list[int]:
        return [total - max(1, int(density * total))]

    found, _ = order_statistics(lambda: (stack.abs() for stack in tasks.stacks()), smallest_kept)
    return found[:, 0]


def _ranked(stack: Tensor, position: Callable[[int], int]) -> Tensor:
    """Return for each task one parameter's k-th smallest magnitude, from 0; shape (n,)."""
    magnitudes = flat(stack).abs()
    return magnitudes.kthvalue(position(magnitudes.shape[1]) + 1, dim=1).values


def _trimmed(values: Tensor, stack: Tensor, smallest: Tensor) -> Tensor:
    """Return `values` where the deltas are at least as large as each task's smallest kept one, else zeros."""
    return values * (stack.abs() >= along(smallest, stack))


def _mean_of_agreeing(tasks: Tasks, weighted: Tensor, majority: float = 1.0) -> Tensor:
    """Return sum / sum of |weights| over the tasks whose entry has the sign of the sum; `weighted` is times weights.

    So a negative weight turns a task around, and its size says how much the task counts.
    """
    total = weighted.sum(0)
    elected = torch.where(total == 0, majority, total.sign())
    agreeing = weighted.sign() == elected
    shares = (agreeing * along(tasks.weights.abs(), weighted)).sum(0)
    return (weighted * agreeing).sum(0) / torch.where(shares == 0, 1, shares)


def _dropped(tasks: Tasks, knobs: Knobs, name: str, stack: Tensor, probability: float | Tensor) -> Tensor:
    """Return weighted deltas of which each entry is kept with a probability, and divided by it."""
    draws = torch.stack([drawn(tuple(stack.shape[1:]), knobs.seed, task, name) for task in tasks.names])
    return tasks.weighted(stack) * (draws < probability) / probability


def _most_varying(stack: Tensor, density: float) -> Tensor:
    """Return which entries are among the `density` (of those that vary at all) with the largest variance."""
    if density >= 1:
        return torch.ones(stack.shape[1:], dtype=torch.bool)
    variance = stack.var(0, unbiased=False)
    count = int(density * int(variance.count_nonzero()))
    mask = torch.zeros(variance.numel(), dtype=torch.bool)
    mask[variance.flatten().topk(count).indices] = True
    return mask.reshape(variance.shape)


def _erased(stack: Tensor, shares: Tensor, floor: float) -> Tensor:
    """Return the mean, weighted by `shares`, of the entries that have the sign of their sum; + where that is zero."""
    agreeing = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    weights = agreeing * along(shares, stack)
    total = weights.sum(0)
    return (stack * weights).sum(0) / torch.where(total == 0, 1, total.clamp(min=floor))
