"""The strategy `paper`, one parameter at a time.

It is the module-aware adaptive compression of arXiv 2505.18502: embedding and head pruned by magnitude, attention
and MLP by truncated SVD with quantised factors. A stack of experts, or a convolution, is decomposed as one matrix.
Norms, biases and all other vectors are exact.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from graftllm.compression.encoded import Operator
from graftllm.compression.exact import encode_exact
from graftllm.compression.lowrank import (
    encode_lowrank,
    leading_svd,
    lowrank_nbytes,
    rank_for_energy,
    singular_values,
    truncated_svd,
)
from graftllm.compression.matrix import is_matrix, matrix_shape
from graftllm.compression.pruning import encode_sparse
from graftllm.compression.roles import Role
from graftllm.packing_options import PackOptions

PRUNED: tuple[Role, ...] = ("embedding", "head")


def encode_published(
    base: Tensor,
    tuned: Tensor,
    change: Tensor,
    role: Role,
    options: PackOptions,
    rank: int | None,
    moments: Tensor | None,
    *,
    transposed: bool = False,
) -> tuple[Operator, np.ndarray]:
    """Return the operator and payload of one floating-point parameter that changed.

    Args:
        base: its value, aligned.
        tuned: its tuned value.
        change: tuned - base in float32, where it shall be decomposed.
        role: of the parameter.
        options: the strategy and its knobs.
        rank: of a low-rank operator; None for what keeps the energy of the options.
        moments: of the layer's input.
        transposed: whether the input side is dimension 0.
    """
    if not is_matrix(tuple(tuned.shape), role):
        return encode_exact(base, tuned)
    if role in PRUNED:
        return encode_sparse(change.cpu(), options.density, options.group_size)
    matrix = change.reshape(matrix_shape(tuple(tuned.shape)))
    matrix = matrix.T if transposed else matrix
    factors = leading_svd(matrix, options.energy) if rank is None else truncated_svd(matrix, rank)
    moments = None if moments is None else moments.to(change.device)
    operator, payload = encode_lowrank(factors, options.bit_bands, options.group_size, moments)
    return operator.model_copy(update={"transposed": transposed}), payload


@dataclass(frozen=True)
class Sizes:
    """What is known of one parameter before its energy is: its bytes if that is all, else its spectrum."""

    shape: tuple[int, int]
    known: int
    spectrum: Tensor | None = None  # singular values, descending

    def nbytes(self, energy: float, options: PackOptions) -> int:
        """Return how many bytes its payload takes when that much energy is kept."""
        if self.spectrum is None:
            return self.known
        return lowrank_nbytes(self.shape, rank_for_energy(self.spectrum, energy), options.bit_bands, options.group_size)


def sizes(base: Tensor, tuned: Tensor, change: Tensor, role: Role, options: PackOptions) -> Sizes:
    """Return what is known of one floating-point parameter that changed; arguments as for `encode_published`."""
    shape = matrix_shape(tuple(base.shape))
    if role in PRUNED or not is_matrix(shape, role):
        return Sizes(shape, encode_published(base, tuned, change, role, options, None, None)[1].nbytes)
    return Sizes(shape, 0, singular_values(change.reshape(shape)).cpu())
