"""Rivals that decompose a delta: LoRA extraction, bit ladders, DeltaMix, ImPart, D-QReLO.

Each function takes matrices, second moments or None, and a knob, and returns decoded matrices and
payload bytes by name. Sizes are those of arrays that are packed here, or counts times width where
the array would be plain.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from graftllm.compression.lowrank import encode_lowrank, lowrank_nbytes, rank_for_energy
from graftllm.compression.matrix import matrix_shape
from graftllm.compression.quantization import factor_nbytes, pack_factor, quantize_factor

Matrices = Mapping[str, Tensor]
Coded = tuple[dict[str, Tensor], dict[str, int]]
GROUP = 128
_COUNT_NBYTES = 2  # a rank, or a number of directions


def lora(delta: Matrices, moments: Matrices | None, knob: tuple[int, int, str]) -> Coded:
    """Keep the leading singular directions, as U sqrt(S) and sqrt(S) V^T.

    Args:
        delta: matrices, as everywhere here.
        moments: not used.
        knob: mean rank; 16 for bfloat16, or 8 for int8 with a scale for each vector; `rank` for the same
            rank everywhere, `energy` for one threshold on energy per number, with as many numbers in all.
    """
    rank, bits, share = knob
    ranks = dict.fromkeys(delta, rank)
    if share == "energy":
        numbers = sum(min(rank, *matrix.shape) * sum(matrix.shape) for matrix in delta.values())

        def size(threshold: float) -> int:
            return sum(_above(matrix, threshold) * sum(matrix.shape) for matrix in delta.values())

        threshold = smallest(lambda log: size(math.exp(log)) <= numbers, -60.0, 20.0)
        ranks = {name: _above(matrix, math.exp(threshold)) for name, matrix in delta.items()}
    decoded, sizes = {}, {}
    for name, matrix in delta.items():
        u, s, vh = (part[..., : ranks[name]] if part.ndim == 1 else part for part in svd(matrix))
        left, right = u[:, : len(s)] * s.sqrt(), s.sqrt()[:, None] * vh[: len(s)]
        width = bits // 8 * sum(matrix.shape) + (4 if bits == 8 else 0)  # of one direction, in bytes
        if width * len(s) >= 2 * matrix.numel():
            decoded[name], sizes[name] = matrix.bfloat16().float(), 2 * matrix.numel()
            continue
        decoded[name] = _stored(left.T, bits).T @ _stored(right, bits)
        sizes[name] = _COUNT_NBYTES + width * len(s)
    return decoded, sizes


def ladder(delta: Matrices, moments: Matrices | None, knob: tuple[float, str, str]) -> Coded:
    """Keep leading directions, the stronger ones at more bits, by GPTQ where there are moments.

    Args:
        delta: matrices.
        moments: of their inputs; without them codes are rounded to nearest.
        knob: bits per parameter; bits and shares of the kept directions; `rate` for the same rate in
            every matrix, `energy` for the same share of energy.
    """
    rate, shape, share = knob
    bands = [(int(bits), float(part)) for bits, part in (band.split(":") for band in shape.split(","))]
    if share == "rate":
        ranks = {name: _affordable(matrix, bands, rate * matrix.numel() / 8) for name, matrix in delta.items()}
    else:
        budget = rate * sum(matrix.numel() for matrix in delta.values()) / 8

        def ranks_at(energy: float) -> dict[str, int]:
            return {name: rank_for_energy(svd(matrix)[1], energy) for name, matrix in delta.items()}

        def size(energy: float) -> int:
            found = ranks_at(energy)
            return sum(
                lowrank_nbytes(matrix_shape(tuple(delta[name].shape)), rank, bands, GROUP)
                for name, rank in found.items()
            )

        ranks = ranks_at(1 - smallest(lambda lost: size(1 - lost) <= budget, 0.0, 1 - 1e-9))
    decoded, sizes = {}, {}
    for name, matrix in delta.items():
        rank = ranks[name]
        if rank == 0:
            decoded[name], sizes[name] = torch.zeros_like(matrix), 0
            continue
        u, s, vh = svd(matrix)
        hessian = None if moments is None else moments.get(name)
        operator, payload = encode_lowrank((u[:, :rank], s[:rank], vh[:rank]), bands, GROUP, hessian)
        decoded[name] = operator.delta(payload, torch.empty(matrix.shape))
        sizes[name] = payload.nbytes + _COUNT_NBYTES * len(operator.bands)
    return decoded, sizes


def deltamix(delta: Matrices, moments: Matrices | None, knob: tuple[float, str, bool]) -> Coded:
    """Choose the bits of every direction: b_i = argmin_b sigma_i^2 dV_i(b) H dV_i(b)^T + lambda b (m + n).

    Args:
        delta: matrices.
        moments: H; the identity for a matrix without.
        knob: bits per parameter; whether lambda meets that rate per `matrix` or over the `model`;
            whether U is solved again against the rounded V^T before it is rounded.
    """
    rate, share, corrected = knob
    tables = {name: _direction_errors(matrix, (moments or {}).get(name)) for name, matrix in delta.items()}
    groups = [list(delta)] if share == "model" else [[name] for name in delta]
    decoded, sizes = {}, {}
    for names in groups:
        shapes = {name: tuple(delta[name].shape) for name in names}
        budget = rate * sum(delta[name].numel() for name in names) / 8
        for name, chosen in _chosen_bits(tables, shapes, budget).items():
            hessian = None if moments is None else moments.get(name)
            decoded[name], sizes[name] = _mixed(delta[name], hessian, chosen, corrected)
    return decoded, sizes


def impart(delta: Matrices, moments: Matrices | None, knob: tuple[float, float, int]) -> Coded:
    """Drop entries of singular vectors at random, p_i = (1 - sqrt(s_i / s_1)) gamma, and rescale by 1 / (1 - p_i).

    Args:
        delta: matrices.
        moments: not used.
        knob: numbers kept per parameter, met by dropping the tail of directions; gamma; bits of a value.
    """
    density, gamma, bits = knob
    decoded, sizes = {}, {}
    for index, (name, matrix) in enumerate(delta.items()):
        u, s, vh = svd(matrix)
        keep = 1 - gamma * (1 - (s / s[0].clamp(min=1e-30)).sqrt())  # (directions,), 1 - p_i
        rank = int(((keep * sum(matrix.shape)).cumsum(0) <= density * matrix.numel()).sum())
        draw = torch.Generator().manual_seed(index)  # the reader draws the same mask, so it costs nothing
        rows, kept = [], 0
        for factor in ((u * s.sqrt()).T[:rank], (vh * s.sqrt()[:, None])[:rank]):
            mask = torch.rand(factor.shape, generator=draw) < keep[:rank, None]
            rows.append(_stored(torch.where(mask, factor / keep[:rank, None], 0), bits))
            kept += int(mask.sum())
        decoded[name] = rows[0].T @ rows[1]
        # The probabilities follow from the singular values: a bfloat16 for each.
        sizes[name] = _COUNT_NBYTES + 2 * rank + kept * bits // 8 + (4 * rank if bits == 8 else 0)
    return decoded, sizes


def dqrelo(delta: Matrices, moments: Matrices | None, knob: tuple[float]) -> Coded:
    """Store mean|D| sign(D), then the SVD of what is left at rank ceil(m n density / (m + n)) in bfloat16."""
    decoded, sizes = {}, {}
    for name, matrix in delta.items():
        signs = matrix.abs().mean().bfloat16().float() * torch.where(matrix < 0, -1.0, 1.0)
        rank = math.ceil(matrix.numel() * knob[0] / sum(matrix.shape))
        u, s, vh = torch.linalg.svd(matrix - signs, full_matrices=False)
        left, right = (u[:, :rank] * s[:rank].sqrt()), s[:rank].sqrt()[:, None] * vh[:rank]
        decoded[name] = signs + left.bfloat16().float() @ right.bfloat16().float()
        sizes[name] = math.ceil(matrix.numel() / 8) + 2 + 2 * rank * sum(matrix.shape)
    return decoded, sizes


@lru_cache(maxsize=512)
def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V^T; remembered, because a sweep asks for the same matrices again and again."""
    return tuple(torch.linalg.svd(matrix, full_matrices=False))


