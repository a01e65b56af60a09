from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from graftllm.compression.elementwise import Elementwise, encode_elementwise
from graftllm.compression.factored import Factored, Hybrid, encode_factored, encode_hybrid, weighted_svd
from graftllm.compression.matrix import matrix_shape
from graftllm.compression.metric import Metric

Encoded = tuple[Elementwise | Factored | Hybrid, np.ndarray]
PLAIN = Metric()


def _low_rank(rows: int, columns: int, rank: int) -> Tensor:
    return (torch.randn(rows, rank) @ torch.randn(rank, columns)).double()


def _metric(rows: int, columns: int) -> Metric:
    inputs = torch.randn(100, columns).double() * torch.logspace(-1, 1, columns).double()
    moments = inputs.T @ inputs
    weights = torch.logspace(-1, 1, rows).double()
    return Metric(3.0, weights / weights.mean(), moments / moments.diagonal().mean())


def _encode(kind: str, matrix: Tensor, step: float, metric: Metric = PLAIN, rank: int | None = None) -> Encoded:
    shape = (matrix.shape[0], matrix.shape[1])
    if kind == "elementwise":
        return encode_elementwise(lambda start, stop: matrix[start:stop], shape, step, metric)
    directions = weighted_svd(matrix, metric, min(shape) if rank is None else rank)[1:]
    found = (encode_factored if kind == "factored" else encode_hybrid)(matrix, step, metric, directions)
    assert found is not None
    return found


def _cost(encoded: Encoded, matrix: Tensor, metric: Metric = PLAIN) -> float:
    operator, payload = encoded
    return metric.cost(operator.matrix(payload, (matrix.shape[0], matrix.shape[1])).double() - matrix)


