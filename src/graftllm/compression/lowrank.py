"""The low-rank operator: a delta as the product of two quantised factors, U S V^T.

The rank is the smallest that keeps a given energy (arXiv 2505.18502); stronger singular vectors
get more bits. V^T is rounded first, against the layer's input; U then, against what V^T became.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from graftllm.compression.matrix import matrix_shape
from graftllm.compression.metric import frobenius
from graftllm.compression.quantization import factor_nbytes, pack_factor, quantize_factor, unpack_factor


class LowRank(BaseModel):
    """`U S` and `V^T`, each packed as `quantization` describes, `V^T` first, of a tensor cut by `matrix_shape`.

    `bands` gives the bits and the number of singular vectors that have them, strongest first; `transposed` says
    that they are of the tensor's transpose.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    operator: Literal["lowrank"] = "lowrank"
    bands: tuple[tuple[int, int], ...]
    group_size: int = Field(ge=1, le=1 << 20)
    transposed: bool = False

    @model_serializer(mode="wrap")
    def _only_what_differs(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key != "transposed" or value}

    @property
    def rank(self) -> int:
        """How many singular vectors are kept."""
        return sum(count for _, count in self.bands)

    def delta(self, payload: np.ndarray, base: Tensor) -> Tensor:
        """Return the delta in float32, in the shape of `base`.

        Raises:
            ValueError: the payload is not as long as such factors take.
        """
        left, right = self.factors(payload, matrix_shape(tuple(base.shape)))
        return (left @ right).reshape(base.shape)

    def factors(self, payload: np.ndarray, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return factors whose product is the delta of a matrix, shapes (rows, rank) and (rank, columns), in float32.

        Raises:
            ValueError: as for `delta`.
        """
        d_out, d_in = reversed(shape) if self.transposed else shape
        if any(not 1 <= bits <= 8 or count < 1 for bits, count in self.bands) or not 1 <= self.rank <= min(shape):
            raise ValueError(f"expected bands of 1 to 8 bits and a rank of 1 to {min(shape)}, found {self.bands}")
        size = factor_nbytes(d_in, self.bands, self.group_size)
        right = unpack_factor(payload[:size], d_in, self.bands, self.group_size).values()
        left = unpack_factor(payload[size:], d_out, self.bands, self.group_size).values()
        return (right.T, left) if self.transposed else (left.T, right)


def encode_lowrank(
    factors: tuple[Tensor, Tensor, Tensor],
    bit_bands: Sequence[tuple[int, float]],
    group_size: int,
    hessian: Tensor | None,
) -> tuple[LowRank, np.ndarray]:
    """Return the operator and payload of quantised factors.

    Args:
        factors: U, S and V^T, shapes (d_out, rank), (rank,), (rank, d_in); strongest first.
        bit_bands: bits and share of the singular vectors, strongest first.
        group_size: values that share a scale.
        hessian: second moments x x^T of the layer's input, shape (d_in, d_in); without it codes are
            rounded to nearest.
    """
    u, s, vh = factors
    bands = whole_bands(len(s), bit_bands)
    right = quantize_factor(vh, bands, group_size, hessian)
    seen = right.values()  # (rank, d_in): what the left factor will be fed is seen @ x
    inner = None if hessian is None else seen @ hessian @ seen.T
    left = quantize_factor((u * s).T, bands, group_size, inner, along="rank")
    payload = np.concatenate([pack_factor(right, bands), pack_factor(left, bands)])
    return LowRank(bands=bands, group_size=group_size), payload


def lowrank_nbytes(shape: tuple[int, int], rank: int, bit_bands: Sequence[tuple[int, float]], group_size: int) -> int:
    """Return how many bytes `encode_lowrank` will write of a matrix."""
    bands = whole_bands(rank, bit_bands)
    return sum(factor_nbytes(length, bands, group_size) for length in shape)


def whole_bands(rank: int, bit_bands: Sequence[tuple[int, float]]) -> tuple[tuple[int, int], ...]:
    """Return how many of `rank` singular vectors get how many bits; the strongest band never starves.

    >>> whole_bands(1000, [(8, 0.02), (4, 0.18), (2, 0.80)])
    ((8, 20), (4, 180), (2, 800))
    >>> whole_bands(3, [(8, 0.02), (4, 0.18), (2, 0.80)])
    ((8, 1), (2, 2))
    """
    bands, taken, share = [], 0, 0.0
    for bits, part in bit_bands:
        share += part
        upto = min(rank, max(1, round(rank * share)))
        if upto > taken:
            bands.append((bits, upto - taken))
        taken = upto
    return tuple(bands)


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """Return the smallest rank that keeps `energy` of the squared norm.

    Smallest k with sum_{i<=k} s_i^2 >= energy * sum_i s_i^2 (beta in arXiv 2505.18502).

    Args:
        singular_values: shape (min(d_out, d_in),), non-negative, descending.
        energy: share to keep, in (0, 1].

    Returns:
        A rank of at least 1, also when every singular value is zero.

    Raises:
        ValueError: energy is outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy: expected a share in (0, 1], found {energy}")
    kept = singular_values.double().square().cumsum(0)
    reached = int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1
    return min(reached, len(singular_values))


def leading_svd(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading U, S and V^T that keep `energy` of the squared norm, as few as that takes.

    The exact squared norm is known, so a randomised basis is certified by what it captures: its
    rank is doubled until that is enough, or until the whole spectrum is cheaper.

    Raises:
        ValueError: energy is outside (0, 1].
    """
    total = frobenius(matrix) ** 2
    rank = _FIRST_RANK
    while _SMALL < min(matrix.shape) and rank <= min(matrix.shape) // _RANDOMIZED_SHARE:
        u, s, vh = truncated_svd(matrix, rank)
        rest = (total - s.double().square().sum()).clamp(min=0).sqrt().to(s.dtype)
        needed = rank_for_energy(torch.cat([s, rest[None]]), energy)  # the rest counts as one direction more
        if needed <= rank:
            return u[:, :needed], s[:needed], vh[:needed]
        rank *= 2
    u, s, vh = truncated_svd(matrix, min(matrix.shape))
    needed = rank_for_energy(s, energy)
    return u[:, :needed], s[:needed], vh[:needed]


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading `rank` of U, S and V^T: shapes (d_out, rank), (rank,), (rank, d_in).

    A small matrix is decomposed whole; of a large one a small rank comes from a randomised range
    finder (arXiv 0909.4061, two power iterations), a large rank from the Gram matrix's eigenvectors.
    """
    if min(matrix.shape) <= _SMALL:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = truncated_svd(matrix.T, rank)
        return vh.T, s, u.T
    if rank <= min(matrix.shape) // _RANDOMIZED_SHARE:
        basis = _range_basis(matrix, rank)
        inner, s, vh = _svd_by_gram(basis.T @ matrix, rank)
        return basis @ inner, s, vh
    return _svd_by_gram(matrix, rank)


def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values, descending; of a large matrix by its Gram matrix."""
    if min(matrix.shape) <= _SMALL:
        return torch.linalg.svdvals(matrix)
    wide = _precise(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
    return torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp(min=0).sqrt().to(matrix.dtype)


_SMALL = 256  # below this the whole decomposition takes a few milliseconds
_MEDIUM = 1024  # up to this products in float64 take less than a second
_RANDOMIZED_SHARE = 8  # a range finder pays up to about this share of the full rank
_OVERSAMPLING = 16
_FIRST_RANK = 64


def _range_basis(matrix: Tensor, rank: int) -> Tensor:
    """Return an orthonormal basis, shape (d_out, rank + 16), of what `matrix` mostly maps to."""
    draw = torch.Generator(device=matrix.device).manual_seed(0)
    shape = (matrix.shape[1], rank + _OVERSAMPLING)
    sketch = torch.randn(shape, generator=draw, device=matrix.device).to(matrix.dtype)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis


def _svd_by_gram(wide: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading `rank` of U, S and V^T of a matrix that is wider than high."""
    exact = _precise(wide)
    u = torch.linalg.eigh(exact @ exact.T).eigenvectors.flip(1)[:, :rank]
    scaled = u.T @ exact  # (rank, d_in), S V^T; U is orthonormal, so this is the best right factor for it
    s = scaled.norm(dim=1)
    vh = scaled / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]
    return u.to(wide.dtype), s.to(wide.dtype), vh.to(wide.dtype)


def _precise(matrix: Tensor) -> Tensor:
    """Return a matrix in float64 where that is cheap: squaring it loses half of the digits."""
    return matrix.double() if min(matrix.shape) <= _MEDIUM else matrix
