"""The strategy `auto`: per matrix the cheapest operator, one step for the whole model, a budget met.

Every matrix is looked at (`outlook`). The step that is foreseen to fill the budget is then
used for real, and corrected by what came out until the budget is nearly full. Looks and codes are
pure functions of their inputs, kept by name when they are done: work that was stopped goes on from
there, and any number of workers gives the same bytes.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from graftllm.checkpoint import LARGE
from graftllm.compression.allocation import BITS_WORTH, choices, encode_cheapest, step_for
from graftllm.compression.encoded import Operator, Unchanged
from graftllm.compression.layered import encode_closest
from graftllm.compression.matrix import BLOCK, Source, matrix_shape
from graftllm.compression.metric import Metric
from graftllm.compression.outlook import Outlook
from graftllm.delta import Delta, difference

_DOUBLE = 2048  # columns up to which matrices are calculated with in float64
_FULL = 0.985  # a budget filled to this share is met
AIM = (1 + _FULL) / 2  # share of a budget that is aimed at
_EXACT_AT = 2.0  # bits an entry from which on a matrix may be cheaper bit for bit
_FEW_CHANGES = 0.25  # share of changed entries below which it may be, too


def source_of(delta: Delta, name: str, *, transposed: bool, device: torch.device) -> Source:
    """Return the delta of one parameter as a matrix whose rows are read when they are needed."""
    full = delta.tuned.specs[name].shape
    shape = matrix_shape(full)
    dtype = torch.float64 if shape[1] <= _DOUBLE and shape[0] * shape[1] <= 1 << 22 else torch.float32
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


def encode_matrix(
    pair: Callable[[], tuple[Tensor, Tensor]], source: Source, metric: Metric, known: Outlook, step: float
) -> tuple[Operator, np.ndarray, float]:
    """Return the operator, payload and relative error of one matrix that changed.

    Args:
        pair: gives its base and tuned values.
        source: tuned - base.
        metric: what errors cost.
        known: what the look at it found.
        step: of the quantisers, in units of the square root of cost.
    """
    found = encode_cheapest(source, metric, known, step)
    cost, size = (known.energy, 0) if found is None else (found.cost, found.payload.nbytes)
    entries = source.shape[0] * source.shape[1]
    few = entries <= BLOCK and _changed_share(*pair()) < _FEW_CHANGES
    if not known.servable and (few or 8 * size > _EXACT_AT * entries):
        exact, payload = encode_closest(*pair(), source.device)
        worth = BITS_WORTH * step**2 * 8  # of a byte
        if worth * payload.nbytes <= cost + worth * size:
            return exact, payload, 0.0
    return (Unchanged(), np.empty(0, np.uint8), 1.0) if found is None else (found.operator, found.payload, found.error)


def _changed_share(base: Tensor, tuned: Tensor) -> float:
    return float((base != tuned).float().mean())


def next_step(
    outlooks: Mapping[str, Outlook], coded: Mapping[str, int], room: int, steps: Mapping[str, float]
) -> float | None:
    """Return the step to try for the matrices that are not coded yet, or else for all; None when all filled the room.

    Args:
        outlooks: of all matrices that changed.
        coded: bytes that the payloads took of those that are coded.
        room: bytes that all may take.
        steps: at which they took them.
    """
    taken, aim = sum(coded.values()), room * AIM
    rest = [outlooks[name] for name in outlooks if name not in coded]
    if not rest and _FULL * room <= taken <= room:
        return None
    foreseen = sum(choices(outlooks[name], steps[name])[0].bits for name in coded) / 8
    left = aim - taken if rest else aim
    return step_for(rest or outlooks.values(), 8 * left * foreseen / max(1, taken))