@pytest.mark.parametrize("kind", ["factored", "hybrid"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_error_falls_with_the_step(kind: str, calibrated: bool) -> None:
    matrix = _low_rank(40, 30, 4)
    metric = _metric(40, 30) if calibrated else PLAIN
    coded = [_encode(kind, matrix, step, metric, 4) for step in (1.0, 0.3, 0.1, 0.03, 0.01)]
    costs, sizes = [_cost(one, matrix, metric) for one in coded], [one[1].nbytes for one in coded]
    assert all(finer < 0.3 * coarser for coarser, finer in pairwise(costs))
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("kind", ["elementwise", "factored", "hybrid"])
def test_matrix_and_metric_may_differ_in_precision(kind: str) -> None:
    """A matrix of many rows is calculated with in float32, the moments of a few columns in float64; GPT-2 has both."""
    matrix, metric = _low_rank(40, 30, 4), _metric(40, 30)
    rows, right = metric.rows, metric.right
    assert rows is not None
    assert right is not None
    coarse = Metric(metric.scale, rows.float(), right.float())
    costs = [
        _cost(_encode(kind, matrix.to(dtype), 0.1, given, 4), matrix, metric)
        for dtype, given in ((torch.float64, metric), (torch.float32, metric), (torch.float64, coarse))
    ]
    assert costs[1:] == pytest.approx([costs[0]] * 2, rel=0.1)


@pytest.mark.parametrize("kind", ["elementwise", "factored", "hybrid"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_fine_steps_give_the_matrix_back(kind: str, calibrated: bool) -> None:
    matrix = _low_rank(24, 16, 3)
    metric = _metric(24, 16) if calibrated else PLAIN
    operator, payload = _encode(kind, matrix, 1e-4, metric, 3)
    found = operator.matrix(payload, (24, 16)).double()
    assert float((found - matrix).norm() / matrix.norm()) < 1e-3


@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-3, 0.5), st.booleans())
def test_it_decodes_to_the_product_of_its_factors(rows: int, columns: int, step: float, calibrated: bool) -> None:
    matrix = 4 * torch.randn(rows, columns).double()
    metric = _metric(rows, columns) if calibrated else PLAIN
    directions = weighted_svd(matrix, metric, min(rows, columns))[1:]
    encoded = encode_factored(matrix, step, metric, directions)
    if encoded is None:
        return
    operator, payload = encoded
    left, right = operator.factors(payload, (rows, columns))
    assert (left.shape, right.shape) == ((rows, operator.rank), (operator.rank, columns))
    assert torch.equal(operator.matrix(payload, (rows, columns)), left @ right)


def test_a_low_rank_matrix_is_cheaper_factored_and_noise_is_cheaper_by_entry() -> None:
    for matrix, better, worse in (
        (_low_rank(96, 96, 4), "factored", "elementwise"),
        (torch.randn(96, 96).double(), "elementwise", "factored"),
    ):
        first, second = (_encode(kind, matrix, 0.3, rank=4 if better == "factored" else 96) for kind in (better, worse))
        assert first[1].nbytes < 0.8 * second[1].nbytes
        assert _cost(first, matrix) < 1.2 * _cost(second, matrix)


def _bytes_at_cost(kind: str, matrix: Tensor, aim: float, rank: int) -> float:
    """Bytes at a cost, between those of steps of an eighth of an octave."""
    points = []
    for step in 2.0 ** np.arange(-4, 1.5, 0.125):
        encoded = _encode(kind, matrix, float(step), rank=rank)
        points.append((np.log(_cost(encoded, matrix)), encoded[1].nbytes))
    costs, sizes = zip(*sorted(points), strict=True)
    return float(np.interp(np.log(aim), costs, sizes))


def test_hybrid_beats_both_of_its_parts_on_spikes_and_noise() -> None:
    matrix = 4 * _low_rank(96, 96, 2) + torch.randn(96, 96).double()
    sizes = {
        kind: _bytes_at_cost(kind, matrix, 96 * 96 * 0.02, rank)
        for kind, rank in (("elementwise", 0), ("factored", 96), ("hybrid", 2))
    }
    assert sizes["hybrid"] < 0.9 * sizes["elementwise"]
    assert sizes["hybrid"] < 0.9 * sizes["factored"]


def test_the_metric_lowers_the_cost_at_the_same_size() -> None:
    metric, matrix = _metric(96, 128), _low_rank(96, 128, 16)
    blind = _encode("factored", matrix, 0.5, rank=16)
    steps = [0.1 * 1.1**i for i in range(40)]
    coded = (_encode("factored", matrix, step, metric, 16) for step in steps)
    fit = next(one for one in coded if len(one[1]) <= len(blind[1]))
    assert _cost(fit, matrix, metric) < 0.7 * _cost(blind, matrix, metric)


def test_directions_that_round_to_zero_are_left_out() -> None:
    strong, weak = _low_rank(30, 20, 2), 1e-3 * torch.randn(30, 20).double()
    assert _encode("factored", strong + weak, 0.5)[0].rank == 2
    directions = weighted_svd(weak, PLAIN, 20)[1:]
    assert encode_factored(weak, 0.5, PLAIN, directions) is None
    assert encode_hybrid(weak, 0.5, PLAIN, directions) is None


@pytest.mark.parametrize("kind", ["factored", "hybrid"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 3, 2, 2), (3, 8, 4), (5,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_restoring_adds_the_delta_to_the_base(kind: str, shape: tuple[int, ...], transposed: bool) -> None:
    base, wanted = torch.randn(shape).bfloat16(), torch.randn(shape)
    matrix = wanted.reshape(matrix_shape(shape)).double()
    operator, payload = _encode(kind, matrix.T if transposed else matrix, 1e-3)
    operator = operator.model_copy(update={"transposed": transposed})
    delta = operator.delta(payload, base)
    assert (delta.shape, delta.dtype) == (base.shape, torch.float32)
    assert torch.allclose(delta, wanted, atol=0.01)
    assert torch.equal(operator.restore(payload, base), (base.float() + delta).bfloat16())


def test_payloads_of_another_shape_are_refused() -> None:
    for kind in ("factored", "hybrid"):
        operator, payload = _encode(kind, torch.randn(6, 4).double(), 0.01)
        for shape in ((4, 6), (6, 5), (5, 4), (3, 4), (0, 0)):
            with pytest.raises(ValueError, match="expected"):
                operator.matrix(payload, shape)
        for changed in (payload[:-1], np.append(payload, payload[:1]), payload[:0]):
            with pytest.raises(ValueError, match="expected"):
                operator.matrix(changed, (6, 4))


def test_a_part_of_a_hybrid_is_not_transposed_by_itself() -> None:
    operator, _ = _encode("hybrid", torch.randn(6, 4).double(), 0.01)
    told = operator.model_dump()
    told["strong"]["transposed"] = True
    with pytest.raises(ValidationError, match="expected the field 'transposed' on the whole, found it on a part"):
        Hybrid(**told)
