"""Matrix products with the same bits on every platform, whatever the order of their sums.

Factors are rounded to whole numbers so small that no sum of their products needs more than the 53
bits of a float64: every order of adding gives the same, fused or not, in any number of threads.
"""

import numpy as np
import torch
from torch import Tensor

_BITS = 53


def steady_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in float32, off by about 2 ** -20 of its largest terms.

    Each row of `left` and each column of `right` is brought below 2 ** b by a power of two, the least that does,
    and rounded to whole numbers, to nearest even; rank * 2 ** (2 b) is at most 2 ** 53.

    Args:
        left: shape (rows, rank), float32.
        right: shape (rank, columns), float32.

    Raises:
        ValueError: a factor is not finite.
    """
    bits = (_BITS - left.shape[1].bit_length()) // 2
    (rows, of_rows), (columns, of_columns) = _whole(left, bits, 1), _whole(right, bits, 0)
    return (rows @ columns * of_rows * of_columns).float()


def _whole(factor: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return whole numbers of at most so many bits, float64, and the powers of two to multiply them by."""
    largest = factor.double().abs().amax(dim=dim, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("expected finite factors")
    octaves = np.frexp(largest.numpy())[1].astype(np.int64)
    scales = torch.from_numpy(np.ldexp(1.0, bits - octaves))
    return (factor.double() * scales).round(), torch.from_numpy(np.ldexp(1.0, octaves - bits))
