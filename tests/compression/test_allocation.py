import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graftllm.compression.allocation import (
    BITS_WORTH,
    Choice,
    Coded,
    Offer,
    choices,
    encode_as,
    likely,
    select,
    step_for,
)
from graftllm.compression.elementwise import encode_elementwise
from graftllm.compression.factored import encode_factored, encode_hybrid, weighted_svd
from graftllm.compression.matrix import Source
from graftllm.compression.metric import Metric
from graftllm.compression.outlook import Outlook, outlook

PLAIN = Metric()


def _source(matrix: Tensor) -> Source:
    return Source((matrix.shape[0], matrix.shape[1]), lambda start, stop: matrix[start:stop], matrix.device)


def _matrix(kind: str, rows: int = 96, columns: int = 128) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    noise = torch.randn(rows, columns, generator=draw)
    strong = torch.randn(rows, 4, generator=draw) @ torch.randn(4, columns, generator=draw)
    return {"noise": noise, "low rank": strong, "both": strong + 0.3 * noise}[kind].double()


def _metric(rows: int, columns: int) -> Metric:
    draw = torch.Generator().manual_seed(8)
    inputs = torch.randn(2 * columns, columns, generator=draw).double() * torch.logspace(-1, 1, columns).double()
    moments, weights = inputs.T @ inputs, torch.logspace(-1, 1, rows).double()
    return Metric(3.0, weights / weights.mean(), moments / moments.diagonal().mean())


def _real(matrix: Tensor, metric: Metric, choice: Choice, step: float) -> tuple[int, float]:
    """Bytes and cost of a choice."""
    source = _source(matrix)
    if choice.kind == "elementwise":
        operator, payload = encode_elementwise(source.read, source.shape, step, metric)
    else:
        directions = weighted_svd(matrix, metric, choice.rank)[1:]
        encode = encode_factored if choice.kind == "factored" else encode_hybrid
        operator, payload = encode(matrix, step, metric, directions)
    return len(payload), metric.cost(operator.matrix(payload, source.shape).double() - matrix)


