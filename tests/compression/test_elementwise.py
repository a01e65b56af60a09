import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from graftllm.compression import elementwise
from graftllm.compression.elementwise import Elementwise, Grid, encode_elementwise, grid_for
from graftllm.compression.matrix import matrix_shape
from graftllm.compression.metric import Metric


def _encode(matrix: Tensor, step: float, metric: Metric = Metric()) -> tuple[Elementwise, np.ndarray]:  # noqa: B008
    def read(start: int, stop: int) -> Tensor:
        return matrix[start:stop]

    return encode_elementwise(read, (matrix.shape[0], matrix.shape[1]), step, metric)


def _metric(rows: int, columns: int) -> Metric:
    inputs = torch.randn(100, columns).double() * torch.logspace(-2, 2, columns).double()
    moments = inputs.T @ inputs
    weights = torch.logspace(-2, 2, rows).double()
    return Metric(3.0, weights / weights.mean(), moments / moments.diagonal().mean())


@given(st.integers(1, 9), st.integers(1, 9), st.floats(1e-4, 10), st.booleans())
def test_it_decodes_to_the_multiples_that_the_encoder_chose(
    rows: int, columns: int, step: float, calibrated: bool
) -> None:
    matrix = torch.randn(rows, columns).double()
    metric = _metric(rows, columns) if calibrated else Metric()
    operator, payload = _encode(matrix, step, metric)
    grid = grid_for(metric, step, (rows, columns))
    expected = grid.values(grid.codes(matrix, metric).float())
    assert torch.equal(operator.matrix(payload, (rows, columns)), expected)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(1e-4, 10))
def test_no_entry_is_off_by_more_than_is_rounded_outward(rows: int, columns: int, step: float) -> None:
    matrix = torch.randn(rows, columns)
    operator, payload = _encode(matrix, step)
    off = (operator.matrix(payload, (rows, columns)) - matrix).abs()
    assert float(off.max()) <= operator.step * 0.5501 + 1e-6


def test_every_row_and_column_costs_a_twelfth_of_the_squared_step() -> None:
    metric, matrix = _metric(64, 48), torch.randn(64, 48).double()
    operator, payload = _encode(matrix, 0.01, metric)
    error = operator.matrix(payload, (64, 48)).double() - matrix
    assert metric.cost(error) == pytest.approx(64 * 48 * 0.01**2 / 12, rel=0.25)  # half octaves round steps
    per_row = torch.stack([torch.tensor(metric.of_rows(torch.tensor([i])).cost(error[i : i + 1])) for i in range(64)])
    assert float(per_row.max() / per_row.min()) < 6  # weights differ by 10,000; half octaves and chance remain


def test_the_metric_lowers_the_cost_at_the_same_size() -> None:
    metric, matrix = _metric(64, 48), torch.randn(64, 48).double()
    blind_operator, blind = _encode(matrix, 0.5)
    blind_cost = metric.cost(blind_operator.matrix(blind, (64, 48)).double() - matrix)
    steps = [0.1 * 1.2**i for i in range(40)]
    fit = next(found for step in steps if (found := _encode(matrix, step, metric))[1].nbytes <= blind.nbytes)
    assert metric.cost(fit[0].matrix(fit[1], (64, 48)).double() - matrix) < 0.3 * blind_cost


def test_blocks_of_rows_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    metric, matrix = _metric(20, 10), torch.randn(20, 10).double()
    whole = _encode(matrix, 0.1, metric)
    decoded = whole[0].matrix(whole[1], (20, 10))
    monkeypatch.setattr(elementwise, "BLOCK", 70)
    parts = _encode(matrix, 0.1, metric)
    assert (whole[0].height, parts[0].height) == ((1 << 24) // 10, 7)
    assert [start for start, _ in parts[0].blocks(parts[1], (20, 10))] == [0, 7, 14]
    assert torch.equal(parts[0].matrix(parts[1], (20, 10)), decoded)


def test_rows_that_did_not_change_cost_almost_nothing() -> None:
    few, many = torch.randn(16, 64), torch.zeros(4096, 64)
    many[::256] = few
    assert _encode(many, 0.1)[1].nbytes < _encode(few, 0.1)[1].nbytes + 4096 * 0.3 / 8


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 2, 2), (5,), ()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_restoring_adds_the_delta_to_the_base(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool) -> None:
    base, wanted = torch.randn(shape).to(dtype), torch.randn(shape)
    matrix = wanted.reshape(matrix_shape(shape))
    operator, payload = _encode(matrix.T if transposed else matrix, 0.01)
    operator = operator.model_copy(update={"transposed": transposed})
    delta = operator.delta(payload, base)
    assert (delta.shape, delta.dtype) == (base.shape, torch.float32)
    assert torch.allclose(delta, wanted, atol=0.0051)
    before = base.clone()
    restored = operator.restore(payload, base)
    assert restored.dtype == dtype
    assert torch.equal(restored, (base.float() + delta).to(dtype))
    assert torch.equal(base, before)


def test_a_base_that_is_a_view_is_restored_as_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "BLOCK", 8)
    operator, payload = _encode(torch.randn(6, 4), 0.1)
    base = torch.randn(4, 6).T
    assert torch.equal(operator.restore(payload, base), operator.restore(payload, base.contiguous()))


@pytest.mark.parametrize("field", [{"step": 0.0}, {"step": float("nan")}, {"step": float("inf")}, {"height": 0}])
def test_impossible_fields_are_refused(field: dict) -> None:
    with pytest.raises(ValidationError):
        Elementwise(**{"step": 0.1, "slope": 0, "height": 4} | field)


def test_blocks_that_a_stranger_made_large_are_refused() -> None:
    operator, payload = _encode(torch.randn(6, 4), 0.1)
    with pytest.raises(ValueError, match=r"expected blocks of at most 4194304 rows, found 4194305"):
        operator.model_copy(update={"height": (1 << 22) + 1}).matrix(payload, (6, 4))


def test_payloads_of_another_shape_are_refused() -> None:
    operator, payload = _encode(torch.randn(6, 4), 0.1)
    for shape in ((4, 6), (6, 5), (7, 4), (5, 4), (0, 4)):
        with pytest.raises(ValueError, match="expected"):
            operator.matrix(payload, shape)
    for changed in (payload[:-1], np.append(payload, payload[:1]), payload[:3], payload[:0]):
        with pytest.raises(ValueError, match="expected"):
            operator.matrix(changed, (6, 4))


@pytest.mark.parametrize("exponent", [-(1 << 29), 1 << 29])
def test_exponents_whose_tables_would_wrap_are_not_read_as_small_ones(exponent: int) -> None:
    codes = torch.randint(-9, 10, (6, 4), generator=torch.Generator().manual_seed(0)).to(torch.int32).numpy()
    grid = Grid(0.1, np.zeros(6, np.int32), np.full(4, exponent, np.int32))
    payload = grid.payload(codes, 0)  # as if 8 * exponent were 0
    with pytest.raises(ValueError, match="expected"):
        Elementwise(step=0.1, slope=8, height=6).matrix(payload, (6, 4))
