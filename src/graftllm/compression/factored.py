"""The factored operators: a delta as a product of two entropy-coded factors, with or without a rest.

Delta ~ A B. B holds the leading right singular directions of the delta as the metric sees it, A is
solved again by least squares against the stored B, and both are rounded with the same step in
units of cost, which is reverse water-filling: strong directions get many bits, weak ones few or none.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from graftllm.compression.codes import CodeReader, CodeWriter
from graftllm.compression.elementwise import Elementwise, encode_elementwise
from graftllm.compression.lowrank import truncated_svd
from graftllm.compression.matrix import MatrixOperator
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
        """Yield 0 and the product in float32.

        Raises:
            ValueError: the payload is not an encoding of that shape.
        """
        left, right = self.factors(payload, shape)
        yield 0, left @ right

    def factors(self, payload: np.ndarray, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return A, shape (rows, rank), and B, shape (rank, columns), in float32.

        Raises:
            ValueError: as for `blocks`.
        """
        rows, columns = shape
        if self.rank > min(shape):
            raise ValueError(f"expected a rank of at most {min(shape)}, found {self.rank}")
        reader = CodeReader(payload)
        column_steps = from_half_octaves(reader.vector(columns)) * self.step
        right = torch.from_numpy(reader.matrix(self.rank, columns)).float() * column_steps
        row_steps, direction_steps = from_half_octaves(reader.vector(rows)), from_half_octaves(reader.vector(self.rank))
        left = torch.from_numpy(reader.matrix(self.rank, rows)).float() * direction_steps[:, None] * row_steps
        reader.finish()
        return left.T, right


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
            yield start, strong[start : start + len(rest)] + rest


MatrixCode = Elementwise | Factored | Hybrid


def encode_factored(
    delta: Tensor, step: float, metric: Metric, directions: tuple[Tensor, Tensor]
) -> tuple[Factored, np.ndarray] | None:
    """Return the operator and payload of the product that explains `delta`; None where every direction rounds to zero.

    Args:
        delta: shape (rows, columns).
        step: as for `encode_elementwise`.
        metric: what errors cost.
        directions: S and V^T of the weighted delta, strongest first, as `weighted_svd` gives them.
    """
    s, vh = directions
    lower, step = metric.lower, float(f"{step / metric.scale**0.5:.4g}")
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
    writer = CodeWriter()
    writer.vector(column_exponents)
    writer.matrix(_whole(codes))
    writer.vector(row_exponents)
    writer.vector(direction_exponents)
    writer.matrix(_whole(left_codes.T))
    return Factored(rank=len(codes), step=step), writer.payload()


def encode_hybrid(
    delta: Tensor, step: float, metric: Metric, directions: tuple[Tensor, Tensor]
) -> tuple[Hybrid, np.ndarray] | None:
    """Return the operator and payload of a few strong directions and the rest entry by entry; arguments as above."""
    strong = encode_factored(delta, step, metric, directions)
    if strong is None:
        return None
    shape = (delta.shape[0], delta.shape[1])
    explained = strong[0].matrix(strong[1], shape).to(delta)
    left_over = delta - explained
    rest, payload = encode_elementwise(lambda start, stop: left_over[start:stop], shape, step, metric)
    return Hybrid(strong=strong[0], rest=rest, split=len(strong[1])), np.concatenate([strong[1], payload])


def weighted_svd(delta: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """Return S, shape (rank,), and V^T, shape (rank, columns), of diag(rows)^(1/2) delta L."""
    weighted = delta if metric.rows is None else delta * metric.rows.sqrt().to(delta)[:, None]
    weighted = weighted if metric.lower is None else weighted @ metric.lower.to(weighted)
    _, s, vh = truncated_svd(weighted, rank)
    return s, vh


def _whole(codes: Tensor) -> np.ndarray:
    return codes.to(torch.int32).cpu().numpy()
