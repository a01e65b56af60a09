import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftllm.compression.quantization import Factor, factor_nbytes, pack_factor, quantize_factor, unpack_factor

bands = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 5)), min_size=1, max_size=3).map(tuple)


def _inputs(dimensions: int, tokens: int = 200, seed: int = 0) -> torch.Tensor:
    """Inputs with strong correlations, as hidden states have; shape (tokens, dimensions)."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=draw) * torch.logspace(0, -2, dimensions)[:, None]
    return torch.randn(tokens, dimensions, generator=draw) @ mixing


@given(bands, st.integers(1, 70), st.integers(1, 40), st.integers(0, 99))
def test_a_packed_factor_comes_back(bands: tuple, length: int, group_size: int, seed: int) -> None:
    rank = sum(count for _, count in bands)
    rows = torch.randn(rank, length, generator=torch.Generator().manual_seed(seed))
    factor = quantize_factor(rows, bands, group_size)
    packed = pack_factor(factor, bands)
    assert packed.nbytes == factor_nbytes(length, bands, group_size)
    assert torch.equal(unpack_factor(packed, length, bands, group_size).values(), factor.values())


def test_groups_longer_than_a_row_take_no_more_memory_than_it() -> None:
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    long, just = (quantize_factor(rows, ((4, 3),), size) for size in (1 << 40, 40))  # padded, the first would not fit
    assert torch.equal(long.values(), just.values())


@given(st.integers(1, 8), st.integers(0, 99))
def test_rounding_errs_by_at_most_half_a_step(bits: int, seed: int) -> None:
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed))
    factor = quantize_factor(rows, ((bits, 3),), 16)
    step = factor.scales.float().repeat_interleave(16, dim=1)[:, :40]
    # Zero points are whole, which costs up to half a step at an end, and scales have 8 bits.
    assert bool(((factor.values() - rows).abs() <= step * 1.01 + 2**bits * step / 256).all())


def test_more_bits_err_less() -> None:
    rows = torch.randn(4, 256)
    errors = [float((quantize_factor(rows, ((bits, 4),), 128).values() - rows).norm()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * float(rows.norm())


def test_error_feedback_lowers_the_error_of_the_output() -> None:
    x = _inputs(64)
    rows = torch.randn(8, 64)
    hessian = x.T @ x / len(x)

    def output_error(factor: Factor) -> float:
        return float((x @ (factor.values() - rows).T).norm())

    plain = quantize_factor(rows, ((3, 8),), 64)
    fed_back = quantize_factor(rows, ((3, 8),), 64, hessian)
    assert output_error(fed_back) < 0.7 * output_error(plain)


def test_error_feedback_along_the_rank_lowers_the_error_of_the_output() -> None:
    z = _inputs(8)
    rows = torch.randn(8, 64)  # the transposed left factor: the output is rows.T @ z
    hessian = z.T @ z / len(z)

    def output_error(factor: Factor) -> float:
        return float((z @ (factor.values() - rows)).norm())

    plain = quantize_factor(rows, ((2, 8),), 64)
    fed_back = quantize_factor(rows, ((2, 8),), 64, hessian, along="rank")
    assert output_error(fed_back) < 0.8 * output_error(plain)


def test_blocks_of_columns_round_as_one_long_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftllm.compression import quantization

    x = _inputs(48)
    rows = torch.randn(4, 48)
    whole = quantize_factor(rows, ((3, 4),), 16, x.T @ x)
    monkeypatch.setattr(quantization, "_BLOCK", 7)
    assert float((quantize_factor(rows, ((3, 4),), 16, x.T @ x).codes != whole.codes).float().mean()) < 0.02


@pytest.mark.parametrize("hessian", [torch.zeros(16, 16), torch.ones(16, 16)])
def test_degenerate_inputs_still_round(hessian: torch.Tensor) -> None:
    rows = torch.randn(2, 16)
    values = quantize_factor(rows, ((8, 2),), 16, hessian).values()
    assert bool(torch.isfinite(values).all())


def test_constant_groups_are_kept() -> None:
    rows = torch.tensor([[0.0] * 8 + [3.0] * 8])
    values = quantize_factor(rows, ((4, 1),), 8).values()
    assert torch.equal(values[:, :8], torch.zeros(1, 8))
    assert torch.allclose(values[:, 8:], rows[:, 8:], rtol=0.01)


def test_a_factor_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 14 bytes of factor, found 5"):
        unpack_factor(np.zeros(5, np.uint8), 11, ((8, 1),), 16)
