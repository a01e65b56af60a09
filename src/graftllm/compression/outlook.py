"""What is seen of a matrix before it is coded: from that, bytes and cost at any step are foreseen."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graftllm.compression.columns import code_bits
from graftllm.compression.elementwise import grid_for
from graftllm.compression.factored import weighted_svd
from graftllm.compression.matrix import Source
from graftllm.compression.metric import Metric

_SAMPLED_ROWS = 32
_SAMPLED_OCTAVES = 10  # of steps, down from where nearly all entries round to zero
_ALL = 1024  # rows or columns up to which all directions are looked for
_FEW = 64  # directions that every look takes
_GROUPS = 8  # of rows or columns that are foreseen together
_DRAWN = 16  # errors, to see how they spread


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
        altered: share of entries that are not zero.
        stepped: how many rows and how many columns have steps of their own, which have to be told.
        servable: whether only a product of two factors will do, as an adapter is one.
        partial: whether another look could find more directions.
        directions: V^T that belongs to `strengths`, (directions, columns), float32 or float64; empty where
            the matrix is only to be foreseen.
    """

    shape: tuple[int, int]
    sampled: tuple[np.ndarray, np.ndarray, np.ndarray]
    strengths: np.ndarray
    sides: Sides
    energy: float
    changed: int
    altered: float
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
    costs, altered = [], 0
    for numbers, part in source.parts():
        costs.append(metric.of_rows(numbers).row_costs(part).cpu())
        altered += int(part.count_nonzero())
    row_energies, share = torch.cat(costs), altered / (rows * columns)
    energy = float(row_energies.sum())
    if energy == 0:
        return Outlook(source.shape, (np.zeros(1), np.zeros(1), np.zeros(1)), np.zeros(0), _NO_SIDES, 0.0, 0, share)
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
    served = max_rank is not None
    return Outlook(source.shape, sampled, scaled, sides, energy, changed, share, stepped, served, partial, found)


def directions_for(shape: tuple[int, int], rate: float) -> int | None:
    """Return how many directions a first look takes: what `rate` bits an entry pay at a bit a number, in octaves.

    None stands for as many as `outlook` takes by default.

    >>> directions_for((4096, 14336), 0.05), directions_for((4096, 14336), 0.8), directions_for((512, 512), 0.05)
    (128, None, None)
    """
    rows, columns = shape
    paid = rate * rows * columns / max(1, rows + columns)
    return _fewer_than_all(_FEW << max(0, math.floor(math.log2(max(paid, 1) / _FEW))), shape)


def twice_as_many(directions: int | None, shape: tuple[int, int]) -> int | None:
    """Return how many directions the look takes that comes after one that took so many."""
    return None if directions is None else _fewer_than_all(2 * directions, shape)


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


def _fewer_than_all(directions: int, shape: tuple[int, int]) -> int | None:
    return directions if min(shape) > _ALL and directions < _affordable(min(shape), *shape) else None


def _affordable(rank: int, rows: int, columns: int) -> int:
    """Return the rank that is looked at: all of a small matrix, what a range finder gives cheaply of a large one."""
    smaller = min(rows, columns)
    return rank if smaller <= _ALL else min(rank, smaller // 8)
