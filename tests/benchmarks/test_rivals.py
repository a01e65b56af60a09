import math
from itertools import pairwise

import pytest
import torch
from codec_bound import bound_nbytes
from rivals import RIVALS, Matrices, compress, header_nbytes
from rivals_elementwise import bitdelta, bitdelta_masks, dare, deltazip, magnitude, rounding
from rivals_lowrank import deltamix, dqrelo, impart, ladder, lora
from torch import Tensor

LINEAR, WORDS = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture
def delta() -> Matrices:
    """Two matrices of 96 × 64: strong directions over noise."""
    return {name: _matrix(96, 64, seed) for seed, name in enumerate((WORDS, LINEAR))}


@pytest.fixture
def moments(delta: Matrices) -> Matrices:
    x = torch.randn(512, 16) @ torch.randn(16, 64) + 0.3 * torch.randn(512, 64)
    return dict.fromkeys(delta, x.T @ x / len(x))


def _matrix(d_out: int, d_in: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    strong = torch.randn(d_out, 3, generator=draw) @ torch.randn(3, d_in, generator=draw)
    return 0.01 * strong + 0.004 * torch.randn(d_out, d_in, generator=draw)


def _error(decoded: Matrices, delta: Matrices, moments: Matrices | None = None) -> float:
    error = norm = 0.0
    for name, matrix in delta.items():
        metric = torch.eye(matrix.shape[1]) if moments is None else moments[name]
        off = decoded[name] - matrix
        error += float((off @ metric * off).sum())
        norm += float((matrix @ metric * matrix).sum())
    return error / norm


@pytest.mark.parametrize("name", RIVALS)
def test_larger_files_of_a_rival_lose_less(name: str, delta: Matrices, moments: Matrices) -> None:
    rival = RIVALS[name]
    measured = []
    for setting in rival.settings:
        parts, nbytes = compress(rival, delta, moments, setting)
        decoded = {key: value.sum(0) if value.ndim == 3 else value for key, value in parts.items()}  # masks add up
        assert {key: value.shape for key, value in decoded.items()} == {key: m.shape for key, m in delta.items()}
        measured.append((nbytes, _error(decoded, delta, moments if rival.calibrated else None)))
    # A curve is the best of its settings, so it falls when the best of all lies at more bytes than the smallest.
    measured.sort()
    best = [min(error for nbytes, error in measured if nbytes <= size) for size, _ in measured]
    assert all(later <= earlier for earlier, later in pairwise(best))
    assert best[-1] < 0.7 * measured[0][1]


KNOWN = {
    # rank 4: 4 (96 + 64) numbers of 2 bytes, and 2 bytes for the rank
    "lora, bf16": (lora, (4, 16, "rank"), 4 * 160 * 2 + 2),
    # the same of 1 byte, with two scales of 2 bytes a direction
    "lora, int8": (lora, (4, 8, "rank"), 4 * (160 + 4) + 2),
    # rank 64 would be larger than the matrix, which is then stored itself
    "lora, dense": (lora, (64, 16, "rank"), 96 * 64 * 2),
    # a bit an entry and a scale of 2 bytes, twice
    "bitdelta": (bitdelta, (2, "mean"), 2 * (96 * 64 // 8 + 2)),
    # 3 bits an entry; for each of 96 rows and 2 groups a scale of 16 bits and a zero point of 3
    "rounding": (rounding, (3, 32), (96 * 64 * 3 + 96 * 2 * (16 + 3)) // 8),
    # sign bits and a scale; rank ceil(96 · 64 · 0.05 / 160) = 2 in bfloat16
    "dqrelo": (dqrelo, (0.05,), 96 * 64 // 8 + 2 + 2 * 160 * 2),
    # at 1 bit an entry, 2-bit directions cost (2 · 160 + 2 · (16 + 2)) / 8 = 44.5 bytes: 17 of them, padded
    # to bytes in each of four arrays, and 2 bytes for their number
    "ladder": (ladder, (1.0, "2:1", "rate"), sum((17 * n + 7) // 8 for n in (2 * 96, 2, 2 * 64, 2)) + 17 * 4 + 2),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_payload_is_as_long_as_counted_by_hand(name: str, delta: Matrices) -> None:
    code, knob, expected = KNOWN[name]
    _, sizes = code({LINEAR: delta[LINEAR]}, None, knob)
    assert sizes == {LINEAR: expected}


def test_random_masks_cost_only_their_values(delta: Matrices) -> None:
    decoded, sizes = dare(delta, None, (0.5, 16))
    assert sizes[LINEAR] == 8 + 2 * int((decoded[LINEAR] != 0).sum())
    kept = decoded[LINEAR] != 0
    torch.testing.assert_close(decoded[LINEAR][kept], 2 * delta[LINEAR][kept], rtol=0.01, atol=0)


def test_sparse_singular_vectors_cost_their_values_and_probabilities(delta: Matrices) -> None:
    _, sizes = impart({LINEAR: delta[LINEAR]}, None, (0.25, 0.5, 16))
    rank = 2 * 96 * 64 * 0.25 / 160  # at most this many half-empty directions
    assert 96 * 64 * 0.25 * 2 * 0.7 < sizes[LINEAR] < 96 * 64 * 0.25 * 2 * 1.2 + 2 * rank


def test_pruning_keeps_the_largest_entries(delta: Matrices) -> None:
    decoded, sizes = magnitude(delta, None, (0.1, 16, "matrix"))
    kept = decoded[LINEAR] != 0
    assert int(kept.sum()) == round(0.1 * 96 * 64)
    assert delta[LINEAR][kept].abs().min() >= delta[LINEAR][~kept].abs().max()
    entropy = -0.1 * math.log2(0.1) - 0.9 * math.log2(0.9)  # bits a place
    assert 1229 + 96 * 64 * entropy / 8 * 0.9 < sizes[LINEAR] < 1229 + 96 * 64 * entropy / 8 * 1.2


def test_masks_are_signs_and_add_up(delta: Matrices, moments: Matrices) -> None:
    for scale in ("mean", "fitted"):
        masks, _ = bitdelta_masks(delta, moments, (2, scale))
        assert masks[LINEAR].shape == (2, 96, 64)
        assert torch.equal(masks[LINEAR].sum(0), bitdelta(delta, moments, (2, scale))[0][LINEAR])
        assert [len(mask.abs().unique()) for mask in masks[LINEAR]] == [1, 1]
    published = bitdelta_masks(delta, moments, (1, "mean"))[0][LINEAR][0]
    assert torch.equal(
        published, delta[LINEAR].abs().mean().bfloat16().float() * torch.where(delta[LINEAR] < 0, -1.0, 1.0)
    )


def test_two_of_any_four_entries_are_kept(delta: Matrices, moments: Matrices) -> None:
    decoded, sizes = deltazip(delta, moments, (4, 32))
    assert bool(((decoded[LINEAR].reshape(-1, 4) != 0).sum(1) == 2).all())
    # three masks a byte, 4 bits for half of the entries, a scale of 2 bytes for 32 values; deflate may save some
    assert 0.8 < sizes[LINEAR] / (96 * 64 / 12 + 96 * 64 / 4 + 96 * 2 * 2) <= 1


def test_sparsegpt_spares_the_layers_output(delta: Matrices, moments: Matrices) -> None:
    blind, _ = deltazip(delta, None, (4, 32))
    seeing, _ = deltazip(delta, moments, (4, 32))
    assert _error(seeing, delta, moments) < 0.8 * _error(blind, delta, moments)


def test_a_mix_of_bits_beats_any_fixed_one_at_its_rate(delta: Matrices) -> None:
    mixed, mixed_sizes = deltamix(delta, None, (2.0, "matrix", False))
    for bits in (2, 3, 4, 5):
        fixed, fixed_sizes = ladder(delta, None, (2.1, f"{bits}:1", "rate"))
        assert sum(mixed_sizes.values()) <= sum(fixed_sizes.values())
        assert _error(mixed, delta) < _error(fixed, delta)


def test_words_kept_apart_are_rounded_to_their_own_bits(delta: Matrices) -> None:
    decoded, nbytes = compress(RIVALS["BitDelta"], delta, None, ((1,), "q4"))
    words = 96 * 64 // 2 + 96 * 2 + 96 // 2  # codes, and for each row a scale and a zero point
    assert nbytes == words + 96 * 64 // 8 + 2 + header_nbytes({WORDS: words, LINEAR: 96 * 64 // 8 + 2})
    assert _error({WORDS: decoded[WORDS]}, {WORDS: delta[WORDS]}) < 0.02


def test_bound_of_white_noise_is_the_gaussian_one() -> None:
    noise = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    norm = float(noise.square().sum())
    bits = 8 * bound_nbytes(noise, None, norm / 16)[1] / noise.numel()
    assert bits == pytest.approx(2.0, abs=0.02)  # 1/2 log2 16


def test_bound_of_one_direction_is_that_of_its_two_vectors() -> None:
    u, v = torch.randn(256, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 64)
    matrix = torch.outer(u / u.norm(), v / v.norm())
    # Each of 256 + 64 coefficients has distortion theta, so 320 theta = 0.01.
    theta = 0.01 / 320
    expected = 128 * math.log2(1 / 256 / theta) + 32 * math.log2(1 / 64 / theta)
    assert 8 * bound_nbytes(matrix, None, 0.01)[0] == pytest.approx(expected, rel=1e-3)


def test_bound_of_rows_is_half_the_log_of_the_metrics_determinant() -> None:
    draw = torch.Generator().manual_seed(2)
    noise = torch.randn(512, 16, generator=draw)
    metric = torch.diag(torch.logspace(-1, 1, 16))
    # All components are coded, so each has distortion theta and costs 1/2 log2(h / theta); log det H = 0.
    bits = 8 * bound_nbytes(noise, metric, 512 * 16 * 0.01)[1] / noise.numel()
    assert bits == pytest.approx(0.5 * math.log2(1 / 0.01), abs=0.02)
