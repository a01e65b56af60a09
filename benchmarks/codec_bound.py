"""How few bytes a transform could take at a given distortion: reverse water-filling.

A Gaussian coefficient of variance v costs at least 1/2 log2(v / theta) bits at distortion theta, or
nothing when v <= theta (Cover and Thomas, chapter 10.3). Two transforms of a delta D with the metric
H, tr(E H E^T): singular directions of D H^(1/2), where a direction is m + n coefficients and is left
out when that is cheaper; and the rows of D turned into H's basis, which a reader of the file does
not know, so that no code gets there. The second is a limit, the first what factors are measured by.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def bound_nbytes(delta: Tensor, moments: Tensor | None, distortion: float) -> tuple[float, float]:
    """Return the fewest bytes that code `delta`, shape (m, n), within `distortion`: as directions, and as rows.

    Args:
        delta: the matrix to code.
        moments: H, shape (n, n); the identity where there is none.
        distortion: tr(E H E^T) of what was decoded.
    """
    values, basis = (torch.ones(delta.shape[1]), None) if moments is None else torch.linalg.eigh(moments)
    turned = delta if basis is None else delta @ basis
    whitened = turned * values.clamp(min=0).sqrt()  # (m, n), columns in H's basis
    energy = torch.linalg.svdvals(whitened).double().square()
    variances = whitened.double().square().mean(0)  # (n,), of a column's m coefficients
    if moments is None:
        variances = variances.mean().expand(len(variances))  # without a basis all entries are alike
    return _directions(energy, delta.shape, distortion), _rows(variances, delta.shape[0], distortion)


def _rows(variances: Tensor, count: int, distortion: float) -> float:
    def spent(level: float) -> float:
        return count * float(variances.clamp(max=level).sum())

    level = _level(spent, distortion)
    return count * float((variances / level).log2().clamp(min=0).sum()) / 16


def _directions(energy: Tensor, shape: torch.Size, distortion: float) -> float:
    lengths = torch.tensor(shape, dtype=torch.float64)[:, None]  # (2, 1): coefficients of u and of v

    def chosen(level: float) -> tuple[Tensor, Tensor]:
        """Return distortion and bits of every direction."""
        bits = ((energy / (lengths * level)).log2().clamp(min=0) / 2 * lengths).sum(0)
        error = torch.minimum(lengths * level, energy).sum(0)
        coded = error + 2 * math.log(2) * level * bits < energy
        return torch.where(coded, error, energy), torch.where(coded, bits, 0)

    level = _level(lambda level: float(chosen(level)[0].sum()), distortion)
    return float(chosen(level)[1].sum()) / 8


def _level(spent: Callable[[float], float], distortion: float) -> float:
    """Return the highest water level, found by bisection on its logarithm, that spends at most `distortion`."""
    low, high = -100.0, 50.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(math.exp(middle)) <= distortion else (low, middle)
    return math.exp(low)
