"""Exact order statistics of more numbers than fit in memory, in two looks at them.

The bit pattern of a float32, its sign folded in, is an integer of the same order. A first look
counts the upper 16 bits, a second one the lower 16 of those that share the upper 16 looked for.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_BINS = 1 << 16
_BLOCK = 1 << 24  # numbers that are turned into integers at a time


def order_statistics(
    look: Callable[[], Iterable[Tensor]], positions: Callable[[int], Sequence[int]]
) -> tuple[Tensor, int]:
    """Return the k-th smallest of each row's numbers, for several k.

    Args:
        look: yields tensors of shape (n, ...), float32; a row's numbers are in all of them. It is called twice.
        positions: given how many numbers a row has, the wanted k, from 0.

    Returns:
        Shape (n, number of positions), float32; and how many numbers a row has.
    """
    upper = _counts(look, _upper_counts)  # (n, bins)
    total = int(upper[0].sum())
    wanted = torch.tensor([positions(total)]).repeat(len(upper), 1)  # (n, positions)
    below = upper.cumsum(1)
    bins = torch.searchsorted(below, wanted, right=True)  # the first bin with more than k numbers up to it
    rest = wanted - (below - upper).gather(1, bins)
    lower = _counts(look, lambda keys: _lower_counts(keys, bins))  # (n * positions, bins)
    found = torch.searchsorted(lower.cumsum(1), rest.reshape(-1, 1), right=True).reshape(rest.shape)
    keys = bins * _BINS + found - (1 << 31)
    return _floats(keys), total


def _counts(look: Callable[[], Iterable[Tensor]], count: Callable[[Tensor], Tensor]) -> Tensor:
    parts = (part for stack in look() for part in stack.reshape(len(stack), -1).split(_BLOCK, dim=1))
    totals = None
    for part in parts:
        found = count(_ordered(part))
        totals = found if totals is None else totals + found
    if totals is None:
        raise ValueError("expected at least one tensor, found none")
    return totals


def _ordered(values: Tensor) -> Tensor:
    """Return integers from 0 to 2 ** 32 - 1 in the order of the numbers."""
    bits = values.float().contiguous().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + (1 << 31)


def _floats(keys: Tensor) -> Tensor:
    """Return the numbers whose keys these are, counted from -2 ** 31."""
    bits = keys.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _upper_counts(keys: Tensor) -> Tensor:
    return torch.stack([torch.bincount(row >> 16, minlength=_BINS) for row in keys])


def _lower_counts(keys: Tensor, bins: Tensor) -> Tensor:
    rows = []
    for row, wanted in zip(keys, bins, strict=True):
        for one in wanted:
            rows.append(torch.bincount(row[row >> 16 == one] & 0xFFFF, minlength=_BINS))
    return torch.stack(rows)
