"""Rivals that code a delta's entries: BitDelta, rounding, GPTQ, DeltaZip, magnitude pruning, DARE.

Each function takes matrices, second moments or None, and a knob, and returns decoded matrices and
payload bytes by name.
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from graftllm.compression.bits import pack_bits, packed_nbytes
from graftllm.compression.entropy import encode_integers
from graftllm.compression.quantization import pack_factor, quantize_factor

Matrices = Mapping[str, Tensor]
Coded = tuple[dict[str, Tensor], dict[str, int]]


def bitdelta(delta: Matrices, moments: Matrices | None, knob: tuple[int, str]) -> Coded:
    """Store sign(D) and a scale; on what is left again.

    Args:
        delta: matrices.
        moments: of their inputs, or None.
        knob: how often; whether the scale is the `mean` of |D|, or `fitted`: where there are moments, the one with the
            least error at the layer's output, tr(D H S^T) / tr(S H S^T) with S = sign(D).
    """
    masks, sizes = bitdelta_masks(delta, moments, knob)
    return {name: parts.sum(0) for name, parts in masks.items()}, sizes


def bitdelta_masks(delta: Matrices, moments: Matrices | None, knob: tuple[int, str]) -> Coded:
    """Do what `bitdelta` does, but return each mask times its scale, shape (masks, d_out, d_in)."""
    masks, sizes = {}, {}
    for name, matrix in delta.items():
        rest, hessian, parts = matrix, None, []
        if moments is not None and knob[1] == "fitted":
            hessian = moments.get(name)
        for _ in range(knob[0]):
            signs = torch.where(rest < 0, -1.0, 1.0)
            seen = signs if hessian is None else signs @ hessian
            parts.append(((rest * seen).sum() / (signs * seen).sum()).bfloat16().float() * signs)
            rest = rest - parts[-1]
        masks[name] = torch.stack(parts)
        sizes[name] = knob[0] * (packed_nbytes(matrix.numel(), 1) + 2)
    return masks, sizes


def rounding(delta: Matrices, moments: Matrices | None, knob: tuple[int, int]) -> Coded:
    """Round entries to a number of bits with a scale and zero point a group, by GPTQ where there are moments.

    Args:
        delta: matrices.
        moments: of their inputs, or None.
        knob: bits; values of a row that share a scale.
    """
    bits, group_size = knob
    decoded, sizes = {}, {}
    for name, matrix in delta.items():
        bands = ((bits, matrix.shape[0]),)
        factor = quantize_factor(matrix, bands, group_size, None if moments is None else moments.get(name))
        decoded[name], sizes[name] = factor.values(), len(pack_factor(factor, bands))
    return decoded, sizes


def deltazip(delta: Matrices, moments: Matrices | None, knob: tuple[int, int]) -> Coded:
    """Keep two of any four entries of a row, at few bits, by SparseGPT (arXiv 2301.00774); then deflate.

    Args:
        delta: matrices.
        moments: of their inputs; the identity where there are none.
        knob: bits of a kept value; values of a row that share a scale, 0 for the whole row.
    """
    bits, group_size = knob
    decoded, sizes = {}, {}
    for name, matrix in delta.items():
        hessian = None if moments is None else moments.get(name)
        decoded[name], payload = _two_of_four(matrix, hessian, bits, group_size or matrix.shape[1])
        sizes[name] = min(len(payload), len(zlib.compress(payload, 9)))
    return decoded, sizes


def magnitude(delta: Matrices, moments: Matrices | None, knob: tuple[float, int, str]) -> Coded:
    """Keep the entries of largest magnitude; gaps between them are entropy-coded.

    Args:
        delta: matrices.
        moments: not used.
        knob: share kept; bits of a value (8 with a scale for 128 values, or 16); whether that share is
            kept of every `matrix` or of the `model`.
    """
    density, bits, share = knob
    threshold = 0.0
    if share == "model":
        everything = torch.cat([matrix.abs().reshape(-1) for matrix in delta.values()])
        threshold = float(everything.sort(descending=True).values[max(1, round(density * len(everything))) - 1])
    decoded, sizes = {}, {}
    for name, matrix in delta.items():
        flat = matrix.reshape(-1)
        if share == "model":
            places = (flat.abs() >= threshold).nonzero()[:, 0]
        else:
            places = flat.abs().topk(max(1, round(density * len(flat)))).indices.sort().values
        values, size = _values(flat[places], bits)
        gaps = np.diff(places.numpy(), prepend=-1) - 1
        decoded[name] = torch.zeros_like(flat).index_put_((places,), values).reshape(matrix.shape)
        # 4 bytes for how many are kept.
        sizes[name] = 4 + size + len(encode_integers(gaps.astype(np.uint32)))
    return decoded, sizes


def dare(delta: Matrices, moments: Matrices | None, knob: tuple[float, int]) -> Coded:
    """Keep a random share of the entries, rescaled by its inverse.

    Args:
        delta: matrices.
        moments: not used.
        knob: share kept; bits of a value (4 or 8 with a scale for 128 values, or 16).
    """
    density, bits = knob
    decoded, sizes = {}, {}
    for index, (name, matrix) in enumerate(delta.items()):
        flat = matrix.reshape(-1)
        draw = torch.Generator().manual_seed(index)  # the reader draws the same mask: 8 bytes for the seed
        places = (torch.rand(len(flat), generator=draw) < density).nonzero()[:, 0]
        values, size = _values(flat[places] / density, bits)
        decoded[name] = torch.zeros_like(flat).index_put_((places,), values).reshape(matrix.shape)
        sizes[name] = 8 + size
    return decoded, sizes


def _values(values: Tensor, bits: int) -> tuple[Tensor, int]:
    """Return values as they are read back, and their bytes."""
    if bits == 16 or not len(values):
        return values.bfloat16().float(), 2 * len(values)
    bands = ((bits, 1),)
    factor = quantize_factor(values[None], bands, 128)
    return factor.values()[0], len(pack_factor(factor, bands))


_DAMPING = 0.01
_PAIRS = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])  # which two of four are kept


def _two_of_four(matrix: Tensor, hessian: Tensor | None, bits: int, group_size: int) -> tuple[Tensor, bytes]:
    """Return a matrix with two of any four entries of a row, and its bytes: masks, codes, scales.

    Columns go in order, four by four: the pair whose loss would cost most is kept, and the error
    of pruning and rounding is made up for in the columns to come.
    """
    d_out, d_in = matrix.shape
    if d_in % 4:
        raise ValueError(f"expected a number of columns that four divides, found {d_in}")
    feedback = _inverse_factor(torch.eye(d_in) if hessian is None else hessian)  # (d_in, d_in), upper triangular
    rest, decoded = matrix.clone(), torch.zeros_like(matrix)
    masks, codes, scales = [], [], []
    scale = torch.empty(0)
    for start in range(0, d_in, 4):
        if start % group_size == 0:
            scale = _best_scale(rest[:, start : start + group_size], bits)  # (d_out, 1)
            scales.append(scale)
        four = slice(start, start + 4)
        worth = rest[:, four].square() / feedback.diagonal()[four].square()
        pair = worth[:, _PAIRS].sum(2).argmax(1)  # (d_out,), an index into _PAIRS
        kept = torch.zeros(d_out, 4, dtype=torch.bool).scatter_(1, _PAIRS[pair], True)
        masks.append(pair)
        rounded_codes = torch.empty(d_out, 4)
        for i in range(4):
            column = start + i
            rounded_codes[:, i : i + 1] = _code(rest[:, column : column + 1], scale, bits)
            value = torch.where(kept[:, i], _level(rounded_codes[:, i : i + 1], scale, bits)[:, 0], 0)
            decoded[:, column] = value
            error = (rest[:, column] - value) / feedback[column, column]
            rest[:, column + 1 :] -= error[:, None] * feedback[column, column + 1 :]
        codes.append(rounded_codes.gather(1, _PAIRS[pair]))
    found = torch.stack(masks, 1).reshape(-1).numpy()
    found = np.pad(found, (0, -len(found) % 3)).reshape(-1, 3)
    parts = (
        (found @ np.array([1, 6, 36])).astype(np.uint8),  # three of six choices a byte, 6 ** 3 = 216
        pack_bits(torch.stack(codes, 1).reshape(-1).numpy(), bits),
        torch.cat(scales).bfloat16().view(torch.uint8).numpy(),
    )
    return decoded, b"".join(part.tobytes() for part in parts)


def _code(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return codes of symmetric levels without a zero, which the mask already has: -1.5, -0.5, 0.5, 1.5 of 2 bits."""
    return (values / scale + 2 ** (bits - 1) - 0.5).round().clamp(0, 2**bits - 1)


def _level(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (codes - 2 ** (bits - 1) + 0.5) * scale


def _best_scale(rows: Tensor, bits: int) -> Tensor:
    """Return for each row the scale with the least squared error on the larger half of its entries, shape (rows, 1)."""
    large = rows.abs().topk(math.ceil(rows.shape[1] / 2), dim=1).values
    most = large.amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 0.5)
    tried = torch.stack([(most * share).bfloat16().float() for share in torch.linspace(0.3, 1, 15)])
    errors = torch.stack([(_level(_code(large, scale, bits), scale, bits) - large).square().sum(1) for scale in tried])
    return tried[errors.argmin(0), torch.arange(len(rows))]


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse."""
    mean = hessian.diagonal().mean()
    normal = hessian / mean + _DAMPING * torch.eye(len(hessian))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(normal)), upper=True)
