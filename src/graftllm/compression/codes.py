"""Quantiser codes as bytes: integers under tables that the format fixes, in one ANS stream.

Every row of a matrix names the table that fits it best, so that strong and silent directions share a
stream without paying for each other. There are two families of tables, Gaussian and Laplacian, of 63
spreads each, a fourth of an octave apart. They are computed with whole numbers only: every platform
has the same. Values are folded and classed as in `entropy`.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from math import isqrt
from typing import Any

import constriction
import numpy as np

from graftllm.compression.entropy import FREQUENCIES, class_of, fold, low_bits, perfect_model, unfold

SILENT = 0  # the table of a row that is all zeros: nothing is coded
LOUDEST = 63
LARGEST = 1 << 22  # codes are below this in magnitude
_FAMILIES = 2
_CLASSES = 4 * 24 - 4  # those of folded values below 2 ** 24
_BLOCK = 1 << 22  # values that are put in order at a time; bounds the memory of coding
_ONE = 1 << 64
# 2 ** 64 * 2 ** -(2 ** (i / 4)) for i = 0 to 3, rounded
_ROOTS = (9223372036854775808, 8089705464700925726, 6921480822830546630, 5749758898252946309)
_STREAM: Any = getattr(constriction, "stream")  # noqa: B009 - its stubs do not name the submodules


class CodeWriter:
    """Collects vectors and matrices of signed integers; `payload` gives their bytes."""

    def __init__(self) -> None:
        """Start empty."""
        self._head: list[bytes] = []
        self._steps: list[tuple[np.ndarray, Any]] = []  # (symbols, model), in the order of decoding

    def vector(self, values: np.ndarray) -> None:
        """Add a few integers (side information), shape (count,): one table for all of them."""
        family, index = _best_table(values[None])
        self._head.append(bytes([family, int(index[0]), _classes(values)]))
        self._add(values[None], index, family, _classes(values), None)

    def matrix(self, codes: np.ndarray, shifts: np.ndarray | None = None) -> None:
        """Add codes of shape (rows, columns), int32.

        Args:
            codes: below `LARGEST` in magnitude.
            shifts: shape (columns,); how many tables up from its row's a column is, as the decoder knows it.
        """
        family, index = _best_table(codes, shifts)
        first = int(index[0]) if len(index) else 0
        self._head.append(bytes([family, first, _classes(codes)]))
        self.vector(np.diff(index, prepend=first).astype(np.int32))
        for start, stop in _row_blocks(codes.shape):
            self._add(codes[start:stop], index[start:stop], family, _classes(codes), shifts)

    def payload(self) -> np.ndarray:
        """Return all that was added as bytes: length of the head (u16), the head, the ANS words (u32 each)."""
        coder = _STREAM.stack.AnsCoder()
        for symbols, model in reversed(self._steps):
            coder.encode_reverse(symbols, model)
        head = b"".join(self._head)
        words = coder.get_compressed().astype("<u4").tobytes()
        return np.frombuffer(len(head).to_bytes(2, "little") + head + words, np.uint8)

    def _add(self, values: np.ndarray, index: np.ndarray, family: int, classes: int, shifts: np.ndarray | None) -> None:
        folded = fold(values.astype(np.int32))
        for table, chosen in _groups(values.shape, index, shifts):
            part = folded[chosen].ravel()
            numbers = class_of(part)
            self._steps.append((numbers, _model(family, table, classes)))
            self._steps += [
                ((part[numbers == number] & ((1 << low_bits(number)) - 1)).astype(np.int32), _uniform(number))
                for number in range(8, classes)
                if bool((numbers == number).any())
            ]


class CodeReader:
    """Gives back what a `CodeWriter` was given, in the same order.

    Raises:
        ValueError: everywhere, when the bytes are not such a stream.
    """

    def __init__(self, payload: np.ndarray) -> None:
        """Start at the front of what `CodeWriter.payload` gave."""
        size = int.from_bytes(payload[:2].tobytes(), "little")
        words = len(payload) - 2 - size
        if words < 0 or words % 4:
            raise ValueError(f"expected a head of {size} bytes and whole words, found {len(payload)} bytes")
        self._head = iter(payload[2 : 2 + size].tolist())
        self._coder = _STREAM.stack.AnsCoder(payload[2 + size :].copy().view("<u4").astype(np.uint32))

    def vector(self, count: int) -> np.ndarray:
        """Return `count` integers, int32."""
        family, index, classes = self._described()
        return self._read((1, count), np.array([index]), family, classes, None)[0]

    def matrix(self, rows: int, columns: int, shifts: np.ndarray | None = None) -> np.ndarray:
        """Return codes of shape (rows, columns), int32."""
        family, first, classes = self._described()
        index = first + np.cumsum(self.vector(rows), dtype=np.int64)
        if rows and not SILENT <= index.min() <= index.max() <= LOUDEST:
            raise ValueError(f"expected tables from {SILENT} to {LOUDEST}, found {index.min()} to {index.max()}")
        codes = np.zeros((rows, columns), np.int32)
        for start, stop in _row_blocks(codes.shape):
            part = self._read((stop - start, columns), index[start:stop], family, classes, shifts)
            codes[start:stop] = part
        return codes

    def finish(self) -> None:
        """Check that nothing is left over."""
        if next(self._head, None) is not None or not self._coder.is_empty():
            raise ValueError("expected the end of the codes, found more")

    def _described(self) -> tuple[int, int, int]:
        family, index, classes = (next(self._head, -1) for _ in range(3))
        if not (0 <= family < _FAMILIES and 0 <= index <= LOUDEST and 2 <= classes <= _CLASSES):
            raise ValueError(f"expected a family, a table and a number of classes, found {family}, {index}, {classes}")
        return family, index, classes

    def _read(
        self, shape: tuple[int, int], index: np.ndarray, family: int, classes: int, shifts: np.ndarray | None
    ) -> np.ndarray:
        folded = np.zeros(shape, np.uint32)
        for table, chosen in _groups(shape, index, shifts):
            place = folded[chosen]
            numbers = self._coder.decode(_model(family, table, classes), place.size)
            part = numbers.astype(np.uint32)
            for number in range(8, classes):
                here = numbers == number
                if bool(here.any()):
                    rest = self._coder.decode(_uniform(number), int(here.sum())).astype(np.uint32)
                    part[here] = rest | np.uint32((4 + number % 4) << low_bits(number))
            folded[chosen] = part.reshape(place.shape)
        return unfold(folded)


def code_bits(codes: np.ndarray, shifts: np.ndarray | None = None) -> float:
    """Return how many bits `CodeWriter.matrix` will take for these codes, without its few bytes of side information."""
    return float(min(_costs(codes, shifts, family).min(axis=1).sum() for family in range(_FAMILIES)))


def _groups(shape: tuple[int, int], index: np.ndarray, shifts: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the tables in use, ascending, and which values each of them codes (whole rows, or a mask of `shape`)."""
    if shifts is None:
        for table in np.unique(index[index != SILENT]):
            yield int(table), np.flatnonzero(index == table)
        return
    tables = np.where(index[:, None] == SILENT, SILENT, np.clip(index[:, None] + shifts, 1, LOUDEST)).astype(np.uint8)
    for table in np.flatnonzero(np.bincount(tables.ravel(), minlength=2)[1:]) + 1 if tables.size else ():
        yield int(table), tables == table


