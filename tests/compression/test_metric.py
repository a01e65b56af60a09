import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graftllm.compression import metric as metric_module
from graftllm.compression.metric import (
    DAMPING,
    Metric,
    damped_cholesky,
    frobenius,
    from_half_octaves,
    half_octaves,
    quantize,
    shrunk,
)


def _right(width: int, *, seed: int = 0, samples: int = 40) -> Tensor:
    """Second moments of correlated inputs, with a diagonal of mean 1."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, width, generator=draw).double() @ torch.randn(width, width, generator=draw).double()
    moments = mixed.T @ mixed
    return moments / moments.diagonal().mean()


def _metric(rows: int, columns: int, *, seed: int = 0) -> Metric:
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    return Metric(2.5, weights / weights.mean(), _right(columns, seed=seed))


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 1000))
def test_cost_is_the_trace_in_the_damped_metric(rows: int, columns: int, seed: int) -> None:
    metric = _metric(rows, columns, seed=seed)
    error = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    damped = metric.right + DAMPING * torch.eye(columns).double()  # the diagonal's mean is 1
    expected = 2.5 * torch.trace(torch.diag(metric.rows) @ error @ damped @ error.T)
    assert metric.cost(error) == pytest.approx(float(expected), rel=1e-6)


def test_without_a_metric_the_cost_is_the_squared_error() -> None:
    error = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    assert Metric().cost(error) == pytest.approx(14)
    assert Metric(scale=0.5, rows=torch.tensor([2.0, 0.0])).cost(error) == pytest.approx(5)


def test_the_norm_of_millions_of_entries_is_that_of_their_squares() -> None:
    """PyTorch's own, on one thread, is off by a percent from about 2 ** 26 entries on."""
    values = torch.randn(1 << 12, 1 << 12, generator=torch.Generator().manual_seed(0))
    expected = float(values.double().square().sum().sqrt())
    assert frobenius(values) == pytest.approx(expected, rel=1e-6)
    assert frobenius(values[0]) == pytest.approx(float(values[0].double().norm()), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-36, 1e-26, 1e-16])
def test_the_norm_of_numbers_whose_squares_are_nothing_in_float32(scale: float) -> None:
    values = torch.linspace(-3, 5, 12).reshape(3, 4) * scale
    assert frobenius(values) == pytest.approx(float(values.double().norm()), rel=1e-5)


def test_the_cost_of_rows_adds_up_to_the_cost_of_all() -> None:
    metric, error = _metric(7, 5), torch.randn(7, 5).double()
    parts = [metric.of_rows(torch.tensor(some)).cost(error[some]) for some in ([0, 3], [1, 2, 4], [5, 6])]
    assert sum(parts) == pytest.approx(metric.cost(error))


@pytest.mark.parametrize(
    "moments", [torch.zeros(4, 4), torch.ones(4, 4), torch.diag(torch.tensor([1e30, 1, 0, 1e-30]))]
)
def test_moments_without_an_inverse_are_damped_until_they_have_one(moments: Tensor) -> None:
    lower = damped_cholesky(moments)
    assert torch.isfinite(lower).all()
    assert (lower.diagonal() > 0).all()


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=20))
def test_half_octaves_are_within_a_quarter_octave(steps: list[float]) -> None:
    exact = torch.tensor(steps, dtype=torch.float64)
    ratio = from_half_octaves(half_octaves(exact)).double() / exact
    assert (ratio.log2().abs() <= 0.25 + 1e-6).all()


def test_half_octaves_have_known_bits() -> None:
    found = from_half_octaves(np.array([-3, -2, -1, 0, 1, 2, 3, 500, -500, -501], np.int32))
    odd = 0x3FB504F3
    expected = [odd - (2 << 23), 0x3F000000, odd - (1 << 23), 0x3F800000, odd, 0x40000000, odd + (1 << 23)]
    expected += [0x7E800000, 0x00800000, odd - (126 << 23)]  # the exponent is brought into -126 to 126
    assert found.view(torch.int32).tolist() == expected


def _column_by_column(values: Tensor, row_steps: Tensor, column_steps: Tensor, lower: Tensor) -> Tensor:
    """The plain loop: each column is rounded where the error of those after it is best made up for."""
    residual, codes = (values / row_steps[:, None]) @ lower, torch.zeros_like(values)
    for j in reversed(range(values.shape[1])):
        found = residual[:, j] / (lower[j, j] * column_steps[j])
        codes[:, j] = found.sign() * (found.abs() + 0.55).floor()
        residual -= torch.outer(codes[:, j] * column_steps[j], lower[j])
    return codes


