"""One step for the whole model: which operator, at what rank, each matrix takes at it, and what that costs.

Every matrix is coded with the same step in units of cost, so all of them trade bytes for error at the
same rate, lambda = -dD/dR. Bytes and cost at any step are foreseen from a few numbers a matrix
(column spreads, singular values), so a budget is met by bisection without coding anything; what was
coded then corrects the foresight.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graftllm.compression.columns import code_bits
from graftllm.compression.elementwise import encode_elementwise, grid_for
from graftllm.compression.factored import MatrixCode, encode_factored, encode_hybrid, weighted_svd
from graftllm.compression.matrix import BLOCK, Source
from graftllm.compression.metric import Metric, row_squares

Kind = Literal["zero", "elementwise", "factored", "hybrid"]
BITS_WORTH = 2 * math.log(2) / 12  # lambda a bit, in squared steps: the slope of an entropy-coded uniform quantiser
_SIDE_BITS = 2.0  # a row, column or direction costs about this much side information
_SAMPLED_ROWS = 32
_SAMPLED_OCTAVES = 10  # of steps, down from where nearly all entries round to zero
_FINEST = 14  # octaves of the step below the mean entry of the loudest matrix: finer codes would not fit into float32
_WORTH_TRYING = 1.15  # operators foreseen to be this close to the best are coded for real


@dataclass(frozen=True)
class Outlook:
    """What foresight needs to know of a matrix.

    Attributes:
        shape: (rows, columns).
        sampled: log2 of some steps, and the bits and cost an entry that rows of the matrix take at them.
        strengths: leading singular values of the weighted matrix, descending; all of them, or as many as are kept.
        energy: squared norm of the weighted matrix: what it costs to leave it out.
        changed: rows that are not zero; the others take next to nothing.
        servable: whether only a product of two factors will do, as an adapter is one.
        directions: V^T that belongs to `strengths`, (directions, columns), float32 or float64; empty where
            the matrix is only to be foreseen.
    """

    shape: tuple[int, int]
    sampled: tuple[np.ndarray, np.ndarray, np.ndarray]
    strengths: np.ndarray
    energy: float
    changed: int
    servable: bool = False
    directions: Tensor = field(default_factory=lambda: torch.empty(0, 0), repr=False, compare=False)

    def elementwise(self, step: float, share: float = 1.0) -> tuple[float, float]:
        """Return foreseen bits and cost when all entries are coded and have `share` of their energy."""
        at, bits, cost = self.sampled
        place = math.log2(step) - math.log2(share) / 2
        count = self.shape[0] * self.shape[1]
        if place > at[-1]:
            return 0.0, self.energy * share
        # Below the finest sampled step each halving costs a bit an entry that changed and a fourth of the error.
        finer = max(at[0] - place, 0.0)
        bits_each = np.interp(place, at, bits) + finer * self.changed / self.shape[0]
        cost_each = np.exp(np.interp(place, at, np.log(np.maximum(cost, 1e-300)))) * 4.0**-finer
        return count * float(bits_each), count * float(cost_each) * share


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


def outlook(source: Source, metric: Metric, max_rank: int | None = None) -> Outlook:
    """Look at a matrix once.

    Args:
        source: where its rows are.
        metric: what errors cost.
        max_rank: the matrix must be a product of factors of at most this rank.
    """
    rows, columns = source.shape
    decomposed = not source.large or max_rank is not None
    source = source.held() if decomposed else source
    row_energies = torch.cat([metric.of_rows(numbers).row_costs(part).cpu() for numbers, part in source.parts()])
    energy = float(row_energies.sum())
    if energy == 0:
        return Outlook(source.shape, (np.zeros(1), np.zeros(1), np.zeros(1)), np.zeros(0), 0.0, 0)
    strengths, directions = torch.empty(0), torch.empty(0, 0)
    if decomposed:
        rank = _affordable(min(rows, columns) if max_rank is None else max_rank, rows, columns)
        strengths, directions = weighted_svd(source.whole(), metric, rank)
    found = (strengths.double() * metric.scale**0.5).cpu().numpy()
    changed = int((row_energies > 0).sum())
    sampled = _sample(source, metric, row_energies)
    return Outlook(source.shape, sampled, found, energy, changed, max_rank is not None, directions)


def _sample(source: Source, metric: Metric, row_energies: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return log2 of steps, ascending, and what they take by cancellation: bits and cost an entry.

    Looked at are rows from the weakest that changed to the strongest, at equal distances in that order.
    """
    rows, columns = source.shape
    changed = int((row_energies > 0).sum())
    ranks = (torch.arange(min(changed, _SAMPLED_ROWS)) + 0.5) * changed / min(changed, _SAMPLED_ROWS)
    numbers = row_energies.argsort(stable=True)[rows - changed + ranks.long()].sort().values
    some = torch.cat([source.read(number, number + 1) for number in numbers.tolist()])
    metric = metric.of_rows(numbers)
    top = math.floor(math.log2(float(row_energies.sum()) / (changed * columns)) / 2) + 3
    at, bits, cost = np.arange(top - _SAMPLED_OCTAVES, top + 1.0), [], []
    for place in at:
        grid = grid_for(metric, 2.0**place, (len(some), columns))
        codes = grid.codes(some, metric)
        bits.append(code_bits(codes.to(torch.int32).cpu().numpy(), -2 * grid.column_exponents) / codes.numel())
        cost.append(metric.cost(grid.values(codes) - some) / codes.numel())
    return at, np.array(bits) * changed / rows, np.array(cost) * changed / rows


