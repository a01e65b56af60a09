import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftllm.compression import exact
from graftllm.compression.exact import Exact, encode_exact

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _bits(seed: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    raw = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@given(st.integers(0, 1000), st.integers(1, 50), st.sampled_from([*FLOATS, torch.int32, torch.uint8]))
def test_any_bit_pattern_comes_back(seed: int, count: int, dtype: torch.dtype) -> None:
    base, tuned = _bits(seed, count, dtype), _bits(seed + 1, count, dtype)
    operator, payload = encode_exact(base, tuned)
    assert _same_bits(operator.restore(payload, base), tuned)
    assert payload.nbytes <= tuned.nbytes


@given(st.integers(0, 1000), st.integers(-20, 20), st.integers(-6, 16), st.sampled_from(FLOATS[:3]))
def test_values_of_any_size_come_back_from_their_cells(seed: int, octave: int, above: int, dtype: torch.dtype) -> None:
    """Also the largest and the smallest, and those that cross exponents."""
    draw, limits = torch.Generator().manual_seed(seed), torch.finfo(dtype)
    middle = 0 if dtype == torch.float16 else 5 * octave
    base, step = (torch.randn(40, 5, generator=draw).double() * 2.0**middle * 2.0**more for more in (above, 0))
    base = base.clamp(limits.min, limits.max).to(dtype)
    tuned = (base.double() + step).clamp(limits.min, limits.max).to(dtype)
    tuned[0, :4] = torch.tensor([limits.max, limits.min, limits.smallest_normal / 2, -0.0]).to(dtype)
    coded = exact._predict(base, tuned)
    if coded is not None:  # codes of a step across all exponents may be too large
        assert _same_bits(coded[0].restore(coded[1], base), tuned)


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values_and_shapes_come_back(dtype: torch.dtype) -> None:
    base = torch.tensor([[0.0, -0.0, 1.0], [float("inf"), -1.0, 1e-30]]).to(dtype)
    tuned = torch.tensor([[-0.0, 0.0, float("-inf")], [1.0, float("nan"), -1e-30]]).to(dtype)
    operator, payload = encode_exact(base, tuned)
    assert _same_bits(operator.restore(payload, base), tuned)


def test_a_scalar_comes_back() -> None:
    operator, payload = encode_exact(torch.tensor(1.0), torch.tensor(2.0))
    assert operator.restore(payload, torch.tensor(1.0)) == 2.0


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("count", [1, 10, 100, 3000, 30_000])
def test_few_changed_bits_take_about_their_information(count: int, dtype: torch.dtype) -> None:
    """Which values changed, and for each whether it went up or down: as after a step of preference tuning."""
    draw = torch.Generator().manual_seed(count)
    base = torch.randn(256, 256, generator=draw).to(dtype)
    bits = base.flatten().view(torch.int32 if dtype == torch.float32 else torch.int16).clone()
    here = torch.randperm(len(bits), generator=draw)[:count]
    bits[here] += (2 * torch.randint(0, 2, (count,), generator=draw) - 1).to(bits.dtype)
    tuned = bits.view(dtype).reshape(256, 256)
    operator, payload = encode_exact(base, tuned)
    assert _same_bits(operator.restore(payload, base), tuned)
    total, changed, left = (math.lgamma(n + 1) / math.log(2) for n in (len(bits), count, len(bits) - count))
    assert payload.nbytes <= 1.03 * (total - changed - left + count) / 8 + 24


@pytest.mark.parametrize("above", [1.0, 3.0, 10.0, 40.0])
def test_gaussian_steps_take_their_entropy(above: float) -> None:
    """Whether base values are near zero, measured by the step's spread, or far from it."""
    draw = torch.Generator().manual_seed(0)
    base = (above * torch.randn(200, 500, generator=draw)).bfloat16()
    tuned = (base.double() + torch.randn(200, 500, generator=draw).double()).bfloat16()
    _, payload = encode_exact(base, tuned)
    octaves = torch.frexp(tuned.double())[1] - 8  # by which the values around are apart
    entropy = 0.5 * math.log2(2 * math.pi * math.e) - float(octaves.double().mean())
    assert payload.nbytes * 8 / base.numel() < entropy + 0.05


def test_delta_is_the_difference() -> None:
    base, tuned = torch.randn(20).bfloat16(), torch.randn(20).bfloat16()
    operator, payload = encode_exact(base, tuned)
    assert torch.equal(operator.delta(payload, base), tuned.float() - base.float())


def test_raw_bytes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 8 raw bytes, found 7"):
        Exact(coding="raw").restore(np.zeros(7, np.uint8), torch.zeros(2))