def smallest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return by bisection about the smallest value in [low, high] for which `holds`, which is monotone."""
    if holds(low):
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _above(matrix: Tensor, threshold: float) -> int:
    return int((svd(matrix)[1].square() / sum(matrix.shape) > threshold).sum())


def _stored(rows: Tensor, bits: int) -> Tensor:
    """Return rows as they are read back: in bfloat16, or in int8 with a bfloat16 scale for each row."""
    if bits == 16:
        return rows.bfloat16().float()
    scale = (rows.abs().amax(1, keepdim=True) / 127).bfloat16().float().clamp(min=1e-30)
    return (rows / scale).round().clamp(-127, 127) * scale


def _affordable(matrix: Tensor, bands: Sequence[tuple[int, float]], nbytes: float) -> int:
    """Return the largest rank whose packed factors take at most `nbytes`."""
    shape = matrix_shape(tuple(matrix.shape))
    return max((r for r in range(1, min(shape) + 1) if lowrank_nbytes(shape, r, bands, GROUP) <= nbytes), default=0)


_CHOICES = (0, 2, 3, 4, 5, 6, 8)  # bits of a direction


def _direction_errors(matrix: Tensor, hessian: Tensor | None) -> Tensor:
    """Return the error of each direction at each number of bits, shape (directions, choices)."""
    _, s, vh = svd(matrix)
    errors = []
    for bits in _CHOICES:
        off = vh if bits == 0 else vh - quantize_factor(vh, ((bits, len(vh)),), GROUP).values()
        seen = off if hessian is None else off @ hessian
        errors.append(s.square() * (seen * off).sum(1))
    return torch.stack(errors, 1)


def _chosen_bits(errors: Matrices, shapes: Mapping[str, tuple[int, ...]], budget: float) -> dict[str, Tensor]:
    """Return for each direction the index of its bits, at the smallest multiplier that fits `budget` bytes."""
    costs = {name: _direction_nbytes(shape) for name, shape in shapes.items()}

    def chosen(log: float) -> dict[str, Tensor]:
        return {name: (errors[name] + math.exp(log) * cost).argmin(1) for name, cost in costs.items()}

    def size(log: float) -> float:
        return sum(float(costs[name][index].sum()) for name, index in chosen(log).items())

    return chosen(smallest(lambda log: size(log) <= budget, -80.0, 40.0))


def _direction_nbytes(shape: Sequence[int]) -> Tensor:
    """Return the bytes that one direction takes at each number of bits, scales and zero points included."""
    groups = sum(math.ceil(length / GROUP) for length in shape)
    return torch.tensor([(bits * (sum(shape) + groups) + 16 * groups) / 8 if bits else 0 for bits in _CHOICES])


def _mixed(matrix: Tensor, hessian: Tensor | None, chosen: Tensor, corrected: bool) -> tuple[Tensor, int]:
    """Return a matrix with the chosen bits for each direction, and its bytes."""
    u, s, vh = svd(matrix)
    order = chosen.argsort(descending=True, stable=True)
    order = order[chosen[order] > 0]
    counts = [(bits, int((chosen == i).sum())) for i, bits in enumerate(_CHOICES)]
    bands = tuple((bits, count) for bits, count in reversed(counts) if bits and count)
    # How many directions have how many bits; both factors stand in that order, so that is all.
    side = _COUNT_NBYTES * (len(_CHOICES) - 1)
    if not bands:
        return torch.zeros_like(matrix), side
    right = quantize_factor(vh[order], bands, GROUP, hessian)
    seen = right.values()  # (rank, d_in)
    metric = seen if hessian is None else seen @ hessian
    inner = metric @ seen.T  # (rank, rank)
    target = (u * s)[:, order]
    if corrected:
        damped = inner + 1e-4 * inner.diagonal().mean() * torch.eye(len(inner))
        target = torch.linalg.solve(damped, metric @ matrix.T).T
    left = quantize_factor(target.T.contiguous(), bands, GROUP, None if hessian is None else inner, along="rank")
    payloads = [pack_factor(right, bands), pack_factor(left, bands)]
    if sum(map(len, payloads)) != sum(factor_nbytes(length, bands, GROUP) for length in matrix.shape):
        raise ValueError("packed factors are not as long as their bands say")
    return left.values().T @ seen, side + sum(map(len, payloads))