@pytest.mark.parametrize("width", [1, 7, 16, 17, 50])
def test_cancellation_in_blocks_is_the_plain_loop(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_module, "_BLOCK", 16)
    values, lower = torch.randn(6, width).double(), damped_cholesky(_right(width, samples=100))
    row_steps, column_steps = 0.05 * (torch.rand(6).double() + 1), torch.rand(width).double() + 0.5
    found = quantize(values, row_steps, column_steps, lower)
    assert torch.equal(found, _column_by_column(values, row_steps, column_steps, lower))


def _costs(metric: Metric, values: Tensor, step: float) -> tuple[float, float]:
    """Costs of rounding with the metric and of each value by itself, on the same grid."""
    rows, columns = torch.full((len(values),), step), torch.ones(values.shape[1])
    by = [quantize(values, rows, columns, lower) for lower in (metric.lower, None)]
    return metric.cost(by[0] * step - values), metric.cost(by[1] * step - values)


@pytest.mark.parametrize("step", [0.01, 0.3, 1.0])
def test_rounding_with_a_metric_costs_less_than_by_itself(step: float) -> None:
    with_it, by_itself = _costs(_metric(40, 32), torch.randn(40, 32).double(), step)
    assert with_it < 0.7 * by_itself  # 0.35 to 0.55 over sixty draws


def test_with_nothing_correlated_cancellation_is_rounding() -> None:
    metric = Metric(right=torch.diag(torch.rand(12).double() + 0.5))
    values, steps = torch.randn(9, 12).double(), torch.full((9,), 0.2)
    columns = torch.rand(12) + 0.5
    assert torch.equal(quantize(values, steps, columns, metric.lower), quantize(values, steps, columns, None))


def test_fine_steps_cost_a_twelfth_of_their_square_and_rounding_outward_a_little_in_every_column() -> None:
    metric = Metric(right=_right(32))
    step, columns = 0.01, 1 / metric.lower.diagonal()
    expected = step**2 * (1 / 12 + 0.05**2)
    values = torch.randn(500, 32).double()
    codes = quantize(values, torch.full((500,), step), columns, metric.lower)
    error = (codes * step * columns - values) @ metric.lower
    assert error.square().mean(0) == pytest.approx(np.full(32, expected), rel=0.25)
    assert metric.cost(codes * step * columns - values) == pytest.approx(500 * 32 * expected, rel=0.03)


def test_values_beyond_the_largest_code_are_cut_to_it() -> None:
    codes = quantize(torch.tensor([[1e30, -1e30]]), torch.ones(1), torch.ones(2), None)
    assert codes.abs().max() < 1 << 24
    assert codes.tolist() == codes.int().tolist()


@given(st.integers(1, 9), st.integers(1, 200), st.integers(0, 1000))
def test_shrinking_keeps_the_trace_and_what_is_the_same_in_all_directions(width: int, samples: int, seed: int) -> None:
    moments = _right(width, seed=seed, samples=samples)
    found = shrunk(moments, samples)
    assert float(found.trace()) == pytest.approx(float(moments.trace()))
    torch.testing.assert_close(shrunk(torch.eye(width), samples), torch.eye(width))
    assert float((found - torch.eye(width)).norm()) <= float((moments - torch.eye(width)).norm()) * (1 + 1e-6)


def test_few_samples_are_brought_nearer_to_the_truth_and_many_are_left() -> None:
    far: dict[int, list[float]] = {}
    for samples in (2, 8, 32, 128, 100_000):
        for seed in range(20):
            draw = torch.Generator().manual_seed(seed)
            mixing = torch.randn(32, 32, generator=draw) * torch.logspace(0, -1, 32)
            x = torch.randn(samples, 32, generator=draw) @ mixing.T
            moments, truth = x.T @ x / samples, mixing @ mixing.T
            errors = [float((found - truth).norm()) for found in (shrunk(moments, samples), moments)]
            far.setdefault(samples, []).append(errors[0] / errors[1])
    means = {samples: sum(ratios) / len(ratios) for samples, ratios in far.items()}
    assert means[2] < 0.5 and means[8] < 0.7 and means[32] < 0.9 and means[128] < 1
    assert means[100_000] == pytest.approx(1, abs=0.01)
