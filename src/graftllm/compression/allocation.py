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
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from graftllm.compression.columns import code_bits
from graftllm.compression.elementwise import encode_elementwise, grid_for
from graftllm.compression.factored import MatrixCode, encode_factored, encode_hybrid, weighted_svd
from graftllm.compression.matrix import CACHED, Source
from graftllm.compression.metric import Metric, rounded, row_squares

Kind = Literal["zero", "elementwise", "factored", "hybrid"]
BITS_WORTH = 2 * math.log(2) / 12  # lambda a bit, in squared steps: the slope of an entropy-coded uniform quantiser
_SIDE_BITS = 2.0  # a row, column or direction costs about this much side information
_LEARNED_BITS = 1.0  # and so much until it is known how loud a row or column of a factor is
_SAMPLED_ROWS = 32
_SAMPLED_OCTAVES = 10  # of steps, down from where nearly all entries round to zero
_FINEST = 14  # octaves of the step below the mean entry of the loudest matrix: finer codes would not fit into float32
_ALL = 1024  # rows or columns up to which all directions are looked for
_LEFT_OUT = 0.5  # how much more than noise of the same cost a direction that is left out does: it leads to the base
_GROUPS = 8  # of rows or columns that are foreseen together
_DRAWN = 16  # errors, to see how they spread
_FEW = 64  # directions that every look takes
_WORTH_TRYING = 1.15  # operators foreseen to be this close to the best are coded for real


class Sides(NamedTuple):
    """How the entries of both factors differ, A by rows and B by columns, in groups of these of like energies.

    Attributes:
        rows: mean energies of rows of A, with mean 1.
        columns: those of columns of B, in steps of the columns.
        echoes: by the same groups of columns, how much energy errors of the columns before bring to a code, as a
            multiple of an error's.
        norms: of each direction of B in steps of the columns, for 1 in the metric; shape (directions,).
    """

    rows: np.ndarray
    columns: np.ndarray
    echoes: np.ndarray
    norms: np.ndarray


@dataclass(frozen=True)
class Outlook:
    """What foresight needs to know of a matrix.

    Attributes:
        shape: (rows, columns).
        sampled: log2 of some steps, and the bits and cost an entry that rows of the matrix take at them.
        strengths: leading singular values of the weighted matrix, descending; all of them, or as many as are kept.
        sides: how the entries of the factors differ.
        energy: squared norm of the weighted matrix: what it costs to leave it out.
        changed: rows that are not zero; the others take next to nothing.
        stepped: how many rows and how many columns have steps of their own, which have to be told.
        servable: whether only a product of two factors will do, as an adapter is one.
        partial: whether another look could find more directions.
        directions: V^T that belongs to `strengths`, (directions, columns), float32 or float64; empty where
            the matrix is only to be foreseen.
    """

    shape: tuple[int, int]
    sampled: tuple[np.ndarray, np.ndarray, np.ndarray]
    strengths: np.ndarray
    sides: "Sides"
    energy: float
    changed: int
    stepped: tuple[int, int] = (0, 0)
    servable: bool = False
    partial: bool = False
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


_NO_SIDES = Sides(*[np.zeros(0)] * 4)


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


def outlook(source: Source, metric: Metric, max_rank: int | None = None, directions: int | None = None) -> Outlook:
    """Look at a matrix once.

    Args:
        source: where its rows are.
        metric: what errors cost.
        max_rank: the matrix must be a product of factors of at most this rank.
        directions: how many are looked for at most; by default as many as that takes bearable time.
    """
    rows, columns = source.shape
    decomposed = not source.large or max_rank is not None
    source = source.held() if decomposed else source
    row_energies = torch.cat([metric.of_rows(numbers).row_costs(part).cpu() for numbers, part in source.parts()])
    energy = float(row_energies.sum())
    if energy == 0:
        return Outlook(source.shape, (np.zeros(1), np.zeros(1), np.zeros(1)), np.zeros(0), _NO_SIDES, 0.0, 0)
    strengths, found, sides, partial = torch.empty(0), torch.empty(0, 0), _NO_SIDES, False
    if decomposed:
        rank = most = _affordable(min(rows, columns) if max_rank is None else max_rank, rows, columns)
        if directions is not None:
            rank = min(most, directions)
        partial = rank < most
        left, strengths, found = weighted_svd(source.whole(), metric, rank)
        sides = _sides(left, found, metric)
    scaled = (strengths.double() * metric.scale**0.5).cpu().numpy()
    changed = int((row_energies > 0).sum())
    sampled = _sample(source, metric, row_energies)
    stepped = (0 if metric.rows is None else rows, 0 if metric.right is None else columns)
    return Outlook(source.shape, sampled, scaled, sides, energy, changed, stepped, max_rank is not None, partial, found)


def _sides(left: Tensor, right: Tensor, metric: Metric) -> Sides:
    """Return how the entries of factors will differ, from U and V^T."""
    echoes = torch.zeros(right.shape[1]).to(right)
    if metric.lower is not None:
        lower = metric.lower.to(right)
        drawn = torch.randn(_DRAWN, len(lower), generator=torch.Generator().manual_seed(0)).to(right)
        solved = torch.linalg.solve_triangular(lower, torch.cat([right, drawn]), upper=False, left=False)
        solved *= lower.diagonal()
        right, echoes = solved[:-_DRAWN], (drawn - solved[-_DRAWN:]).square().mean(dim=0)
    norms = right.norm(dim=1)
    columns = (right / norms.clamp(min=torch.finfo(right.dtype).tiny)[:, None]).square().mean(dim=0)
    order = columns.argsort()
    rows, columns, echoes = (
        np.array([part.mean() for part in np.array_split(one.double().cpu().numpy(), _GROUPS) if len(part)])
        for one in (left.square().mean(dim=1).sort().values, columns[order], echoes[order])
    )
    return Sides(rows / rows.mean(), columns / columns.mean(), echoes, norms.double().cpu().numpy())


def directions_for(shape: tuple[int, int], rate: float) -> int | None:
    """Return how many directions a first look takes: what `rate` bits an entry pay at a bit a number, in octaves.

    None stands for as many as `outlook` takes by default.

    >>> directions_for((4096, 14336), 0.05), directions_for((4096, 14336), 0.8), directions_for((512, 512), 0.05)
    (128, None, None)
    """
    rows, columns = shape
    paid = rate * rows * columns / (rows + columns)
    return _fewer_than_all(_FEW << max(0, math.floor(math.log2(max(paid, 1) / _FEW))), shape)


def twice_as_many(directions: int | None, shape: tuple[int, int]) -> int | None:
    """Return how many directions the look takes that comes after one that took so many."""
    return None if directions is None else _fewer_than_all(2 * directions, shape)


def _fewer_than_all(directions: int, shape: tuple[int, int]) -> int | None:
    return directions if min(shape) > _ALL and directions < _affordable(min(shape), *shape) else None


def falls_short(known: Outlook, step: float) -> bool:
    """Return whether all directions that were found are worth their bits at a step, so that more may be."""
    ranks = (choice.rank for choice in choices(known, step) if choice.kind == "factored")
    return known.partial and next(ranks) == len(known.strengths)


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
    side_bits = _SIDE_BITS * (known.changed + known.stepped[1])  # of entries that are coded one by one
    found = [Choice("zero", 0, 0.0, known.energy)]
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
    height = max(1, CACHED // source.shape[1])
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
    return rank if smaller <= _ALL else min(rank, smaller // 8)


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
