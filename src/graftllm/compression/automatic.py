"""One matrix in the strategy `auto`: where its rows come from, and which ways of coding it are tried."""

import math
from typing import Literal

import torch
from torch import Tensor

from graftllm.compression.allocation import Kind, foreseen, likely
from graftllm.compression.matrix import BLOCK, DOUBLE, Source, matrix_shape
from graftllm.compression.outlook import Outlook
from graftllm.delta import Delta, difference
from graftllm.tensors import LARGE

Way = Kind | Literal["exact"]
_EXACT_AT = 2.0  # bits an entry from which on a matrix may be cheaper bit for bit
_FEW_CHANGES = 0.25  # share of changed entries below which it may be, too


def source_of(delta: Delta, name: str, *, transposed: bool, device: torch.device) -> Source:
    """Return the delta of one parameter as a matrix whose rows are read when they are needed."""
    full = delta.tuned.specs[name].shape
    shape = matrix_shape(full)
    dtype = torch.float64 if shape[1] <= DOUBLE and shape[0] * shape[1] <= 1 << 22 else torch.float32
    each = shape[0] // full[0]  # rows of the matrix in one of the tensor's

    def read(start: int, stop: int) -> Tensor:
        if shape[0] * shape[1] <= LARGE:
            base, tuned = (value.reshape(shape)[start:stop] for value in delta.pair(name))
        else:
            first = start // each
            some = delta.rows(name, first, -(-stop // each))
            base, tuned = (value.reshape(-1, shape[1])[start - first * each : stop - first * each] for value in some)
        return difference(base, tuned, where=delta.where(name)).to(device, dtype)

    def read_transposed(start: int, stop: int) -> Tensor:
        base, tuned = (value.reshape(shape).T[start:stop] for value in delta.pair(name))
        return difference(base, tuned, where=delta.where(name)).to(device, dtype)

    return Source((shape[1], shape[0]), read_transposed, device) if transposed else Source(shape, read, device)


def ways(known: Outlook, step: float) -> list[Way]:
    """Return how a matrix is to be coded at a step, to see what is cheapest: mostly one way, at times two or three."""
    found: list[Way] = list(likely(known, step))
    entries = math.prod(known.shape)
    few = entries <= BLOCK and known.altered < _FEW_CHANGES
    if not known.servable and (few or foreseen(known, step).bits > _EXACT_AT * entries):
        found.append("exact")
    return [way for way in found if way != "zero"]