def choices(known: Outlook, step: float) -> list[Choice]:
    """Return what each operator is foreseen to take at a step, the best first.

    Args:
        known: the matrix.
        step: in units of the square root of cost.
    """
    rows, columns = known.shape
    found = [Choice("zero", 0, 0.0, known.energy)]
    if not known.servable:
        bits, cost = known.elementwise(step)
        found.append(Choice("elementwise", 0, bits + _SIDE_BITS * (known.changed + columns), cost))
    if len(known.strengths):
        left_bits, left_cost = _coded(known.strengths / (rows**0.5 * step))
        right_bits, right_cost = _coded(known.strengths / (columns**0.5 * step))
        bits = np.cumsum(rows * left_bits + columns * right_bits + 3 * _SIDE_BITS) + _SIDE_BITS * (rows + columns)
        # What one factor got wrong the other cannot mend: errors add up, but never above the direction itself.
        kept = np.minimum(known.strengths**2, (rows * left_cost + columns * right_cost) * step**2)
        cost = np.cumsum(kept) + np.maximum(known.energy - np.cumsum(known.strengths**2), 0)
        best = int(np.argmin(cost + BITS_WORTH * step**2 * bits))
        found.append(Choice("factored", best + 1, float(bits[best]), float(cost[best])))
        if not known.servable and (few := _spikes(known)):
            # What the strong part got wrong is part of the rest.
            left = known.energy - float((known.strengths[:few] ** 2).sum()) + float(kept[:few].sum())
            share = min(max(left / known.energy, 1e-9), 1.0)
            rest_bits, rest_cost = known.elementwise(step, share)
            side = _SIDE_BITS * (known.changed + columns)
            found.append(Choice("hybrid", few, float(bits[few - 1]) + rest_bits + side, rest_cost))
    return sorted(found, key=lambda choice: choice.price(step))


@dataclass(frozen=True)
class Coded:
    """A matrix as an operator codes it, what its errors cost, and ||decoded - delta|| / ||delta||."""

    operator: MatrixCode
    payload: np.ndarray
    cost: float
    error: float


def encode_cheapest(source: Source, metric: Metric, known: Outlook, step: float) -> Coded | None:
    """Return what is cheapest by cost + lambda * real bits; None where leaving the matrix out is.

    Arguments as for `outlook` and `choices`.
    """
    foreseen = choices(known, step)
    likely = [choice for choice in foreseen if choice.price(step) <= _WORTH_TRYING * foreseen[0].price(step)]
    if any(choice.rank for choice in likely):  # these need all rows at once
        source = source.held()
    best, best_price = None, known.energy
    for choice in likely:
        encoded = _encode(source, metric, known, choice, step)
        if encoded is None:
            continue
        coded = _measured(source, metric, *encoded)
        price = coded.cost + BITS_WORTH * step**2 * 8 * len(coded.payload)
        if price < best_price:
            best, best_price = coded, price
    return best


def _measured(source: Source, metric: Metric, operator: MatrixCode, payload: np.ndarray) -> Coded:
    """Measure what an encoding loses, some rows at a time."""
    cost = missed = norm = 0.0
    height = max(1, BLOCK // source.shape[1])
    for first, block in operator.blocks(payload, source.shape):
        for start, part in enumerate(block.split(height)):
            at = first + start * height
            rows = source.read(at, at + len(part))
            off = part.to(rows) - rows
            cost += metric.of_rows(torch.arange(at, at + len(part))).cost(off)
            missed, norm = missed + float(row_squares(off).sum()), norm + float(row_squares(rows).sum())
    return Coded(operator, payload, cost, math.sqrt(missed / norm))


def step_for(outlooks: Iterable[Outlook], bits: float) -> float:
    """Return the step at which the matrices are foreseen to take `bits` bits together, by bisection."""
    known = [one for one in outlooks if one.energy > 0]
    loudest = max((math.sqrt(one.energy / math.prod(one.shape)) for one in known), default=1.0)
    low, high = math.log2(loudest) - _FINEST, 20.0  # log2 of the step
    while high - low > 1e-3:
        middle = (low + high) / 2
        total = sum(choices(one, 2.0**middle)[0].bits for one in known)
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


def _affordable(rank: int, rows: int, columns: int) -> int:
    """Return the rank that is looked at: all of a small matrix, what a range finder gives cheaply of a large one."""
    smaller = min(rows, columns)
    return rank if smaller <= 1024 else min(rank, smaller // 8)


def _coded(spreads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return bits and mean squared error, in squared steps, of Gaussian values by their spread in steps."""
    at, bits, cost = _quantizer()
    place = np.log2(np.clip(spreads, 2.0 ** at[0], 2.0 ** at[-1]))
    squared = np.where(spreads < 2.0 ** at[0], spreads**2, np.interp(place, at, cost))
    return np.where(spreads < 2.0 ** at[0], 0, np.interp(place, at, bits)), squared


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
        codes = values.round()
        chances = torch.zeros(2 * int(codes.abs().max()) + 1, dtype=torch.float64)
        chances.index_add_(0, (codes - codes.min()).long(), mass)
        chances = chances[chances > 0]
        bits.append(float(-(chances * chances.log2()).sum()))
        cost.append(float((mass * (values - codes).square()).sum()))
    return at, np.array(bits), np.array(cost)
