import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftllm.compression import lowrank
from graftllm.compression.lowrank import (
    LowRank,
    encode_lowrank,
    leading_svd,
    lowrank_nbytes,
    rank_for_energy,
    singular_values,
    truncated_svd,
    whole_bands,
)

EIGHT_BITS = ((8, 1.0),)


def _decaying(d_out: int, d_in: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    rank = min(d_out, d_in)
    u = torch.linalg.qr(torch.randn(d_out, rank, generator=draw)).Q
    v = torch.linalg.qr(torch.randn(d_in, rank, generator=draw)).Q
    return u * torch.logspace(0, -3, rank) @ v.T


@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 99), st.data())
def test_truncation_error_equals_dropped_singular_values(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    rank = data.draw(st.integers(1, min(rows, columns)))
    u, s, vh = truncated_svd(matrix, rank)
    dropped = singular_values(matrix)[rank:]
    assert float((matrix - u * s @ vh).norm()) == pytest.approx(float(dropped.norm()), abs=1e-4)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("rank", [4, 40])
def test_large_matrices_give_nearly_the_best_truncation(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], rank: int
) -> None:
    matrix = _decaying(*shape)
    best = float(torch.linalg.svdvals(matrix)[rank:].norm())
    monkeypatch.setattr(lowrank, "_SMALL", 10)
    u, s, vh = truncated_svd(matrix, rank)
    assert (tuple(u.shape), tuple(s.shape), tuple(vh.shape)) == ((shape[0], rank), (rank,), (rank, shape[1]))
    assert float((matrix - u * s @ vh).norm()) <= 1.02 * best + 1e-5
    assert torch.allclose(singular_values(matrix), torch.linalg.svdvals(matrix), atol=2e-3)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("small", [10, 1000])
def test_the_leading_directions_keep_the_energy_and_no_more(
    monkeypatch: pytest.MonkeyPatch, energy: float, small: int
) -> None:
    """With a small limit the certified randomised way is taken, with a large one the whole decomposition."""
    matrix = _decaying(80, 120)
    monkeypatch.setattr(lowrank, "_SMALL", small)
    monkeypatch.setattr(lowrank, "_FIRST_RANK", 2)
    u, s, vh = leading_svd(matrix, energy)
    kept = 1 - float((matrix - u * s @ vh).norm() ** 2 / matrix.norm() ** 2)
    assert kept >= energy - 1e-5
    assert len(s) <= rank_for_energy(torch.linalg.svdvals(matrix), energy) + 1


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_rank_is_the_smallest_that_keeps_the_energy(values: list[float], energy: float) -> None:
    spectrum = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = rank_for_energy(spectrum, energy)
    kept = spectrum.square().cumsum(0)
    assert 1 <= rank <= len(values)
    assert kept[rank - 1] >= energy * kept[-1] * (1 - 1e-9)
    if rank > 1:
        assert kept[rank - 2] < energy * kept[-1]


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.5])
def test_energy_outside_its_range_is_refused(energy: float) -> None:
    with pytest.raises(ValueError, match=r"energy: expected a share in \(0, 1\]"):
        rank_for_energy(torch.ones(3), energy)


@given(st.integers(1, 2000))
def test_bands_sum_to_the_rank(rank: int) -> None:
    bands = whole_bands(rank, ((8, 0.02), (4, 0.18), (2, 0.80)))
    assert sum(count for _, count in bands) == rank
    assert [bits for bits, _ in bands] == sorted((bits for bits, _ in bands), reverse=True)
    assert all(count > 0 for _, count in bands)


@given(st.integers(2, 40), st.integers(2, 40), st.data())
def test_size_is_known_beforehand(rows: int, columns: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    bit_bands = ((8, 0.1), (3, 0.9))
    operator, payload = encode_lowrank(truncated_svd(torch.randn(rows, columns), rank), bit_bands, 16, None)
    assert payload.nbytes == lowrank_nbytes((rows, columns), rank, bit_bands, 16)
    assert operator.rank == rank


def test_full_rank_at_eight_bits_is_nearly_exact() -> None:
    delta = _decaying(40, 60)
    operator, payload = encode_lowrank(truncated_svd(delta, 40), EIGHT_BITS, 64, None)
    assert float((operator.delta(payload, delta) - delta).norm() / delta.norm()) < 0.02


def test_calibration_lowers_the_error_of_the_output() -> None:
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(96, 96, generator=draw) * torch.logspace(0, -2, 96)[:, None]
    x = torch.randn(500, 96, generator=draw) @ mixing  # strongly correlated, as hidden states are
    delta = _decaying(64, 96)
    errors = {}
    for name, hessian in (("plain", None), ("calibrated", x.T @ x / 500)):
        operator, payload = encode_lowrank(truncated_svd(delta, 32), ((8, 0.05), (3, 0.95)), 32, hessian)
        errors[name] = float((x @ (operator.delta(payload, delta) - delta).T).norm())
    assert errors["calibrated"] < 0.8 * errors["plain"]


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        (((9, 1),), "bands of 1 to 8 bits"),
        (((0, 1),), "bands of 1 to 8 bits"),
        (((8, 0),), "rank of 1 to 10"),
        (((8, 11),), "rank of 1 to 10"),
        (((8, 3),), "bytes of factor"),
    ],
)
def test_a_payload_that_does_not_fit_is_refused(bands: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRank(bands=bands, group_size=16).delta(np.zeros(50, np.uint8), torch.zeros(10, 20))


def test_a_huge_claimed_rank_allocates_nothing() -> None:
    with pytest.raises(ValueError, match="rank of 1 to 10"):
        LowRank(bands=((8, 10**15),), group_size=1).delta(np.zeros(50, np.uint8), torch.zeros(10, 20))
