"""The elementwise operator: every entry of a delta on a grid of its row and column, entropy-coded.

Best where the spectrum is flat. Rows that did not change cost a bit or two, so this is also the
operator of embeddings of which few rows moved.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from graftllm.compression.codes import CodeReader, CodeWriter
from graftllm.compression.columns import code_bits
from graftllm.compression.matrix import BLOCK, Levels, MatrixOperator
from graftllm.compression.metric import Metric, from_half_octaves, half_octaves, quantize

_SLOPES = (0, 2, 4)  # tables per half octave of a column's step


class Elementwise(MatrixOperator):
    """Whole multiples of step * sqrt(2) ** (row exponent + column exponent), in blocks of `height` rows.

    Each block: its length (u32), then a `codes` stream of the row exponents, the column exponents and the
    codes, whose tables shift by `-slope * column exponent`.
    """

    operator: Literal["elementwise"] = "elementwise"
    step: float = Field(gt=0, allow_inf_nan=False)
    slope: int = Field(ge=0, le=8)
    height: int = Field(ge=1)

    def blocks(self, payload: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the entries, float32, of each block of rows.

        Raises:
            ValueError: the payload is not an encoding of that shape.
        """
        for start, grid, codes in self._blocks(payload, shape):
            yield start, grid.values(torch.from_numpy(codes).float())

    def levels(self, payload: np.ndarray, shape: tuple[int, int]) -> list[Levels]:
        """Return the codes, block by block.

        Raises:
            ValueError: the payload is not an encoding of that shape.
        """
        return [grid.levels(codes) for _, grid, codes in self._blocks(payload, shape)]

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Return the blocks as one matrix."""
        return torch.cat(list(values))

    def recoded(
        self, payload: np.ndarray, shape: tuple[int, int], codes: Sequence[np.ndarray]
    ) -> tuple[Self, np.ndarray]:
        """Return the operator, which stays, and the payload with other codes.

        Raises:
            ValueError: the payload is not an encoding of that shape.
        """
        grids = [grid for _, grid, _ in self._blocks(payload, shape)]
        parts = [grid.payload(part, self.slope) for grid, part in zip(grids, codes, strict=True)]
        return self, np.concatenate(parts)

    def _blocks(self, payload: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple[int, "Grid", np.ndarray]]:
        """Yield the first row, the grid and the codes of each block."""
        rows, columns = shape
        if self.height > (most := max(1, BLOCK // max(1, columns))):
            raise ValueError(f"expected blocks of at most {most} rows, found {self.height}")
        position = 0
        for start in range(0, rows, self.height):
            some = min(self.height, rows - start)
            size = int.from_bytes(payload[position : position + 4].tobytes(), "little")
            reader = CodeReader(payload[position + 4 : position + 4 + size])
            row_exponents, column_exponents = reader.vector(some), reader.vector(columns)
            codes = reader.matrix(some, columns, _shifts(self.slope, column_exponents))
            reader.finish()
            yield start, Grid(self.step, row_exponents, column_exponents), codes
            position += 4 + size
        if position != len(payload):
            raise ValueError(f"expected {position} bytes of codes, found {len(payload)}")


@dataclass(frozen=True)
class Grid:
    """Where entries are rounded to: whole multiples of step * sqrt(2) ** (row exponent + column exponent)."""

    step: float
    row_exponents: np.ndarray
    column_exponents: np.ndarray

    def codes(self, values: Tensor, metric: Metric) -> Tensor:
        """Return the multiples that cost least, shape and dtype of `values`."""
        rows, columns = from_half_octaves(self.row_exponents) * self.step, from_half_octaves(self.column_exponents)
        return quantize(values, rows, columns, metric.lower)

    def levels(self, codes: np.ndarray) -> Levels:
        """Return codes, int32, with the steps of this grid."""
        return Levels(
            codes, from_half_octaves(self.row_exponents) * self.step, from_half_octaves(self.column_exponents)
        )

    def values(self, codes: Tensor) -> Tensor:
        """Return what the codes stand for."""
        rows = (from_half_octaves(self.row_exponents) * self.step).to(codes)
        return (codes * rows[:, None]).mul_(from_half_octaves(self.column_exponents).to(codes))

    def payload(self, codes: np.ndarray, slope: int) -> np.ndarray:
        """Return a block of the operator's payload."""
        writer = CodeWriter()
        writer.vector(self.row_exponents)
        writer.vector(self.column_exponents)
        writer.matrix(codes, _shifts(slope, self.column_exponents))
        payload = writer.payload()
        return np.concatenate([np.array([len(payload)], "<u4").view(np.uint8), payload])


def _shifts(slope: int, column_exponents: np.ndarray) -> np.ndarray:
    """Return how many tables up each column is, int64: a stranger's exponents are any of int32."""
    return -slope * column_exponents.astype(np.int64)


def grid_for(metric: Metric, step: float, shape: tuple[int, int]) -> Grid:
    """Return the grid on which an error costs step ** 2 / 12 in every row and column of a matrix."""
    rows, columns = np.zeros(shape[0], np.int32), np.zeros(shape[1], np.int32)
    if metric.rows is not None:
        rows = half_octaves(metric.rows.rsqrt())
    if metric.lower is not None:
        columns = half_octaves(1 / metric.lower.diagonal())
    return Grid(float(f"{step / metric.scale**0.5:.4g}"), rows, columns)


def encode_elementwise(
    read: Callable[[int, int], Tensor], shape: tuple[int, int], step: float, metric: Metric
) -> tuple[Elementwise, np.ndarray]:
    """Return the operator and payload of a matrix.

    Args:
        read: gives the rows from one number up to another.
        shape: (rows, columns).
        step: of the quantiser, in units of the square root of cost.
        metric: what errors cost; rows and columns that cost more get finer steps.
    """
    rows, columns = shape
    height = max(1, BLOCK // columns)
    grid = grid_for(metric, step, shape)
    slope, parts = -1, []
    for start in range(0, rows, height):
        part = Grid(grid.step, grid.row_exponents[start : start + height], grid.column_exponents)
        codes = part.codes(read(start, min(start + height, rows)), metric).to(torch.int32).cpu().numpy()
        if slope < 0:  # the first block tells: keeping all of a vocabulary's codes would take gigabytes
            slope = _best_slope(codes, grid.column_exponents)
        parts.append(part.payload(codes, slope))
    return Elementwise(step=grid.step, slope=slope, height=height), np.concatenate(parts)


def _best_slope(codes: np.ndarray, column_exponents: np.ndarray) -> int:
    """Return the slope whose tables take the fewest bits."""
    slopes = _SLOPES if column_exponents.any() else (0,)
    return min(slopes, key=lambda slope: code_bits(codes, _shifts(slope, column_exponents))) if len(slopes) > 1 else 0
