"""One step for the whole model: which operator, at what rank, each matrix takes at it, and what that costs.

Every matrix is coded with the same step in units of cost, so all of them trade bytes for error at the
same rate, lambda = -dD/dR. Bytes and cost at any step are foreseen from what the look at a matrix found
(`outlook`), so a budget is met by bisection without coding anything; what was coded then corrects the foresight.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch

from graftllm.compression.elementwise import encode_elementwise
from graftllm.compression.factored import MatrixCode, encode_factored, encode_hybrid
from graftllm.compression.matrix import CACHED, Source
from graftllm.compression.metric import Metric, rounded, row_squares
from graftllm.compression.outlook import Outlook

Kind = Literal["zero", "elementwise", "factored", "hybrid"]
BITS_WORTH = 2 * math.log(2) / 12  # lambda a bit, in squared steps: the slope of an entropy-coded uniform quantiser
_SIDE_BITS = 2.0  # a row, column or direction costs about this much side information
_LEARNED_BITS = 1.0  # and so much until it is known how loud a row or column of a factor is
_FINEST = 14  # octaves of the step below the mean entry of the loudest matrix: finer codes would not fit into float32
_LEFT_OUT = 0.5  # how much more than noise of the same cost a direction that is left out does: it leads to the base
_WORTH_TRYING = 1.15  # operators foreseen to be this close to the best are coded for real


@dataclass(frozen=True)
class Choice:
    """How a matrix is coded, and the bits and cost foreseen for it."""

    kind: Kind
    rank: int
    bits: float
    cost: float

    def price(self, step: float) -> float:
        """Return cost + lambda * bits."""
        return self.cost + BITS_WORTH * step**2 * self.bits


def choices(known: Outlook, step: float) -> list[Choice]:
    """Return what each operator is foreseen to take at a step, the best first.

    Args:
        known: the matrix.
        step: in units of the square root of cost.
    """
    rows, columns = known.shape
    side_bits = _SIDE_BITS * (known.changed + known.stepped[1])  # of entries that are coded one by one
    found = [Choice("zero", 0, 0.0, known.energy)]
    if known.energy == 0:  # nothing changed but signs of zeros
        return found
    if not known.servable:
        bits, cost = known.elementwise(step)
        found.append(Choice("elementwise", 0, bits + side_bits, cost))
    if len(known.strengths):
        sides, whitened = known.sides, known.strengths**2 / (columns * step**2)
        echoes = np.minimum(1 / 12, whitened)[:, None] * sides.echoes
        right_bits, right_cost = _coded((whitened * sides.norms**2)[:, None] * sides.columns + echoes)
        # A is solved for what B became, which points a little elsewhere: its share of the direction is a cosine.
        missed = np.minimum(1, right_cost / whitened.clip(min=1e-300))
        left_bits, left_cost = _coded((whitened * (1 - missed) * columns / rows)[:, None] * sides.rows)
        shared = _SIDE_BITS * sum(known.stepped) + _LEARNED_BITS * (rows + columns)
        bits = np.cumsum(rows * left_bits + columns * right_bits + 3 * _SIDE_BITS) + shared
        # What one factor got wrong the other cannot mend: errors add up, but never above the direction itself.
        kept = np.minimum(known.strengths**2, (rows * left_cost + columns * right_cost) * step**2)
        left_out = np.maximum(known.energy - np.cumsum(known.strengths**2), 0)
        cost = np.cumsum(kept) + left_out
        best = int(np.argmin(cost + _LEFT_OUT * left_out + BITS_WORTH * step**2 * bits))
        found.append(Choice("factored", best + 1, float(bits[best]), float(cost[best])))
        if not known.servable and (few := _spikes(known)):
            # What the strong part got wrong is part of the rest.
            left = known.energy - float((known.strengths[:few] ** 2).sum()) + float(kept[:few].sum())
            share = min(max(left / known.energy, 1e-9), 1.0)
            rest_bits, rest_cost = known.elementwise(step, share)
            rest_bits += side_bits
            if rest_cost + BITS_WORTH * step**2 * rest_bits < left:
                found.append(Choice("hybrid", few, float(bits[few - 1]) + rest_bits, rest_cost))
    return sorted(found, key=lambda choice: choice.price(step))


def falls_short(known: Outlook, step: float) -> bool:
    """Return whether all directions that were found are worth their bits at a step, so that more may be."""
    ranks = (choice.rank for choice in choices(known, step) if choice.kind == "factored")
    return known.partial and next(ranks) == len(known.strengths)


@dataclass(frozen=True)
class Coded:
    """A matrix as an operator codes it, what its errors cost, and ||decoded - delta|| / ||delta||."""

    operator: MatrixCode
    payload: np.ndarray
    cost: float
    error: float


def likely(known: Outlook, step: float) -> list[Kind]:
    """Return which operators may turn out to be the cheapest at a step."""
    found = choices(known, step)
    return [choice.kind for choice in found if choice.price(step) <= _WORTH_TRYING * found[0].price(step)]


def foreseen(known: Outlook, step: float, kind: Kind | None = None) -> Choice:
    """Return what an operator, or the best, is foreseen to take at a step; the best, too, where that one cannot be."""
    found = choices(known, step)
    return next((choice for choice in found if choice.kind == kind), found[0])


def encode_as(kind: Kind, source: Source, metric: Metric, known: Outlook, step: float) -> Coded | None:
    """Return a matrix coded by an operator; None where nothing is left of it.

    Arguments as for `outlook.outlook` and `choices`.
    """
    choice = foreseen(known, step, kind)
    if choice.rank:  # these need all rows at once
        source = source.held()
    encoded = _encode(source, metric, known, choice, step)
    return None if encoded is None else _measured(source, metric, *encoded)


@dataclass(frozen=True)
class Offer:
    """What a coding of a matrix takes, in bytes, and what its errors cost."""

    nbytes: int
    cost: float


def select(offers: Sequence[Sequence[Offer]], room: int) -> tuple[list[int], float]:
    """Return which of each matrix's offers make the least cost together in so many bytes; the first is always there.

    Taken are, in the order of what a byte saves, the steps along each matrix's lower convex hull that still fit.

    Returns:
        The number of each matrix's offer, and how much cost a byte saves in the best step that did not fit.
    """
    taken, missed = [0] * len(offers), 0.0
    steps = [(saved, matrix, at) for matrix, some in enumerate(offers) for saved, at in _hull(some)]
    full: set[int] = set()
    for saved, matrix, at in sorted(steps, key=lambda step: (-step[0], step[1])):
        more = offers[matrix][at].nbytes - offers[matrix][taken[matrix]].nbytes
        if matrix in full or more > room:
            full.add(matrix)
            missed = max(missed, saved)
        else:
            taken[matrix], room = at, room - more
    return taken, missed


def _hull(offers: Sequence[Offer]) -> list[tuple[float, int]]:
    """Return what a byte saves on the way to each offer that is on the lower convex hull, and its number."""
    at, found = 0, []
    while True:
        here = offers[at]
        ahead = [
            ((here.cost - offer.cost) / (offer.nbytes - here.nbytes), offer.nbytes, number)
            for number, offer in enumerate(offers)
            if offer.nbytes > here.nbytes and offer.cost < here.cost
        ]
        if not ahead:
            return found
        saved, _, at = max(ahead)
        found.append((saved, at))


def _measured(source: Source, metric: Metric, operator: MatrixCode, payload: np.ndarray) -> Coded:
    """Measure what an encoding loses, some rows at a time."""
    cost = missed = norm = 0.0
    height = max(1, CACHED // source.shape[1])
    for first, block in operator.blocks(payload, source.shape):
        for start, part in enumerate(block.split(height)):
            at = first + start * height
            rows = source.read(at, at + len(part))
            off = part.to(rows) - rows
            cost += metric.of_rows(torch.arange(at, at + len(part))).cost(off)
            missed, norm = missed + float(row_squares(off).sum()), norm + float(row_squares(rows).sum())
    return Coded(operator, payload, cost, math.sqrt(missed / norm))


def step_for(matrices: Iterable[tuple[Outlook, Kind | None]], bits: float) -> float:
    """Return the step at which matrices are foreseen to take `bits` bits together, by bisection.

    Each goes by the operator that is named, or else by the one that is best at the step.
    """
    known: list[tuple[Outlook, Kind | None]] = [(one, kind) for one, kind in matrices if one.energy > 0]
    loudest = max((math.sqrt(one.energy / math.prod(one.shape)) for one, _ in known), default=1.0)
    low = math.log2(loudest) - _FINEST  # log2 of the step
    high = max(20.0, math.log2(max((one.energy for one, _ in known), default=1.0)) / 2 + 1)  # all round to zero there
    while high - low > 1e-3:
        middle = (low + high) / 2
        total = sum(foreseen(one, 2.0**middle, kind).bits for one, kind in known)
        low, high = (middle, high) if total > bits else (low, middle)
    return float(2.0**high)


def _encode(
    source: Source, metric: Metric, known: Outlook, choice: Choice, step: float
) -> tuple[MatrixCode, np.ndarray] | None:
    if choice.kind == "zero":
        return None
    if choice.kind == "elementwise":
        return encode_elementwise(source.read, source.shape, step, metric)
    delta = source.whole()
    right = known.directions[: choice.rank].to(delta)
    strengths = torch.from_numpy(known.strengths[: choice.rank] / metric.scale**0.5).to(delta)
    encode = encode_factored if choice.kind == "factored" else encode_hybrid
    return encode(delta, step, metric, (strengths, right))


def _spikes(known: Outlook) -> int:
    """Return how many directions stand out of the bulk, none if it is most of them."""
    rows, columns = known.shape
    if len(known.strengths) < min(known.shape):
        rest = max(known.energy - float((known.strengths**2).sum()), 0)
        level = rest / max(1, min(known.shape) - len(known.strengths))
    else:
        level = float(np.median(known.strengths**2))
    edge = level * (1 + math.sqrt(min(rows, columns) / max(rows, columns))) ** 2  # of a matrix of noise
    count = int((known.strengths**2 > 2 * edge).sum())
    return count if count <= min(known.shape) // 4 else 0


def _coded(energies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return bits and squared error, in squared steps, of Gaussian values, as means over groups.

    Args:
        energies: of the values in squared steps, shape (directions, groups).
    """
    at, bits, cost = _quantizer()
    place = np.log2(energies.clip(4.0 ** at[0], 4.0 ** at[-1])) / 2
    silent = energies < 4.0 ** at[0]
    squared = np.where(silent, energies, np.interp(place, at, cost))
    return np.where(silent, 0, np.interp(place, at, bits)).mean(axis=1), squared.mean(axis=1)


@cache
def _quantizer() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return log2 of spreads, and the entropy and error of the quantiser at each of them."""
    at = np.arange(-4, 13, 0.125)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    mass = torch.exp(-x.square() / 2)
    mass = mass / mass.sum()
    bits, cost = [], []
    for place in at:
        if place > 5:  # fine steps: the high-rate limit
            bits.append(place + 0.5 * math.log2(2 * math.pi * math.e))
            cost.append(1 / 12)
            continue
        values = x * 2.0**place
        codes = rounded(values)
        chances = torch.zeros(2 * int(codes.abs().max()) + 1, dtype=torch.float64)
        chances.index_add_(0, (codes - codes.min()).long(), mass)
        chances = chances[chances > 0]
        bits.append(float(-(chances * chances.log2()).sum()))
        cost.append(float((mass * (values - codes).square()).sum()))
    return at, np.array(bits), np.array(cost)
