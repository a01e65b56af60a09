"""The exact operator: the tuned values bit for bit, coded under their probability given the base's.

Each value moved by about the spread of its row and column. Where a base value is large against it, the
tuned value's place among all values of the dtype, in numeric order, is a few places from the base's;
how many depends on the exponent, so each distance of base value and spread has its own table. Values nearer
to zero may move to other exponents, where places are nearer to each other or farther apart: they are coded on a grid
of fixed width, then among the values in their cell. A product of factors may be added to the base first: the nearer
the tuned values are, the fewer bytes (see `layered`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from graftllm.compression.codes import LARGEST, CodeReader, CodeWriter
from graftllm.compression.entropy import BLOCK, decoded_blocks, encode_integers, fold, unfold
from graftllm.compression.factored import Factored
from graftllm.compression.matrix import matrix_shape
from graftllm.compression.prediction import predicted
from graftllm.tensors import raw_bytes

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 16}  # bits of a cell's place, at most
_NEAR = 4  # half octaves, or one more: base values that are less above their spread share a table
_CELLS = 10  # half octaves above their spread up to which base values are coded in cells
_FAR = 80  # base values so many half octaves above their spread and more share a table
_FAINTEST = 40  # half octaves below the tensor's that a spread is told
_LEVELS = 400  # half octaves, either way, that are told apart
_BLOCK = 1 << 20  # values that are coded at a time; bounds the memory


class Exact(BaseModel):
    """Tuned values bit for bit.

    Attributes:
        coding: `predicted` (parts, each its length (u32) and a `codes` stream: first the spreads of rows and columns,
            then blocks of 2 ** 20 values, by how far the base value is above its spread, ascending; codes of
            cells are followed by the places in them), `difference` (of places in numeric order, entropy-coded),
            or `raw` (the tuned bytes).
        exponent: of the spread, a power of two; for `predicted`.
        product: what is added to the base first, if anything; its payload is the first `split` bytes.
        split: as said.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    operator: Literal["exact"] = "exact"
    coding: Literal["predicted", "difference", "raw"]
    exponent: int = 0
    product: Factored | None = None
    split: int = Field(default=0, ge=0)

    @model_serializer(mode="wrap")
    def _only_what_differs(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key not in ("product", "split") or value}

    def restore(self, payload: np.ndarray, base: Tensor) -> Tensor:
        """Return the tuned values, in the dtype and shape of `base`.

        Raises:
            ValueError: the payload is not an encoding of that many values.
        """
        if self.product is not None:
            base, payload = predicted(self.product, payload[: self.split], base), payload[self.split :]
        if not base.numel():
            if payload.nbytes:
                raise ValueError(f"expected no bytes for an empty tensor, found {payload.nbytes}")
            return base.clone()
        if self.coding == "raw":
            if payload.nbytes != base.nbytes:
                raise ValueError(f"expected {base.nbytes} raw bytes, found {payload.nbytes}")
            return torch.from_numpy(payload.copy()).view(base.dtype).reshape(base.shape)
        if self.coding == "predicted":
            return self._predicted(payload, base)
        tuned, before = torch.empty(base.shape, dtype=base.dtype), base.reshape(-1)
        for start, codes in decoded_blocks(payload, base.numel(), np.dtype(f"u{base.element_size()}")):
            block = before[start : start + len(codes)]
            tuned.view(-1)[start : start + len(codes)] = _pattern(_ordered(block) + unfold(codes), block)
        return tuned

    def delta(self, payload: np.ndarray, base: Tensor) -> Tensor:
        """Return tuned - base in float32."""
        return self.restore(payload, base).float() - base.float()

    def _predicted(self, payload: np.ndarray, base: Tensor) -> Tensor:
        if base.dtype not in _PRECISION or abs(self.exponent) > _LEVELS // 2:
            raise ValueError(f"expected a floating-point dtype and a small exponent, found {base.dtype}")
        parts, (rows, columns) = _parts(payload), matrix_shape(tuple(base.shape))
        reader = CodeReader(next(parts))
        spreads = Spreads(self.exponent, reader.vector(rows), reader.vector(columns))
        reader.finish()
        tuned = torch.empty(base.shape, dtype=base.dtype)
        blocks = zip(base.reshape(-1).split(_BLOCK), tuned.view(-1).split(_BLOCK), parts, strict=False)
        done = 0
        for before, after, part in blocks:
            after.copy_(_pattern(_read_block(part, before, spreads.levels(done, done + len(before))), before))
            done += len(before)
        if done != base.numel() or next(parts, None) is not None:
            raise ValueError(f"expected blocks of {base.numel()} values, found {done} of them or more blocks")
        return tuned