@pytest.mark.parametrize("kind", ["noise", "low rank", "both"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_bytes_and_cost_are_foreseen(kind: str, calibrated: bool, share: float) -> None:
    matrix = _matrix(kind)
    metric = _metric(96, 128) if calibrated else PLAIN
    known = outlook(_source(matrix), metric)
    step = share * math.sqrt(known.energy / matrix.numel())
    for choice in choices(known, step):
        if choice.kind == "zero":
            assert choice.cost == pytest.approx(metric.cost(matrix))
            continue
        size, cost = _real(matrix, metric, choice, step)
        assert size / 1.35 < choice.bits / 8 < 1.35 * size
        if choice.kind == "elementwise" or (choice.kind == "factored" and choice.rank < 20):
            assert cost / 1.35 < choice.cost < 1.35 * cost


@pytest.mark.parametrize("kind", ["noise", "low rank", "both"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_larger_step_is_hardly_ever_foreseen_to_take_more_bits(kind: str, calibrated: bool) -> None:
    known = outlook(_source(_matrix(kind)), _metric(96, 128) if calibrated else PLAIN)
    bits = [choices(known, 2.0 ** (place / 4))[0].bits for place in range(-60, 20)]
    assert all(larger <= 1.05 * smaller for smaller, larger in pairwise(bits))  # weak directions come all at once
    assert bits[-1] == 0


@given(st.floats(2_000, 200_000))
def test_the_step_for_some_bits_takes_just_these(bits: float) -> None:
    outlooks = _outlooks()
    step = step_for([(one, None) for one in outlooks], bits)
    taken = [sum(choices(one, at)[0].bits for one in outlooks) for at in (step, step / 1.01)]
    assert taken[0] <= bits < taken[1]


def _outlooks() -> list[Outlook]:
    if not _KNOWN:
        _KNOWN.extend(outlook(_source(_matrix(kind)), metric) for kind in ("noise", "both") for metric in _METRICS)
        _KNOWN.append(outlook(_source(torch.zeros(5, 5)), PLAIN))
    return _KNOWN


_KNOWN: list[Outlook] = []
_METRICS = (PLAIN, _metric(96, 128))


def test_strong_directions_are_told_from_noise() -> None:
    for kind, best in (("noise", "elementwise"), ("both", "hybrid")):
        matrix = _matrix(kind)
        known = outlook(_source(matrix), PLAIN)
        assert choices(known, 0.1)[0].kind == best
        found = _cheapest(matrix, PLAIN, known, 0.1)
        assert found is not None
        assert found.operator.operator == best
    low = _matrix("low rank")
    found = _cheapest(low, PLAIN, outlook(_source(low), PLAIN), 0.3)
    assert found is not None
    assert found.operator.operator == "factored"


def _cheapest(matrix: Tensor, metric: Metric, known: Outlook, step: float) -> Coded | None:
    """Return the best of what is tried; None where the matrix is better left out."""
    found = [encode_as(kind, _source(matrix), metric, known, step) for kind in likely(known, step)]
    worth = 8 * BITS_WORTH * step**2
    priced = [(one.cost + worth * len(one.payload), number) for number, one in enumerate(found) if one is not None]
    price, number = min(priced, default=(math.inf, 0))
    return found[number] if price < known.energy else None


@pytest.mark.parametrize("kind", ["noise", "low rank", "both"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_coded_is_worth_its_bytes(kind: str, calibrated: bool) -> None:
    matrix = _matrix(kind)
    metric = _metric(96, 128) if calibrated else PLAIN
    known = outlook(_source(matrix), metric)
    for place in range(-6, 6):
        step = 2.0**place
        found = _cheapest(matrix, metric, known, step)
        if found is None:
            continue
        decoded = found.operator.matrix(found.payload, (96, 128)).double()
        assert found.cost == pytest.approx(metric.cost(decoded - matrix), rel=1e-4)
        assert found.error == pytest.approx(float((decoded - matrix).norm() / matrix.norm()), rel=1e-4)
        assert found.cost + BITS_WORTH * step**2 * 8 * len(found.payload) < known.energy


def test_what_did_not_change_is_left_out() -> None:
    known = outlook(_source(torch.zeros(8, 8)), PLAIN)
    assert known.energy == 0
    assert _cheapest(torch.zeros(8, 8), PLAIN, known, 0.1) is None


def test_a_few_changed_rows_are_foreseen() -> None:
    matrix = torch.zeros(4000, 32).double()
    matrix[torch.randperm(4000)[:40]] = torch.randn(40, 32).double()
    known = outlook(_source(matrix), PLAIN)
    for step in (0.03, 0.3):
        choice = next(choice for choice in choices(known, step) if choice.kind == "elementwise")
        size, cost = _real(matrix, PLAIN, choice, step)
        assert size / 1.5 < (choice.bits / 8) < 3 * size
        assert cost / 2 < choice.cost < 2 * cost
    assert _cheapest(matrix, PLAIN, known, 1.0) is not None  # at two bits an entry, of 40 rows


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 0.9)), max_size=3), min_size=1, max_size=3),
    st.floats(0.001, 1),
)
def test_where_every_byte_saves_as_much_what_is_selected_costs_least(
    coded: list[list[tuple[int, float]]], worth: float
) -> None:
    offers = [[Offer(0, 1.0), *(Offer(*one) for one in some)] for some in coded]
    best = [min(some, key=lambda one: (one.cost + worth * one.nbytes, one.nbytes)) for some in offers]
    room, least = sum(one.nbytes for one in best), sum(one.cost for one in best)
    numbers, saved = select(offers, room)
    chosen = [some[at] for some, at in zip(offers, numbers, strict=True)]
    assert sum(one.nbytes for one in chosen) <= room
    assert sum(one.cost for one in chosen) == pytest.approx(least)
    assert saved <= worth * (1 + 1e-9)


def test_what_saves_most_a_byte_is_selected_first() -> None:
    offers = [[Offer(0, 9.0), Offer(10, 4.0), Offer(30, 1.0)], [Offer(0, 9.0), Offer(10, 1.0), Offer(12, 0.9)]]
    assert select(offers, 9) == ([0, 0], 0.8)
    assert select(offers, 10) == ([0, 1], 0.5)
    assert select(offers, 20) == ([1, 1], 0.15)
    assert select(offers, 22) == ([1, 2], 0.15)
    assert select(offers, 42) == ([2, 2], 0.0)
