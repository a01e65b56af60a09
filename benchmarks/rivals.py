"""Published ways to compress a delta, each a row of a table, with every byte counted.

A rival takes matrices by name, optionally the second moments of their inputs, and its own knob, and
returns what a reader would decode with the bytes that it would read: packed codes, scales, zero
points, places of kept values, numbers of kept directions. The file around them is counted as ours is, without
what ours says of itself: one run of bytes, and the sizes of its parts, compressed. Vectors (norms,
biases) are exact in all rivals and in ours, by the same code.

Originals leave embedding and head as they are and do not count them. Here each setting says what is
done with them: `same` as any matrix, `plain` the same without calibration, `pruned` to 97 % of the
entries at 8 bits (arXiv 2505.18502), `q4` plain rounding to 4 bits. Settings that are left out were
behind the others of their row on the demo's skills with seed 0.
"""

import base64
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any, Literal

import torch
from rivals_elementwise import bitdelta, bitdelta_masks, dare, deltazip, magnitude, rounding
from rivals_lowrank import deltamix, dqrelo, impart, ladder, lora
from torch import Tensor

from graftllm.compression.pruning import encode_sparse
from graftllm.compression.quantization import pack_factor, quantize_factor
from graftllm.compression.roles import role_of
from graftllm.tensors import TensorSpec, safetensors_opening

Matrices = Mapping[str, Tensor]
Coded = tuple[dict[str, Tensor], dict[str, int]]  # decoded deltas and payload bytes, by name
Knob = tuple[Any, ...]
Vocabulary = Literal["same", "plain", "pruned", "q4"]
Setting = tuple[Knob, Vocabulary]


NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Rival:
    """A way to compress a delta.

    Attributes:
        name: as tables and plots show it.
        compress: (matrices, moments, knob) -> decoded deltas and payload bytes; moments or None.
        settings: its own knob, and what is done with embedding and head.
        calibrated: whether it sees second moments; those of a tied embedding are its head's.
        paper: where it is from.
        original: what the original does with sizes, and what is done better here.
        distilled: whether a gain for each matrix is then trained on the tuned model's answers.
    """

    name: str
    compress: Callable[[Matrices, Matrices | None, Any], Coded]
    settings: tuple[Setting, ...]
    calibrated: bool
    paper: str
    original: str
    distilled: bool = False


def compress(
    rival: Rival, delta: Matrices, moments: Matrices | None, setting: Setting, *, exact: Mapping[str, int] = NOTHING
) -> tuple[dict[str, Tensor], int]:
    """Return decoded matrices and the size in bytes of the file that would hold them, its header included.

    Args:
        rival: a row of `RIVALS`.
        delta: the matrices of a delta, float32; vectors are the caller's.
        moments: second moments of the inputs of some of them, shape (d_in, d_in), for rivals with calibration.
        setting: one of the rival's settings.
        exact: bytes of what is stored exactly beside the matrices, by name.
    """
    knob, vocabulary = setting
    moments = moments if rival.calibrated else None
    apart = {name for name, matrix in delta.items() if role_of(name, tuple(matrix.shape)) in ("embedding", "head")}
    if vocabulary == "same":
        decoded, sizes = rival.compress(delta, moments, knob)
    else:
        decoded, sizes = rival.compress({name: delta[name] for name in delta if name not in apart}, moments, knob)
        words = {name: delta[name] for name in delta if name in apart}
        more = rival.compress(words, None, knob) if vocabulary == "plain" else _dense(words, vocabulary)
        decoded, sizes = decoded | more[0], sizes | more[1]
    sizes = {**sizes, **exact}
    return decoded, header_nbytes(sizes) + sum(sizes.values())


