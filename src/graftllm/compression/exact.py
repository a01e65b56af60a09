"""The exact operator: the tuned values bit for bit, coded under their probability given the base's.

Training moved each value by about the same spread sigma. Where a base value is large against it, the
tuned value's place among all values of the dtype, in numeric order, is a few places from the base's;
how many depends on the exponent, so each exponent has its own table. Where a base value is within a
few sigma of zero the tuned value is coded on a grid of fixed width, then among the values in its cell.
"""

import math
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from graftllm.checkpoint import raw_bytes
from graftllm.compression.codes import LARGEST, CodeReader, CodeWriter
from graftllm.compression.entropy import decode_integers, encode_integers, fold, unfold

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 16}  # bits of a cell's place, at most
_NEAR = 2  # base values below 2 ** _NEAR sigma are near zero
_BLOCK = 1 << 22
_FAR = 40  # exponents this far above sigma's and more share a table


class Exact(BaseModel):
    """Tuned values bit for bit.

    Attributes:
        coding: `predicted` (blocks of 2 ** 22 values, each its length (u32) and a `codes` stream of the values by
            exponent of the base value, ascending; codes of cells are followed by the places in them),
            `difference` (of places in numeric order, entropy-coded), or `raw` (the tuned bytes).
        exponent: of sigma, a power of two; for `predicted`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    operator: Literal["exact"] = "exact"
    coding: Literal["predicted", "difference", "raw"]
    exponent: int = 0

    def restore(self, payload: np.ndarray, base: Tensor) -> Tensor:
        """Return the tuned values, in the dtype and shape of `base`.

        Raises:
            ValueError: the payload is not an encoding of that many values.
        """
        if self.coding == "raw":
            if payload.nbytes != base.nbytes:
                raise ValueError(f"expected {base.nbytes} raw bytes, found {payload.nbytes}")
            return torch.from_numpy(payload.copy()).view(base.dtype).reshape(base.shape)
        if self.coding == "predicted":
            return self._predicted(payload, base)
        difference = unfold(decode_integers(payload, base.numel(), np.dtype(f"u{base.element_size()}")))
        return _pattern(_ordered(base) + difference, base)

    def delta(self, payload: np.ndarray, base: Tensor) -> Tensor:
        """Return tuned - base in float32."""
        return self.restore(payload, base).float() - base.float()

    def _predicted(self, payload: np.ndarray, base: Tensor) -> Tensor:
        tuned, position = torch.empty(base.shape, dtype=base.dtype), 0
        for before, after in zip(base.reshape(-1).split(_BLOCK), tuned.view(-1).split(_BLOCK), strict=True):
            size = int.from_bytes(payload[position : position + 4].tobytes(), "little")
            after.copy_(_pattern(self._block(payload[position + 4 : position + 4 + size], before), before))
            position += 4 + size
        if position != len(payload):
            raise ValueError(f"expected {position} bytes of coded values, found {len(payload)}")
        return tuned

    def _block(self, payload: np.ndarray, base: Tensor) -> np.ndarray:
        if base.dtype not in _PRECISION or abs(self.exponent) > 200:
            raise ValueError(f"expected a floating-point dtype and a small exponent, found {base.dtype}")
        groups, places, cells = _groups(base, self.exponent), _ordered(base), _cell_of(base, self.exponent)
        if groups is None:
            raise ValueError("expected finite base values")
        tuned, reader = np.empty(len(places), np.int64), CodeReader(payload)
        for group in np.unique(groups):
            here = np.flatnonzero(groups == group)
            codes = reader.vector(len(here)).astype(np.int64)
            if group > _NEAR:
                tuned[here] = places[here].astype(np.int64) + codes
                continue
            first, count = _cell(codes + cells[here], self.exponent, base.dtype)
            if len(count) and count.min() < 1:
                raise ValueError("expected values in every cell, found none")
            tuned[here] = first + reader.below(count)
        reader.finish()
        return tuned.astype(places.dtype)


def encode_exact(base: Tensor, tuned: Tensor) -> tuple[Exact, np.ndarray]:
    """Return the operator and payload that give `tuned` back from `base` bit for bit (same shape and dtype)."""
    found: list[tuple[Exact, np.ndarray]] = [(Exact(coding="raw"), raw_bytes(tuned))]
    if (predicted := _predict(base, tuned)) is not None:
        found.append(predicted)
    elif tuned.element_size() <= 4:  # wider differences would not fit the coder
        found.append((Exact(coding="difference"), encode_integers(fold(_ordered(tuned) - _ordered(base)))))
    return min(found, key=lambda pair: pair[1].nbytes)


def _predict(base: Tensor, tuned: Tensor) -> tuple[Exact, np.ndarray] | None:
    """Return the `predicted` coding, or None where it cannot be: not finite, wide or not floating-point values."""
    if base.dtype not in _PRECISION or not base.numel():
        return None
    pairs = list(zip(base.reshape(-1).split(_BLOCK), tuned.reshape(-1).split(_BLOCK), strict=True))
    squares = sum(float((after.double() - before.double()).square().sum()) for before, after in pairs)
    if not math.isfinite(squares):
        return None
    spread = math.sqrt(squares / base.numel())
    exponent = int(np.clip(np.rint(np.log2(spread)), -140, 120)) if spread else -140
    parts = []
    for before, after in pairs:
        payload = _coded_block(before, after, exponent)
        if payload is None:
            return None
        parts += [np.array([len(payload)], "<u4").view(np.uint8), payload]
    return Exact(coding="predicted", exponent=exponent), np.concatenate(parts)


def _coded_block(base: Tensor, tuned: Tensor, exponent: int) -> np.ndarray | None:
    groups = _groups(base, exponent)
    if groups is None:
        return None
    places, wanted, writer = _ordered(base).astype(np.int64), _ordered(tuned).astype(np.int64), CodeWriter()
    cells, tuned_cells = _cell_of(base, exponent), _cell_of(tuned, exponent)
    for group in np.unique(groups):
        here = np.flatnonzero(groups == group)
        cell = tuned_cells[here]
        if group > _NEAR:
            codes = wanted[here] - places[here]
        else:
            first, count = _cell(cell, exponent, base.dtype)
            cell = cell - (wanted[here] < first) + (wanted[here] >= first + count)  # edges are in the cell above
            codes = cell - cells[here]
        if np.abs(codes).max(initial=0) >= LARGEST:
            return None
        writer.vector(codes.astype(np.int32))
        if group == _NEAR:
            first, count = _cell(cell, exponent, base.dtype)
            writer.below(wanted[here] - first, count)
    return writer.payload()


def _groups(base: Tensor, exponent: int) -> np.ndarray | None:
    """Return for each base value the octaves that it is above sigma, at least `_NEAR`; None if any is not finite."""
    values = base.double().reshape(-1).numpy()
    if not np.isfinite(values).all():
        return None
    octaves = np.where(values == 0, -(1 << 20), np.frexp(values)[1]) - exponent
    return np.clip(octaves, _NEAR, _FAR).astype(np.int8)


def _cell_of(values: Tensor, exponent: int) -> np.ndarray:
    """Return the number of the cell that each value is in; where that is too large to matter, any."""
    cells = np.rint(values.double().reshape(-1).numpy() / _width(exponent, values.dtype))
    return np.clip(np.nan_to_num(cells), -(1 << 40), 1 << 40).astype(np.int64)


def _width(exponent: int, dtype: torch.dtype) -> float:
    return 2.0 ** (exponent + 3 - _PRECISION[dtype])


def _cell(codes: np.ndarray, exponent: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of the first value in each cell and how many values it has; edges belong to the cell above."""
    first = _first_at_least((codes - 0.5) * _width(exponent, dtype), dtype)
    return first, _first_at_least((codes + 0.5) * _width(exponent, dtype), dtype) - first


def _first_at_least(bounds: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the place in numeric order of the least value of a dtype that is not below each bound."""
    bounds = np.clip(bounds, -torch.finfo(dtype).max, torch.finfo(dtype).max)
    exact = torch.from_numpy(bounds)
    near = exact.to(dtype)
    return _ordered(near).astype(np.int64) + (near.double() < exact).numpy()


def _ordered(tensor: Tensor) -> np.ndarray:
    """Return bit patterns as signed integers in the numeric order of the values; wraps, never overflows."""
    patterns = tensor.contiguous().reshape(-1).view(_SIGNED[tensor.element_size()]).numpy()
    if not tensor.is_floating_point():
        return patterns
    return np.where(patterns < 0, patterns ^ np.iinfo(patterns.dtype).max, patterns)


def _pattern(places: np.ndarray, like: Tensor) -> Tensor:
    """Return the values whose places in numeric order these are."""
    patterns = np.where(places < 0, places ^ np.iinfo(places.dtype).max, places) if like.is_floating_point() else places
    return torch.from_numpy(patterns).view(like.dtype).reshape(like.shape)
