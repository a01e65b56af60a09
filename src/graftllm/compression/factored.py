"""The factored operators: a delta as a product of two entropy-coded factors, with or without a rest.

Delta ~ A B. B holds the leading right singular directions of the delta as the metric sees it, A is
solved again by least squares against the stored B, and both are rounded with the same step in
units of cost, which is reverse water-filling: strong directions get many bits, weak ones few or none.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from graftllm.compression.codes import CodeReader, CodeWriter
from graftllm.compression.elementwise import Elementwise, encode_elementwise
from graftllm.compression.lowrank import truncated_svd
from graftllm.compression.matrix import CACHED, Levels, MatrixOperator
from graftllm.compression.metric import Metric, damped_cholesky, from_half_octaves, half_octaves, quantize


class Factored(MatrixOperator):
    """Two factors, A of shape (rows, rank) and B of shape (rank, columns), in one `codes` stream.

    The column exponents and the codes of B, then the row exponents, the exponents of the directions
    and the codes of A transposed. B = step * codes * sqrt(2) ** column exponent and
    A = codes * sqrt(2) ** (row exponent + direction exponent).
    """

    operator: Literal["factored"] = "factored"
    rank: int = Field(ge=1)
    step: float = Field(gt=0, allow_inf_nan=False)

    def blocks(self, payload: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the entries, float32, of each block of rows.

        Raises:
            ValueError: the payload is not an encoding of that shape.
        """
        left, right = self.factors(payload, shape)
        height = max(1, CACHED // shape[1])
        for start in range(0, shape[0], height):
            yield start, left[start : start + height] @ right

    def factors(self, payload: np.ndarray, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return A, shape (rows, rank), and B, shape (rank, columns), in float32.

        Raises:
            ValueError: as for `blocks`.
        """
        right, left = self.levels(payload, shape)
        return left.values().T, right.values()

    def levels(self, payload: np.ndarray, shape: tuple[int, int]) -> list[Levels]:
        """Return the codes of B, shape (rank, columns), and those of A transposed, shape (rank, rows).

        Raises:
            ValueError: as for `blocks`.
        """
        (column_exponents, right), (row_exponents, direction_exponents, left) = self._read(payload, shape)
        column_steps, row_steps = from_half_octaves(column_exponents) * self.step, from_half_octaves(row_exponents)
        return [
            Levels(right, torch.ones(self.rank), column_steps),
            Levels(left, from_half_octaves(direction_exponents), row_steps),
        ]

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Return A B from B and A transposed."""
        right, left = values
        return left.T @ right

    def recoded(
        self, payload: np.ndarray, shape: tuple[int, int], codes: Sequence[np.ndarray]
    ) -> tuple[Self, np.ndarray]:
        """Return the operator, which stays, and the payload with other codes.

        Raises:
            ValueError: as for `blocks`.
        """
        (column_exponents, _), (row_exponents, direction_exponents, _) = self._read(payload, shape)
        right, left = codes
        return self, _payload((column_exponents, right), (row_exponents, direction_exponents, left))

    def _read(self, payload: np.ndarray, shape: tuple[int, int]) -> tuple["_Right", "_Left"]:
        rows, columns = shape
        if self.rank > min(shape):
            raise ValueError(f"expected a rank of at most {min(shape)}, found {self.rank}")
        reader = CodeReader(payload)
        right = reader.vector(columns), reader.matrix(self.rank, columns)
        left = reader.vector(rows), reader.vector(self.rank), reader.matrix(self.rank, rows)
        reader.finish()
        return right, left


_Right = tuple[np.ndarray, np.ndarray]  # column exponents, codes of B
_Left = tuple[np.ndarray, np.ndarray, np.ndarray]  # row exponents, direction exponents, codes of A transposed


def _payload(right: _Right, left: _Left) -> np.ndarray:
    writer = CodeWriter()
    writer.vector(right[0])
    writer.matrix(right[1])
    writer.vector(left[0])
    writer.vector(left[1])
    writer.matrix(left[2])
    return writer.payload()


class Hybrid(MatrixOperator):
    """The sum of a factored part, which the first `split` bytes hold, and an elementwise rest."""

    operator: Literal["hybrid"] = "hybrid"
    strong: Factored
    rest: Elementwise
    split: int = Field(ge=0)

    @model_validator(mode="after")
    def _turned_as_a_whole(self) -> "Hybrid":
        if self.strong.transposed or self.rest.transposed:
            raise ValueError("expected the field 'transposed' on the whole, found it on a part")
        return self

    def blocks(self, payload: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the sum, float32, of each block of rows of the rest.

        Raises:
            ValueError: the payload is not an encoding of that shape.
        """
        strong = self.strong.matrix(payload[: self.split], shape)
        for start, rest in self.rest.blocks(payload[self.split :], shape):
            yield start, rest.add_(strong[start : start + len(rest)])

    def levels(self, payload: np.ndarray, shape: tuple[int, int]) -> list[Levels]:
        """Return the codes of the factored part, two, and those of the rest.

        Raises:
            ValueError: as for `blocks`.
        """
        return self.strong.levels(payload[: self.split], shape) + self.rest.levels(payload[self.split :], shape)

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Return the sum of both parts."""
        return self.strong.joined(values[:2]) + self.rest.joined(values[2:])

    def recoded(
        self, payload: np.ndarray, shape: tuple[int, int], codes: Sequence[np.ndarray]
    ) -> tuple[Self, np.ndarray]:
        """Return the operator, whose split moves, and the payload with other codes.

        Raises:
            ValueError: as for `blocks`.
        """
        _, strong = self.strong.recoded(payload[: self.split], shape, codes[:2])
        _, rest = self.rest.recoded(payload[self.split :], shape, codes[2:])
        return self.model_copy(update={"split": len(strong)}), np.concatenate([strong, rest])


MatrixCode = Elementwise | Factored | Hybrid


def encode_factored(
    delta: Tensor, step: float, metric: Metric, directions: tuple[Tensor, Tensor]
) -> tuple[Factored, np.ndarray] | None:
    """Return the operator and payload of the product that explains `delta`; None where every direction rounds to zero.

    Args:
        delta: shape (rows, columns).
        step: as for `encode_elementwise`.
        metric: what errors cost.
        directions: S and V^T of the weighted delta, strongest first; see `weighted_svd`.
    """
    s, vh = directions
    lower, step = None if metric.lower is None else metric.lower.to(delta), float(f"{step / metric.scale**0.5:.4g}")
    right = s[:, None] * vh  # (rank, columns), whitened
    column_exponents = np.zeros(delta.shape[1], np.int32)
    if lower is not None:
        right = torch.linalg.solve_triangular(lower, right, upper=False, left=False)
        column_exponents = half_octaves(1 / lower.diagonal())
    column_steps = from_half_octaves(column_exponents).to(right)
    codes = quantize(right, torch.full((len(s),), step), column_steps, lower)
    heard = codes.any(dim=1)
    if not bool(heard.any()):
        return None
    codes = codes[heard]
    seen = codes * (column_steps * step)  # (rank, columns), what the left factor will be multiplied by
    seen_there = seen if lower is None else (seen @ lower) @ lower.T
    inner = seen_there @ seen.T  # (rank, rank), second moments of what the left factor is fed
    inner_lower = damped_cholesky(inner, 1e-6)
    left = torch.cholesky_solve(seen_there @ delta.T, inner_lower).T  # (rows, rank), by least squares
    row_exponents = np.zeros(len(delta), np.int32) if metric.rows is None else half_octaves(metric.rows.rsqrt())
    direction_exponents = half_octaves(step / inner_lower.diagonal())
    left_codes = quantize(left, from_half_octaves(row_exponents), from_half_octaves(direction_exponents), inner_lower)
    payload = _payload((column_exponents, _whole(codes)), (row_exponents, direction_exponents, _whole(left_codes.T)))
    return Factored(rank=len(codes), step=step), payload


def encode_hybrid(
    delta: Tensor, step: float, metric: Metric, directions: tuple[Tensor, Tensor]
) -> tuple[Hybrid, np.ndarray] | None:
    """Return the operator and payload of a few strong directions and the rest entry by entry; arguments as above."""
    strong = encode_factored(delta, step, metric, directions)
    if strong is None:
        return None
    shape = (delta.shape[0], delta.shape[1])
    left_over = strong[0].matrix(strong[1], shape).to(delta)
    torch.sub(delta, left_over, out=left_over)
    rest, payload = encode_elementwise(lambda start, stop: left_over[start:stop], shape, step, metric)
    return Hybrid(strong=strong[0], rest=rest, split=len(strong[1])), np.concatenate([strong[1], payload])


def weighted_svd(delta: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, shape (rows, rank), S, shape (rank,), and V^T, (rank, columns), of diag(rows)^(1/2) delta L."""
    weighted = delta if metric.rows is None else delta * metric.rows.sqrt().to(delta)[:, None]
    weighted = weighted if metric.lower is None else weighted @ metric.lower.to(weighted)
    return truncated_svd(weighted, rank)


def _whole(codes: Tensor) -> np.ndarray:
    return codes.to(torch.int32).cpu().numpy()
