"""Which table codes which value of a matrix: that of its row, moved by its column.

How far a column moves it is told beforehand, or follows what was read of the column before.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from math import isqrt

import numpy as np

from graftllm.compression.entropy import class_of, fold
from graftllm.compression.tables import FAMILIES, LOUDEST, SILENT, table_bits

_BLOCK = 1 << 22  # values that are put in order at a time; bounds the memory of coding
_WEIGHT = 3  # rows as loud as their tables say that every column begins with
_FARTHEST = 24  # tables that a column may be from its row's


def code_bits(codes: np.ndarray, shifts: np.ndarray | None = None) -> float:
    """Return how many bits `CodeWriter.matrix` will take at most, without its few bytes of side information."""
    return cheapest(codes, shifts)[0]


class Fixed:
    """Tables of a matrix: those of its rows, moved by what is known of its columns."""

    def __init__(self, shape: tuple[int, int], shifts: np.ndarray | None) -> None:
        """Move the columns of a matrix of that shape by so many tables, shape (columns,), or not at all."""
        self.shape, self.shifts = shape, shifts

    def parts(self) -> Iterator[slice]:
        """Yield the rows that are coded together."""
        height = _height(self.shape[1])
        return (slice(start, start + height) for start in range(0, self.shape[0], height))

    def tables(self, index: np.ndarray) -> np.ndarray:
        """Return the table of each row, or of each value, from the tables that rows name."""
        if self.shifts is None:
            return index.astype(np.uint8)
        moved = np.clip(index[:, None].astype(np.int64) + self.shifts, 1, LOUDEST)
        return np.where(index[:, None] == SILENT, SILENT, moved).astype(np.uint8)

    def saw(self, codes: np.ndarray, index: np.ndarray) -> None:
        """Learn from some rows and the tables that they named: nothing here."""


class Following(Fixed):
    """Tables that follow the columns, up to a part of all rows before at a time; whole numbers, the same everywhere."""

    def __init__(self, shape: tuple[int, int]) -> None:
        """Begin with columns that are alike."""
        super().__init__(shape, np.zeros(shape[1], np.int64))
        self._rows = _WEIGHT
        self._energy = np.full(shape[1], _WEIGHT << 8, np.int64)  # squares of codes over their tables', in 2 ** -8

    def parts(self) -> Iterator[slice]:
        """Yield the rows that are coded together: one, then half as many as there were."""
        start, height = 0, _height(self.shape[1])
        while start < self.shape[0]:
            stop = start + min(height, max(1, start // 2))
            yield slice(start, stop)
            start = stop

    def saw(self, codes: np.ndarray, index: np.ndarray) -> None:
        """Learn from some rows and the tables that they named."""
        codes, index = codes[index != SILENT], index[index != SILENT]
        most, scale = (np.array(one)[index, None] for one in _scales())
        self._energy += (np.minimum(np.abs(codes.astype(np.int64)), most) ** 2 * scale >> 24).sum(axis=0)
        self._rows += len(index)
        self.shifts = np.searchsorted(_thresholds(self._rows), self._energy, side="right") - _FARTHEST


@cache
def _scales() -> tuple[list[int], list[int]]:
    """Return for each table the magnitude that counts at most, 16 spreads, and 2 ** 32 over its squared spread."""
    tables = range(LOUDEST + 1)
    return [isqrt(isqrt(1 << max(0, table - 1))) + 1 for table in tables], [isqrt(1 << 81 - table) for table in tables]


def _thresholds(rows: int) -> list[int]:
    """Return from which energy on a column is one table more from its rows'; 2 ** ((2 shift - 1) / 4) for each row."""
    steps = range(1 - _FARTHEST, _FARTHEST + 1)
    return [isqrt(isqrt((rows << 8) ** 4 << 2 * step - 1 + 64)) >> 16 for step in steps]


def cheapest(codes: np.ndarray, shifts: np.ndarray | None) -> tuple[float, int, np.ndarray]:
    """Return the bits, the family and, for each row, the table that codes it in the fewest of them."""
    classes, families = needed_classes(codes), range(FAMILIES)
    bits, index = np.zeros((FAMILIES, len(codes))), np.zeros((FAMILIES, len(codes)), np.int64)
    for part in Fixed(codes.shape, shifts).parts():
        for family, costs in enumerate(_costs(codes[part], shifts, families, classes)):
            bits[family, part], index[family, part] = costs.min(axis=1), costs.argmin(axis=1)
    family = int(bits.sum(axis=1).argmin())
    return float(bits[family].sum()), family, index[family]


def followed(codes: np.ndarray, family: int, classes: int) -> tuple[float, np.ndarray]:
    """Return the bits and the tables of rows where tables follow the columns."""
    following, bits, index = Following(codes.shape), 0.0, np.zeros(len(codes), np.int64)
    for part in following.parts():
        costs = next(_costs(codes[part], following.shifts, [family], classes))
        bits, index[part] = bits + float(costs.min(axis=1).sum()), costs.argmin(axis=1)
        following.saw(codes[part], index[part])
    return bits, index


def _costs(codes: np.ndarray, shifts: np.ndarray | None, families: Iterable[int], classes: int) -> Iterator[np.ndarray]:
    """Yield for each family the bits that each row takes under each table, shape (rows, 64)."""
    rows, silent = len(codes), ~codes.any(axis=1)
    steps, of_columns = (np.zeros(1, np.int64), 0) if shifts is None else np.unique(shifts, return_inverse=True)
    place = class_of(fold(codes.astype(np.int32))) + classes * (of_columns + len(steps) * np.arange(rows)[:, None])
    counts = np.bincount(place.ravel(), minlength=rows * len(steps) * classes).reshape(rows, -1)
    moved = np.clip(np.arange(1, LOUDEST + 1) + steps[:, None], 1, LOUDEST) - 1  # (steps, 63)
    for family in families:
        costs = np.where(silent, 0, np.inf)[:, None].repeat(LOUDEST + 1, axis=1)
        costs[:, 1:] = counts @ table_bits(family, classes)[moved].transpose(0, 2, 1).reshape(-1, LOUDEST)
        yield costs


def _height(columns: int) -> int:
    """Return how many rows are coded together at most."""
    return max(1, _BLOCK // max(1, columns))


def needed_classes(values: np.ndarray) -> int:
    """Return how many classes the values need, at least 2."""
    largest = fold(np.array([values.min(initial=0), values.max(initial=0)], np.int32)).max()
    return max(2, int(class_of(np.array([largest]))[0]) + 1)