def _row_blocks(shape: tuple[int, int]) -> Sequence[tuple[int, int]]:
    height = max(1, _BLOCK // max(1, shape[1]))
    return [(start, min(start + height, shape[0])) for start in range(0, shape[0], height)]


def _classes(values: np.ndarray) -> int:
    """Return how many classes the values need, at least 2."""
    largest = fold(np.array([values.min(initial=0), values.max(initial=0)], np.int32)).max()
    return max(2, int(class_of(np.array([largest]))[0]) + 1)


def _best_table(codes: np.ndarray, shifts: np.ndarray | None = None) -> tuple[int, np.ndarray]:
    """Return the family and, for each row, the table that codes it in the fewest bits."""
    costs = [_costs(codes, shifts, family) for family in range(_FAMILIES)]
    family = int(np.argmin([cost.min(axis=1).sum() for cost in costs]))
    return family, costs[family].argmin(axis=1)


def _costs(codes: np.ndarray, shifts: np.ndarray | None, family: int) -> np.ndarray:
    """Return the bits that each row takes under each table, shape (rows, 64)."""
    rows, classes = len(codes), _classes(codes)
    bits = np.stack([_bits(family, table, classes) for table in range(1, LOUDEST + 1)], axis=1)  # (classes, 63)
    costs = np.zeros((rows, LOUDEST + 1))
    for shift in np.unique(shifts) if shifts is not None else [0]:
        columns = codes if shifts is None else codes[:, shifts == shift]
        counts = np.zeros((rows, classes))
        for start, stop in _row_blocks(columns.shape):
            numbers = class_of(fold(columns[start:stop].astype(np.int32)))
            flat = numbers + classes * np.arange(stop - start)[:, None]
            counts[start:stop] = np.bincount(flat.ravel(), minlength=(stop - start) * classes).reshape(-1, classes)
        shifted = np.clip(np.arange(1, LOUDEST + 1) + shift, 1, LOUDEST) - 1
        costs[:, 1:] += counts @ bits[:, shifted]
    costs[:, SILENT] = np.where((codes != 0).any(axis=1), np.inf, 0)
    return costs


@cache
def _bits(family: int, table: int, classes: int) -> np.ndarray:
    """Return the information content of each class and its low bits."""
    free = [0] * 8 + [low_bits(number) for number in range(8, classes)]
    return np.log2(FREQUENCIES) - np.log2(table_frequencies(family, table, classes)) + free[:classes]


@cache
def _model(family: int, table: int, classes: int) -> Any:
    return perfect_model(table_frequencies(family, table, classes))


def _uniform(number: int) -> Any:
    """Return the coder's model of a class's low bits: all equally probable."""
    return _STREAM.model.Uniform(1 << low_bits(number))


def table_frequencies(family: int, table: int, classes: int) -> np.ndarray:
    """Return a table's frequencies: whole numbers of at least 1 that sum to 2 ** 16.

    With magnitude q and spread s, class weights are its number of values times exp(-q^2 / 2 s^2) (family 0)
    or exp(-sqrt(2) q / s) (family 1), s close to 2 ** ((table - 17) / 4).

    Args:
        family: 0 or 1.
        table: 1 to 63.
        classes: how many of the first classes there are.
    """
    weights = np.array(_weights(family, table, classes), dtype=object)
    frequencies = np.maximum(1, weights * FREQUENCIES // weights.sum()).astype(np.int64)
    frequencies[np.argmax(frequencies)] += FREQUENCIES - frequencies.sum()
    return frequencies


@cache
def _weights(family: int, table: int, classes: int) -> list[int]:
    """Return class weights in units of 2 ** -64; w = rho ** (m ** 2) or rho ** m, m four times the magnitude."""
    rho = _root(16 - 2 * table) if family == 0 else _root(13 - table)
    weights = []
    for number in range(classes):
        low = number if number < 8 else (4 + number % 4) << low_bits(number)
        width = 1 if number < 8 else 1 << low_bits(number)
        m = 4 * ((number + 1) // 2) if number < 8 else 2 * low + width
        weights.append(width * _power(rho, m * m if family == 0 else m))
    return weights


@cache
def _root(quarters: int) -> int:
    """Return 2 ** -(2 ** (quarters / 4)) in units of 2 ** -64: four constants, squared or their whole square roots."""
    if quarters > 3:
        return _root(quarters - 4) ** 2 >> 64
    if quarters < 0:
        return isqrt(_root(quarters + 4) << 64)
    return _ROOTS[quarters]


def _power(rho: int, exponent: int) -> int:
    """Return rho ** exponent, both in units of 2 ** -64, truncated at every step."""
    power = _ONE
    while exponent and power:
        if exponent & 1:
            power = power * rho >> 64
        rho = rho * rho >> 64
        exponent >>= 1
    return power
