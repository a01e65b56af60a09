"""What an error in a parameter costs, and quantisation that errs where it costs least.

The cost of an error E of shape (d_out, d_in) is scale * sum_i rows_i (E right E^T)_ii: with `right` the
second moments of the layer's input and `rows` those of the gradient at its output this is the
Kronecker-factored estimate of the KL divergence that E causes (arXiv 1503.05671, diagonal in its
output factor), in nats a token. Without calibration it is the plain squared error.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

DAMPING = 0.03  # share of the mean of the diagonal that is added to `right`; 0.01 and 0.1 are a little worse
_LARGEST = float((1 << 24) - 1)  # codes stay whole numbers in float32
_OUTWARD = 0.05  # of a step: values from 0.45 on become 1
_SMALLEST = 1e-15  # norms above this are of numbers whose squares float32 holds
_BLOCK = 64  # columns whose cancellation is batched


@dataclass(frozen=True)
class Metric:
    """The cost of errors in one matrix. `rows` has mean 1 and `right` a diagonal of mean 1, or they are None."""

    scale: float = 1.0
    rows: Tensor | None = None  # (d_out,)
    right: Tensor | None = None  # (d_in, d_in)

    def cost(self, error: Tensor) -> float:
        """Return what an error of shape (d_out, d_in) costs."""
        return float(self.row_costs(error).sum())

    def row_costs(self, error: Tensor) -> Tensor:
        """Return what each row of an error costs, float64, shape (d_out,)."""
        whitened = error if self.lower is None else error @ self.lower.to(error)  # (d_out, d_in)
        per_row = self.scale * row_squares(whitened)
        return per_row if self.rows is None else per_row * self.rows.to(per_row)

    @cached_property
    def lower(self) -> Tensor | None:
        """L of right = L L^T, lower triangular, damped so that it exists."""
        return None if self.right is None else damped_cholesky(self.right)

    def of_rows(self, rows: Tensor) -> "Metric":
        """Return the metric of some rows, by their numbers; what was computed is shared."""
        part = Metric(self.scale, None if self.rows is None else self.rows[rows], self.right)
        part.__dict__["lower"] = self.lower
        return part


def row_squares(matrix: Tensor) -> Tensor:
    """Return the squared norm of each row, float64; many times faster than squares summed in that precision."""
    return torch.linalg.vector_norm(matrix, dim=1).double().square()


def frobenius(values: Tensor) -> float:
    """Return the norm of all entries, summed by rows: over tens of millions at once float32 is off by a percent."""
    rows = values.reshape(-1, values.shape[-1] if values.ndim else 1)
    norm = float(row_squares(rows).sum().sqrt())
    if norm > _SMALLEST or not values.numel():
        return norm
    largest = float(values.abs().max())  # squares that float32 does not hold
    return largest * float(row_squares(rows / largest).sum().sqrt()) if largest else 0.0


def damped_cholesky(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the lower Cholesky factor of moments with more on their diagonal, as much as it takes to exist."""
    mean = moments.diagonal().mean().clamp(min=torch.finfo(moments.dtype).tiny)
    while True:
        damped = moments.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(torch.isfinite(lower).all()):
            return lower
        damping *= 10  # more damping always ends in a multiple of the identity


def shrunk(moments: Tensor, samples: int) -> Tensor:
    """Return second moments as few samples show them, moved toward the same for all directions.

    The share of that is the one of oracle approximating shrinkage (arXiv 0907.4698): none for many, all for one.
    The trace stays.

    Args:
        moments: x x^T, mean over the samples, shape (d, d).
        samples: how many there were.
    """
    width, trace, square = len(moments), float(moments.diagonal().sum()), float(moments.square().sum())
    spread = (samples + 1 - 2 / width) * (square - trace**2 / width)
    share = min(max(((1 - 2 / width) * square + trace**2) / spread, 0.0), 1.0) if spread > 0 else 1.0
    found = moments * (1 - share)
    found.diagonal().add_(share * trace / width)
    return found


def half_octaves(steps: Tensor) -> np.ndarray:
    """Return the powers of sqrt(2) nearest to positive steps, as int32 exponents.

    A step that is off by a fourth of an octave costs about 1 % more error; exponents this coarse cost about two bits.
    """
    return (2 * steps.double().log2()).round().clamp(-254, 254).to(torch.int32).cpu().numpy()


def from_half_octaves(exponents: np.ndarray) -> Tensor:
    """Return sqrt(2) ** exponent in float32; the same bits on every platform."""
    whole, odd = np.divmod(exponents.astype(np.int64), 2)
    return torch.from_numpy(np.ldexp(np.where(odd, np.float32(2**0.5), np.float32(1)), np.clip(whole, -126, 126)))


def quantize(values: Tensor, row_steps: Tensor, column_steps: Tensor, lower: Tensor | None) -> Tensor:
    """Round values to whole multiples of row_steps_i * column_steps_j, so that the error costs least.

    Without a metric each value is rounded by itself. With one, columns are rounded last to first, and
    each makes up for the error of those before it in the metric (successive interference cancellation;
    with column steps c / L_jj this is WaterSIC, arXiv 2603.04956).

    Args:
        values: shape (d_out, d_in).
        row_steps: shape (d_out,), positive.
        column_steps: shape (d_in,), positive.
        lower: L of the metric L L^T on the right, lower triangular, shape (d_in, d_in).

    Returns:
        Whole numbers in the dtype of `values`, shape (d_out, d_in).
    """
    rows, columns = row_steps.to(values)[:, None], column_steps.to(values)
    if lower is None:
        return rounded(values / rows / columns)
    lower = lower.to(values)
    residual = (values / rows) @ lower  # (d_out, d_in), what is left to be explained, whitened
    codes = torch.empty_like(values)
    for stop in range(values.shape[1], 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        here, corner = residual[:, start:stop], lower[start:stop, start:stop]
        for j in range(stop - start - 1, -1, -1):
            column = start + j
            codes[:, column] = rounded(here[:, j] / (corner[j, j] * columns[column]))
            here[:, : j + 1] -= (codes[:, column] * columns[column])[:, None] * corner[j, : j + 1]
        residual[:, :start] -= (codes[:, start:stop] * columns[start:stop]) @ lower[start:stop, :start]
    return codes


def rounded(steps: Tensor) -> Tensor:
    """Return the nearest whole numbers, or those a little farther from zero.

    Coarse steps lose small values, which pulls the model toward its base: that costs more divergence than the squared
    error tells, and than the error that is made here.
    """
    return steps.add(steps.sign(), alpha=_OUTWARD).round_().clamp_(-_LARGEST, _LARGEST)