@dataclass(frozen=True)
class Spreads:
    """By how much the values of a matrix moved: 2 ** exponent, and half octaves more in each row and each column."""

    exponent: int
    rows: np.ndarray
    columns: np.ndarray

    def levels(self, start: int, stop: int) -> np.ndarray:
        """Return the half octaves of the spread of some elements in row-major order, int16."""
        row, column = np.divmod(np.arange(start, stop), len(self.columns))
        found = 2 * self.exponent + self.rows[row].astype(np.int64) + self.columns[column]
        return np.clip(found, -_LEVELS, _LEVELS).astype(np.int16)

    def payload(self) -> np.ndarray:
        """Return rows and columns as bytes."""
        writer = CodeWriter()
        writer.vector(self.rows)
        writer.vector(self.columns)
        return writer.payload()

    @property
    def mean_level(self) -> float:
        """The mean of the levels: half as many bits does each value take, if it is Gaussian, and what all do alike."""
        return 2 * self.exponent + float(self.rows.mean()) + float(self.columns.mean())


def encode_exact(base: Tensor, tuned: Tensor) -> tuple[Exact, np.ndarray]:
    """Return the operator and payload that give `tuned` back from `base` bit for bit (same shape and dtype)."""
    found: list[tuple[Exact, np.ndarray]] = [(Exact(coding="raw"), raw_bytes(tuned))]
    if (predicted := _predict(base, tuned)) is not None:
        found.append(predicted)
    least = min(payload.nbytes for _, payload in found)
    if (steps := _steps(base, tuned, least)) is not None:
        found.append((Exact(coding="difference"), steps))
    return min(found, key=lambda pair: pair[1].nbytes)


def _steps(base: Tensor, tuned: Tensor, most: int) -> np.ndarray | None:
    """Return the coding `difference`; None where it takes more than `most` bytes, or values are too wide for it."""
    if tuned.element_size() > 4:
        return None
    parts, room = [np.empty(0, np.uint8)], float(most)
    for before, after in zip(base.reshape(-1).split(BLOCK), tuned.reshape(-1).split(BLOCK), strict=True):
        steps = fold(_ordered(after) - _ordered(before))
        if _places_bytes(steps) > room:
            return None
        parts.append(encode_integers(steps))
        room -= parts[-1].nbytes
    return np.concatenate(parts)


def _places_bytes(steps: np.ndarray) -> float:
    """Return how many bytes it takes to tell which elements changed, if all are as likely to."""
    share = np.count_nonzero(steps) / max(1, steps.size)
    return -steps.size / 8 * sum(part * math.log2(part) for part in (share, 1 - share) if part)


def _predict(base: Tensor, tuned: Tensor) -> tuple[Exact, np.ndarray] | None:
    """Return the `predicted` coding, or None where it cannot be: not finite, wide or not floating-point values."""
    if base.dtype not in _PRECISION or not base.numel() or (spreads := _measured(base, tuned)) is None:
        return None
    parts, done = [spreads.payload()], 0
    for before, after in zip(base.reshape(-1).split(_BLOCK), tuned.reshape(-1).split(_BLOCK), strict=True):
        part = _coded_block(before, after, spreads.levels(done, done + len(before)))
        if part is None:
            return None
        parts.append(part)
        done += len(before)
    sized = [piece for part in parts for piece in (np.array([len(part)], "<u4").view(np.uint8), part)]
    return Exact(coding="predicted", exponent=spreads.exponent), np.concatenate(sized)


