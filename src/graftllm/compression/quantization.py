"""Group-wise rounding of singular vectors to few bits, with GPTQ's error feedback.

A factor is a matrix of shape (rank, length): one singular vector a row, each row with its own
number of bits. Runs of `group_size` values of a row share a scale and a zero point (asymmetric,
from the run's minimum and maximum): value = scale * (code - zero_point).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftllm.compression.bits import pack_bits, packed_nbytes, unpack_bits

Bands = Sequence[tuple[int, int]]  # (bits, how many rows have them), in the order of the rows
DAMPING = 0.01  # share of the mean of H's diagonal that is added to it (GPTQ's percdamp)
_BLOCK = 128  # columns whose error feedback is batched


@dataclass(frozen=True)
class Factor:
    """A quantised factor: codes of shape (rank, length), scales and zero points of shape (rank, groups)."""

    codes: Tensor  # uint8
    scales: Tensor  # bfloat16
    zero_points: Tensor  # uint8
    group_size: int

    def values(self) -> Tensor:
        """Return the values in float32, shape (rank, length)."""
        scale = _spread(self.scales.float(), self.group_size, self.codes.shape[1])
        zero = _spread(self.zero_points.float(), self.group_size, self.codes.shape[1])
        return scale * (self.codes.float() - zero)


def quantize_factor(
    rows: Tensor, bands: Bands, group_size: int, hessian: Tensor | None = None, *, along: str = "length"
) -> Factor:
    """Round a factor to the bits of its bands.

    With a Hessian this is GPTQ (arXiv 2210.17323): dimensions are rounded one by one, and the
    error of each is made up for in those still to come, so that the layer's output changes least.

    Args:
        rows: shape (rank, length), float32.
        bands: number of bits and of rows, strongest rows first; the rows sum to rank.
        group_size: values of a row that share a scale.
        hessian: second moments of the factor's input. Shape (length, length) when the input is
            multiplied along the length (V^T on x), (rank, rank) when along the rank (U on S V^T x).
        along: which dimension the Hessian is of, `length` or `rank`.
    """
    most = torch.cat([torch.full((count,), 2**bits - 1) for bits, count in bands]).float()[:, None].to(rows.device)
    scales, zero_points = _grid(rows, most, group_size)
    scale = _spread(scales.float(), group_size, rows.shape[1])  # (rank, length), as the next two
    zero = _spread(zero_points, group_size, rows.shape[1])
    limit = most.expand_as(rows)
    if hessian is None:
        codes = _round(rows, scale, zero, limit)
    elif along == "length":
        codes = _gptq(rows, scale, zero, limit, hessian)
    else:
        codes = _gptq(rows.T, scale.T, zero.T, limit.T, hessian).T
    return Factor(codes.to(torch.uint8), scales, zero_points.to(torch.uint8), group_size)


def factor_nbytes(length: int, bands: Bands, group_size: int) -> int:
    """Return how many bytes `pack_factor` writes for rows of this length."""
    groups = math.ceil(length / group_size)
    packed = sum(packed_nbytes(rows * length, bits) + packed_nbytes(rows * groups, bits) for bits, rows in bands)
    return packed + 2 * groups * sum(rows for _, rows in bands)


def pack_factor(factor: Factor, bands: Bands) -> np.ndarray:
    """Return a factor as bytes: the scales (bfloat16), then per band its zero points and codes, packed at its bits."""
    parts = [factor.scales.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()]
    start = 0
    for bits, rows in bands:
        for values in (factor.zero_points, factor.codes):
            parts.append(pack_bits(values[start : start + rows].cpu().reshape(-1).numpy(), bits))
        start += rows
    return np.concatenate(parts)


def unpack_factor(data: np.ndarray, length: int, bands: Bands, group_size: int) -> Factor:
    """Return the factor that `pack_factor` packed.

    Raises:
        ValueError: `data` is not exactly as long as such a factor takes.
    """
    if len(data) != factor_nbytes(length, bands, group_size):
        raise ValueError(f"expected {factor_nbytes(length, bands, group_size)} bytes of factor, found {len(data)}")
    groups = math.ceil(length / group_size)
    rank = sum(rows for _, rows in bands)
    position = 2 * rank * groups
    scales = torch.from_numpy(data[:position].copy()).view(torch.bfloat16).reshape(rank, groups)
    zero_points, codes = np.empty((rank, groups), np.uint8), np.empty((rank, length), np.uint8)
    start = 0
    for bits, rows in bands:
        for values in (zero_points, codes):
            part = values[start : start + rows]
            size = packed_nbytes(part.size, bits)
            part[:] = unpack_bits(data[position : position + size], part.size, bits).reshape(part.shape)
            position += size
        start += rows
    return Factor(torch.from_numpy(codes), scales, torch.from_numpy(zero_points), group_size)


def _grid(rows: Tensor, most: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return scales (bfloat16) and zero points (float32) of every group, shape (rank, groups)."""
    rank, length = rows.shape
    group_size = min(group_size, length)
    groups = math.ceil(length / group_size)
    padded = torch.nn.functional.pad(rows, (0, groups * group_size - length)).reshape(rank, groups, group_size)
    low = padded.amin(dim=2).clamp(max=0)
    high = padded.amax(dim=2).clamp(min=0)
    scales = ((high - low) / most).bfloat16()
    scales[scales == 0] = 1
    return scales, (-low / scales.float()).round().clamp(min=0).minimum(most)


def _spread(per_group: Tensor, group_size: int, length: int) -> Tensor:
    """Return (rank, groups) repeated to (rank, length)."""
    return per_group.repeat_interleave(min(group_size, length), dim=1)[:, :length]


def _round(values: Tensor, scale: Tensor, zero: Tensor, limit: Tensor) -> Tensor:
    return (values / scale + zero).round().clamp(min=0).minimum(limit)


def _gptq(weight: Tensor, scale: Tensor, zero: Tensor, limit: Tensor, hessian: Tensor) -> Tensor:
    """Return the codes of `weight`, shape (d_out, d_in), rounded column by column, most active first."""
    order = hessian.diagonal().argsort(descending=True)
    weight, scale, zero, limit = (part[:, order].contiguous() for part in (weight, scale, zero, limit))
    feedback = _inverse_factor(hessian[order][:, order])  # (d_in, d_in), upper triangular
    codes = torch.empty_like(weight)
    for start in range(0, weight.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, weight.shape[1]))
        here, errors = weight[:, block], torch.empty_like(weight[:, block])
        corner = feedback[block, block]
        for i in range(here.shape[1]):
            column = start + i
            codes[:, column] = _round(here[:, i], scale[:, column], zero[:, column], limit[:, column])
            rounded = scale[:, column] * (codes[:, column] - zero[:, column])
            errors[:, i] = (here[:, i] - rounded) / corner[i, i]
            here[:, i + 1 :] -= errors[:, i : i + 1] * corner[i, i + 1 :]
        weight[:, block.stop :] -= errors @ feedback[block, block.stop :]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse, up to a scale that feedback does not see."""
    mean = hessian.diagonal().mean()
    normal = hessian / mean if mean > 0 else torch.zeros_like(hessian)
    damping = DAMPING
    while True:
        damped = normal.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        upper, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and not failed_again and bool(torch.isfinite(upper).all()):
            return upper
        damping *= 10  # more damping always ends in the identity
