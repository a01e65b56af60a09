"""The fewest bytes that give every bit: an exact operator, over what else is known of the tuned values.

A product of factors costs bytes and saves them where a delta has strong directions, which a spread for each
row and column knows nothing of. Which step pays best is foreseen: entries whose spread is halved take a
bit less. A lossy layer of a pack predicts, too; what was rounded where errors are cheap predicts badly,
so it gets a weight, which may be 0.
"""

import math

import numpy as np
import torch
from torch import Tensor

from graftllm.compression.allocation import Choice, choices
from graftllm.compression.encoded import EncodedTensor, ExactLayer
from graftllm.compression.exact import Exact, encode_exact
from graftllm.compression.factored import encode_factored, weighted_svd
from graftllm.compression.matrix import Source, matrix_shape
from graftllm.compression.metric import Metric
from graftllm.compression.outlook import outlook
from graftllm.compression.prediction import is_predicting, predicted
from graftllm.tensors import is_finite

_STEPS = [2 ** (quarter / 4) for quarter in range(-4, 9)]  # in spreads of the delta
_WEIGHTS = 16  # a weight is a whole number of this part


def encode_closest(base: Tensor, tuned: Tensor, device: torch.device) -> tuple[Exact, np.ndarray]:
    """Return the operator and payload that give `tuned` back from `base` in the fewest bytes, by a product or without.

    Args:
        base: the base's value, in the tuned dtype.
        tuned: the tuned value.
        device: where matrices are decomposed.
    """
    direct = encode_exact(base, tuned)
    source = _source(base, tuned, device)
    if source is None or (found := _promising(source)) is None:
        return direct
    (step, rank), delta = found, source.whole()
    coded = encode_factored(delta, step, Metric(), weighted_svd(delta, Metric(), rank)[1:])
    if coded is None:
        return direct
    product, first = coded
    exact, rest = encode_exact(predicted(product, first, base), tuned)
    over = exact.model_copy(update={"product": product, "split": len(first)}), np.concatenate([first, rest])
    return min(direct, over, key=lambda pair: pair[1].nbytes)


def refine(lossy: EncodedTensor, base: Tensor, tuned: Tensor, device: torch.device) -> EncodedTensor:
    """Return a lossy layer with the smallest exact one on top that makes it `tuned`; arguments as above."""
    layers = [ExactLayer(0.0, *encode_closest(base, tuned, device))]
    if is_predicting(lossy.operator) and (weight := _weight(lossy.decode(base), base, tuned)) > 0:
        layers.append(ExactLayer(weight, *encode_closest(lossy.prediction(base, weight), tuned, device)))
    best = min(layers, key=lambda layer: layer.payload.nbytes)
    return EncodedTensor(lossy.operator, lossy.payload, best)


def _weight(delta: Tensor, base: Tensor, tuned: Tensor) -> float:
    """Return the weight, 0 to 1, at which a decoded delta comes closest to the real one."""
    change = tuned.float() - base.float()
    energy = float(delta.double().square().sum())
    gain = float((delta.double() * change.double()).sum()) / energy if energy else 0.0
    return min(max(round(_WEIGHTS * gain), 0), _WEIGHTS) / _WEIGHTS


def _source(base: Tensor, tuned: Tensor, device: torch.device) -> Source | None:
    """Return tuned - base as a matrix of numbers; None where it is none."""
    shape = matrix_shape(tuple(base.shape))
    if min(shape) == 1 or not base.is_floating_point() or not (is_finite(base) and is_finite(tuned)):
        return None
    before, after = base.reshape(shape), tuned.reshape(shape)
    return Source(
        shape, lambda start, stop: (after[start:stop].float() - before[start:stop].float()).to(device), device
    )


def _promising(source: Source) -> tuple[float, int] | None:
    """Return the step and rank of the product that is foreseen to save most; None where none saves anything."""
    known = outlook(source, Metric())
    if not 0 < known.energy < math.inf:
        return None  # nothing that float32 can square
    entries = source.shape[0] * source.shape[1]

    def bits(choice: Choice) -> float:
        return choice.bits + entries / 2 * math.log2(choice.cost / known.energy)

    found = []
    for step in (relative * math.sqrt(known.energy / entries) for relative in _STEPS):
        found += [(bits(choice), step, choice.rank) for choice in choices(known, step) if choice.kind == "factored"]
    least, step, rank = min(found, default=(0.0, 0.0, 0))
    return (step, rank) if least < 0 else None
