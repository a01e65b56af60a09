"""The strategy `auto`: per matrix the cheapest operator, one step for the whole model, a budget met.

Every matrix is looked at once (`allocation.outlook`). The step that is foreseen to fill the budget is then
used for real, and corrected by what came out until the budget is nearly full. Looks and codes are
pure functions of their inputs, kept by name when they are done: work that was stopped goes on from
there, and any number of workers gives the same bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftllm.compression.allocation import BITS_WORTH, Outlook, choices, encode_cheapest, step_for
from graftllm.compression.calibration import Calibration
from graftllm.compression.encoded import Operator, Unchanged
from graftllm.compression.exact import encode_exact
from graftllm.compression.matrix import BLOCK, Source, matrix_shape
from graftllm.compression.metric import Metric
from graftllm.compression.sensitivity import Sensitivity, input_metric
from graftllm.delta import difference

_DOUBLE = 2048  # columns up to which matrices are calculated with in float64
_FULL = 0.985  # a budget filled to this share is met
_EXACT_AT = 2.0  # bits an entry from which on a matrix may be cheaper bit for bit
_FEW_CHANGES = 0.25  # share of changed entries below which it may be, too


@dataclass(frozen=True)
class Measures:
    """What was measured on calibration rows; without it every matrix's errors count alike."""

    calibration: Calibration | None = None
    sensitivity: Sensitivity | None = None

    def metric(self, name: str, shape: tuple[int, ...]) -> Metric:
        """Return what errors in a parameter cost."""
        moments = self.calibration.moments.get(name) if self.calibration is not None else None
        if moments is not None and moments.shape[0] != matrix_shape(shape)[0 if self.transposed(name) else 1]:
            moments = None
        found = input_metric(moments) if self.sensitivity is None else self.sensitivity.metric(name, moments)
        if found.right is None or len(found.right) > _DOUBLE:
            return found
        return Metric(found.scale, None if found.rows is None else found.rows.double(), found.right.double())

    def transposed(self, name: str) -> bool:
        """Return whether a parameter's input side is dimension 0."""
        return self.calibration is not None and name in self.calibration.transposed


def source_of(base: Tensor, tuned: Tensor, *, transposed: bool, device: torch.device, where: str) -> Source:
    """Return the delta of one parameter as a matrix whose rows are read when they are needed."""
    shape = matrix_shape(tuple(base.shape))
    dtype = torch.float64 if shape[1] <= _DOUBLE and shape[0] * shape[1] <= 1 << 22 else torch.float32
    pair = base.reshape(shape), tuned.reshape(shape)
    if transposed:
        pair, shape = (pair[0].T, pair[1].T), (shape[1], shape[0])

    def read(start: int, stop: int) -> Tensor:
        return difference(pair[0][start:stop], pair[1][start:stop], where=where).to(device, dtype)

    return Source(shape, read, device)


def encode_matrix(
    base: Tensor, tuned: Tensor, source: Source, metric: Metric, known: Outlook, step: float
) -> tuple[Operator, np.ndarray, float]:
    """Return the operator, payload and relative error of one matrix that changed; `source` is tuned - base."""
    found = encode_cheapest(source, metric, known, step)
    cost, size = (known.energy, 0) if found is None else (found.cost, found.payload.nbytes)
    entries = source.shape[0] * source.shape[1]
    few = entries <= BLOCK and float((base != tuned).float().mean()) < _FEW_CHANGES
    if not known.servable and (few or 8 * size > _EXACT_AT * entries):
        exact, payload = encode_exact(base, tuned)
        worth = BITS_WORTH * step**2 * 8  # of a byte
        if worth * payload.nbytes <= cost + worth * size:
            return exact, payload, 0.0
    return (Unchanged(), np.empty(0, np.uint8), 1.0) if found is None else (found.operator, found.payload, found.error)


def next_step(outlooks: Mapping[str, Outlook], coded_bytes: int, room: int, step: float) -> float | None:
    """Return the step to try after one at which the matrices took `coded_bytes`; None when that filled the room.

    Args:
        outlooks: of all matrices that changed.
        coded_bytes: what their payloads took.
        room: bytes that they may take.
        step: at which they took them.
    """
    if _FULL * room <= coded_bytes <= room:
        return None
    foreseen = sum(choices(one, step)[0].bits for one in outlooks.values()) / 8
    aim = room * (1 + _FULL) / 2 * foreseen / max(1, coded_bytes)
    return step_for(outlooks.values(), 8 * aim)