def _measured(base: Tensor, tuned: Tensor) -> Spreads | None:
    """Return the spreads of tuned - base; None where it is not finite. Rows and columns are told where that pays."""
    rows, columns = matrix_shape(tuple(base.shape))
    before, after = base.reshape(rows, columns), tuned.reshape(rows, columns)
    height = max(1, _BLOCK // columns)

    def squares() -> Iterator[Tensor]:
        for earlier, later in zip(before.split(height), after.split(height), strict=True):
            yield (later.double() - earlier.double()).square()

    of_rows = torch.cat([part.mean(dim=1) for part in squares()])
    whole = float(of_rows.mean())
    if not math.isfinite(whole) or not bool(torch.isfinite(base).all()):
        return None
    exponent = int(np.clip(np.rint(math.log2(whole) / 2), -140, 120)) if whole else -140
    flat = Spreads(exponent, np.zeros(rows, np.int32), np.zeros(columns, np.int32))
    if min(rows, columns) == 1 or not whole:
        return flat
    least = 2.0**-_FAINTEST
    of_rows = (of_rows / 4.0**exponent).clamp(min=least)
    parts = zip(squares(), of_rows.split(height), strict=True)
    of_columns = sum((part / (4.0**exponent * level[:, None])).sum(dim=0) for part, level in parts) / rows
    told = (_whole_log2(of_rows), _whole_log2(torch.as_tensor(of_columns).clamp(min=least)))
    spreads = Spreads(exponent, *told)
    saved_bits = rows * columns * (math.log2(whole) - spreads.mean_level) / 2
    return spreads if saved_bits > 8 * (len(spreads.payload()) - len(flat.payload())) else flat


def _whole_log2(values: Tensor) -> np.ndarray:
    return values.log2().round().to(torch.int32).numpy()


def _parts(payload: np.ndarray) -> Iterator[np.ndarray]:
    """Yield parts by their lengths, at least one."""
    position = 0
    while position < len(payload) or not position:
        size = int.from_bytes(payload[position : position + 4].tobytes(), "little")
        position += 4 + size
        if position > len(payload):
            raise ValueError(f"expected a part of {size} bytes, found {len(payload) - position + size}")
        yield payload[position - size : position]


def _coded_block(base: Tensor, tuned: Tensor, levels: np.ndarray) -> np.ndarray | None:
    places, wanted, writer = _ordered(base).astype(np.int64), _ordered(tuned).astype(np.int64), CodeWriter()
    for group, here in _groups(base, levels):
        if group > _CELLS:
            vectors = [wanted[here] - places[here]]
            inside = None
        else:
            grid = _Grid(group, levels[here], base.dtype)
            cell, start = grid.cells(tuned[here]), grid.cells(base[here])
            first, count = grid.extent(cell)
            cell = cell - (wanted[here] < first) + (wanted[here] >= first + count)  # edges are in the cell above
            middle = cell == 0
            vectors = [cell - start, _from_edges(wanted[here][middle], grid.edge[middle])]
            first, count = grid.extent(cell)
            inside = (wanted[here] - first)[~middle], count[~middle]
        for codes in vectors:
            if np.abs(codes).max(initial=0) >= LARGEST:
                return None
            writer.vector(codes.astype(np.int32))
        if inside is not None:
            writer.below(*inside)
    return writer.payload()


def _read_block(payload: np.ndarray, base: Tensor, levels: np.ndarray) -> np.ndarray:
    places = _ordered(base)
    tuned, reader = np.empty(len(places), np.int64), CodeReader(payload)
    for group, here in _groups(base, levels):
        codes = reader.vector(len(here)).astype(np.int64)
        if group > _CELLS:
            tuned[here] = places[here].astype(np.int64) + codes
            continue
        grid = _Grid(group, levels[here], base.dtype)
        cell = codes + grid.cells(base[here])
        middle = cell == 0
        tuned[here[middle]] = _from_edges(reader.vector(int(middle.sum())).astype(np.int64), grid.edge[middle])
        first, count = grid.extent(cell)
        if count.min(initial=1) < 1:
            raise ValueError("expected values in every cell, found none")
        tuned[here[~middle]] = first[~middle] + reader.below(count[~middle])
    reader.finish()
    return tuned.astype(places.dtype)


def _groups(base: Tensor, levels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield groups, ascending, and which elements are in them: those that share a table.

    A group is by how many half octaves base values are above their spread.

    Raises:
        ValueError: a base value is not finite.
    """
    values = base.double().numpy()
    if not np.isfinite(values).all():
        raise ValueError("expected finite base values")
    octaves = np.where(values == 0, -(1 << 12), np.frexp(values)[1])
    above = np.clip(2 * octaves - levels, _NEAR + (levels & 1), _FAR).astype(np.int8)
    order = np.argsort(above, kind="stable")
    for here in np.split(order, np.flatnonzero(np.diff(above[order])) + 1):
        yield int(above[here[0]]), here


class _Grid:
    """Cells of the values of a group: as wide as values near the base's are apart, with `_PRECISION` bits at most."""

    def __init__(self, group: int, levels: np.ndarray, dtype: torch.dtype) -> None:
        octaves = (group + levels.astype(np.int64)) // 2  # of the base value
        self.widths, self.dtype = np.ldexp(1.0, octaves + 1 - _PRECISION[dtype]), dtype

    @property
    def edge(self) -> np.ndarray:
        """The place of the first value above the middle cell."""
        return _first_at_least(0.5 * self.widths, self.dtype)

    def cells(self, values: Tensor) -> np.ndarray:
        """Return the number of the cell that each value is in; where that is too large to matter, any."""
        cells = np.rint(values.double().numpy() / self.widths)
        return np.clip(np.nan_to_num(cells), -(1 << 40), 1 << 40).astype(np.int64)

    def extent(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the place of the first value in each cell and how many values it has; edges are of the cell above."""
        first = _first_at_least((cells - 0.5) * self.widths, self.dtype)
        return first, _first_at_least((cells + 0.5) * self.widths, self.dtype) - first


def _from_edges(places: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """Return how far places in the middle cell are from its edges, negative ones from the lower; or the reverse.

    Values at even distances from each other are ever more places apart the nearer they are to zero.
    """
    return np.where(places < 0, -places - 2 - edge, edge - 1 - places)


def _first_at_least(bounds: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the place in numeric order of the least value of a dtype, infinity too, that is not below each bound."""
    exact = torch.from_numpy(np.maximum(bounds, -torch.finfo(dtype).max))
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