def distinct(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """Return the first setting of each knob, the best where embedding and head are a small share of the model."""
    first: dict[Knob, Setting] = {}
    for setting in settings:
        first.setdefault(setting[0], setting)
    return tuple(first.values())


def header_nbytes(sizes: Mapping[str, int]) -> int:
    """Return the size of the smallest safetensors header over payloads of these sizes, whose names the base has."""
    told = base64.b85encode(zlib.compress(json.dumps(list(sizes.values()), separators=(",", ":")).encode(), 9))
    return len(safetensors_opening({"payloads": TensorSpec("U8", (sum(sizes.values()),))}, {"sizes": told.decode()}))


def _dense(matrices: Matrices, how: Vocabulary) -> Coded:
    decoded, sizes = {}, {}
    for name, matrix in matrices.items():
        if how == "pruned":
            operator, payload = encode_sparse(matrix, 0.97, 128)
            decoded[name] = operator.delta(payload, torch.empty(matrix.shape))
        else:
            bands = ((int(how[1:]), matrix.shape[0]),)
            factor = quantize_factor(matrix, bands, 128)
            decoded[name], payload = factor.values(), pack_factor(factor, bands)
        sizes[name] = payload.nbytes
    return decoded, sizes


def _settings(knobs: Iterable[Knob], *vocabulary: Vocabulary) -> tuple[Setting, ...]:
    return tuple((knob, words) for knob in knobs for words in vocabulary)


_DELTA_COME, _GRAFTLLM = "8:.002,3:.032,2:.966", "8:.02,4:.18,2:.8"  # 8:2,3:32,2:rest and 8:20,4:180,2:800
_FINE, _FINER = "8:.05,4:.35,2:.6", "8:.05,4:.45,3:.5"
_EITHER = ("rate", "energy")
_LADDER = (
    "Codes are never packed; embedding and head are taken from the fine-tune and not counted. Here: packed, every "
    "scale and zero point counted, both shapes of bands, ranks by rate (Delta-CoMe) or by energy (GraftLLM)."
)

_ROWS = (
    Rival(
        "ladder + GPTQ",
        ladder,
        _settings(product((0.125, 0.25, 0.5), (_DELTA_COME,), _EITHER), "plain")
        + _settings(product((0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0), (_GRAFTLLM,), _EITHER), "plain")
        + _settings(product((0.25, 0.5, 0.75, 1.0, 1.5, 2.0), (_GRAFTLLM,), _EITHER), "q4")
        + _settings(product((1.0, 1.5, 2.0), (_GRAFTLLM,), _EITHER), "pruned"),
        True,
        "https://arxiv.org/abs/2406.08903",
        _LADDER,
    ),
    Rival(
        "ladder + GPTQ, bands tuned",
        ladder,
        _settings(product((0.25, 0.5, 0.75, 1.0), (_FINE,), _EITHER), "plain", "q4")
        + _settings(product((1.0, 1.5, 2.0, 3.0), (_FINER,), _EITHER), "plain", "q4"),
        True,
        "https://arxiv.org/abs/2505.18502",
        "Not published: the same with bands that were searched on these models.",
    ),
    Rival(
        "ladder, rounded",
        ladder,
        _settings(product((0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0), (_GRAFTLLM,), _EITHER), "same")
        + _settings(product((0.25, 0.5, 0.75, 1.0, 1.5), (_GRAFTLLM,), ("rate",)), "q4"),
        False,
        "https://arxiv.org/abs/2406.08903",
        _LADDER,
    ),
    Rival(
        "DeltaMix",
        deltamix,
        _settings(product((0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0), ("model",), (True,)), "plain", "same")
        + _settings(product((0.25, 0.5, 0.75, 1.0, 1.5, 2.0), ("model",), (True,)), "q4")
        + _settings(product((0.25, 0.5, 1.0), ("matrix",), (True,)), "plain"),
        True,
        "https://arxiv.org/abs/2506.11087",
        "Bits per singular direction by an integer programme, GPTQ, a corrected target for U. Here the programme is "
        "solved exactly by bisection, over the model or per matrix.",
    ),
    Rival(
        "LoRA extraction",
        lora,
        _settings(product((1, 2, 4, 8, 16, 24, 32, 48), (16,), ("rank",)), "same")
        + _settings(product((1, 4, 16), (16,), ("energy",)), "same")
        + _settings(product((1, 2, 4, 8, 16, 24), (16,), ("rank",)), "q4"),
        False,
        "https://arxiv.org/abs/2106.09685",
        "Rank-r SVD in bf16, one rank for all linears. Here also one threshold for all, and the better of the two.",
    ),
    Rival(
        "LoRA extraction, int8",
        lora,
        _settings(product((1, 2, 4, 8, 16, 32, 48), (8,), ("rank",)), "same")
        + _settings(product((2, 8, 32), (8,), ("energy",)), "same")
        + _settings(product((1, 2, 4, 8, 16, 32), (8,), ("rank",)), "q4"),
        False,
        "https://arxiv.org/abs/2106.09685",
        "Not published: the same at 8 bits and one scale a singular vector, to see what bf16 costs.",
    ),
    Rival(
        "ImPart",
        impart,
        _settings(product((0.03, 0.06, 0.12, 0.25, 0.4), (0.5, 0.8), (8,)), "q4")
        + _settings(product((0.03, 0.06, 0.12), (0.5,), (8,)), "same")
        + _settings(product((0.06, 0.12), (0.5,), (16,)), "q4"),
        False,
        "https://arxiv.org/abs/2504.13237",
        "Random sparsity in the singular vectors, by importance, in fp16; the mask is a seed and costs nothing here, "
        "and values also have 8 bits, which is better.",
    ),
    Rival(
        "BitDelta",
        bitdelta,
        _settings(product((1, 2, 3, 4), ("mean", "fitted")), "q4", "same"),
        True,
        "https://arxiv.org/abs/2402.10193",
        "1 bit and a scale a matrix, repeated on what is left for more bits; embedding and head at full precision. "
        "Scales as published, or fitted to the layers' outputs.",
    ),
    Rival(
        "BitDelta, distilled",
        bitdelta_masks,
        _settings(product((1, 2, 3), ("mean", "fitted")), "q4") + _settings(product((1,), ("fitted",)), "same"),
        True,
        "https://arxiv.org/abs/2402.10193",
        "The same with scales distilled on logits, as in the original; here on the rows that the model was tuned on.",
        distilled=True,
    ),
    Rival(
        "D-QReLO",
        dqrelo,
        _settings(product((0.0, 0.01, 0.02, 0.04, 0.08, 0.16)), "q4") + _settings(product((0.0,)), "same"),
        False,
        "https://arxiv.org/abs/2604.16940",
        "1 bit and a scale a matrix, then a bf16 SVD of what is left.",
    ),
    Rival(
        "DeltaZip",
        deltazip,
        _settings(product((1, 2, 3, 4), (0, 128)), "q4", "same"),
        True,
        "https://arxiv.org/abs/2312.05215",
        "2:4 sparse with SparseGPT, then few bits, then deflate. Here three masks share a byte (8/3 bits for four "
        "values, 4 in the original).",
    ),
    Rival(
        "GPTQ, elementwise",
        rounding,
        _settings(product((2, 3, 4), (128,)), "same", "plain") + _settings(product((2,), (32,)), "same"),
        True,
        "https://arxiv.org/abs/2210.17323",
        "Min/max rounding of the delta's entries with GPTQ's error feedback.",
    ),
    Rival(
        "rounding",
        rounding,
        _settings(product((2, 3, 4), (128,)), "same") + _settings(product((2,), (32,)), "same"),
        False,
        "https://arxiv.org/abs/2208.07339",
        "Elementwise min/max rounding; a scale and a zero point for 128 (or 32) values of a row.",
    ),
    Rival(
        "magnitude pruning",
        magnitude,
        _settings(product((0.05, 0.1, 0.2, 0.35, 0.5), (8,), ("matrix",)), "q4", "same")
        + _settings(product((0.05, 0.2, 0.5), (8,), ("model",)), "q4"),
        False,
        "https://arxiv.org/abs/1506.02626",
        "Largest entries at 8 bits; gaps between them entropy-coded, better than index formats in use.",
    ),
    Rival(
        "DARE",
        dare,
        _settings(product((0.1, 0.25, 0.5, 0.75), (4,)), "q4", "same") + _settings(product((0.25,), (8,)), "same"),
        False,
        "https://arxiv.org/abs/2311.03099",
        "Random entries, rescaled. Made for merging; the mask is a seed and costs nothing here; values of 4 or 8 bits.",
    ),
)
RIVALS = {rival.name: rival for rival in _ROWS}
