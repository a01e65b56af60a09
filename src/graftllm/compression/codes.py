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

from graftllm.compression.entropy import FREQUENCIES, class_of, fold, low_bits, perfect_model, scaled, unfold

SILENT = 0  # the table of a row that is all zeros: nothing is coded
LOUDEST = 63
LARGEST = 1 << 30  # codes are below this in magnitude
_FAMILIES = 2
_OWN = 2  # in place of a family: the table follows
_CLASSES = 4 * 31 - 4  # those of folded values below 2 ** 31
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
        self._steps: list[tuple[np.ndarray, Any]] = []  # symbols and their model or limits, in the order of decoding

    def vector(self, values: np.ndarray) -> None:
        """Add integers that are alike, shape (count,), int32: one table for all of them, or one of their own."""
        classes = _classes(values)
        counts = np.bincount(class_of(fold(values.astype(np.int32))), minlength=classes)
        own, bits = scaled(counts), _free_bits(classes)
        costs = [_costs(values[None], None, family)[0] for family in range(_FAMILIES)]
        family = int(np.argmin([cost.min() for cost in costs]))
        index = int(costs[family].argmin())
        if 16 * classes + float(counts @ (np.log2(FREQUENCIES) - np.log2(own) + bits)) < costs[family][index]:
            self._head.append(bytes([_OWN, LOUDEST, classes]) + own.astype("<u2").tobytes())
            self._add(values[None], np.array([LOUDEST]), perfect_model(own), classes, None)
        else:
            self._head.append(bytes([family, index, classes]))
            self._add(values[None], np.array([index]), family, classes, None)

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

    def below(self, values: np.ndarray, limits: np.ndarray) -> None:
        """Add values of which nothing is known but that each is below its limit (at least 1), as the decoder knows."""
        values, limits = values[limits > 1].astype(np.int64), limits[limits > 1].astype(np.int64)
        wide = limits > 1 << 16
        high = limits[wide] - 1 >> 16
        self._steps.append(((values[wide] >> 16).astype(np.int32), (high + 1).astype(np.int32)))
        rest = np.where(wide, 1 << 16, limits)
        self._steps.append(((values & 0xFFFF).astype(np.int32), rest.astype(np.int32)))

    def payload(self) -> np.ndarray:
        """Return all that was added as bytes: length of the head (u16), the head, the ANS words (u32 each)."""
        coder = _STREAM.stack.AnsCoder()
        for symbols, model in reversed(self._steps):
            if isinstance(model, np.ndarray):
                coder.encode_reverse(symbols, _STREAM.model.Uniform(), model)
            else:
                coder.encode_reverse(symbols, model)
        head = b"".join(self._head)
        words = coder.get_compressed().astype("<u4").tobytes()
        return np.frombuffer(len(head).to_bytes(2, "little") + head + words, np.uint8)

    def _add(self, values: np.ndarray, index: np.ndarray, family: int, classes: int, shifts: np.ndarray | None) -> None:
        folded = fold(values.astype(np.int32))
        for table, chosen in _groups(values.shape, index, shifts):
            part = folded[chosen].ravel()
            numbers = class_of(part)
            self._steps.append((numbers, _model(family, table, classes) if isinstance(family, int) else family))
            for number in range(8, classes):
                here = numbers == number
                if bool(here.any()):
                    self._bits(part[here] & ((1 << low_bits(number)) - 1), low_bits(number))

    def _bits(self, values: np.ndarray, width: int) -> None:
        """Add values of `width` bits as they are, the low 16 first."""
        for place in range(0, width, 16):
            symbols = values >> place & ((1 << min(16, width - place)) - 1)
            self._steps.append((symbols.astype(np.int32), _uniform(min(16, width - place))))


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
        family, index, classes = self._described(_OWN)
        model: Any = family
        if family == _OWN:
            own = np.frombuffer(bytes(next(self._head, 0) for _ in range(2 * classes)), "<u2").astype(np.int64)
            if own.sum() != FREQUENCIES or own.min() < 1:
                raise ValueError(f"expected frequencies above 0 that sum to {FREQUENCIES}, found {own.sum()}")
            model = perfect_model(own)
        return self._read((1, count), np.array([index]), model, classes, None)[0]

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

    def below(self, limits: np.ndarray) -> np.ndarray:
        """Return a value below each limit, int64; limits are at least 1 and at most 2 ** 32."""
        values = np.zeros(len(limits), np.int64)
        known, limits = np.flatnonzero(limits > 1), limits[limits > 1].astype(np.int64)
        wide = limits > 1 << 16
        high = (limits[wide] - 1 >> 16) + 1
        values[known[wide]] = self._coder.decode(_STREAM.model.Uniform(), high.astype(np.int32)).astype(np.int64) << 16
        rest = np.where(wide, 1 << 16, limits).astype(np.int32)
        values[known] |= self._coder.decode(_STREAM.model.Uniform(), rest)
        return values

    def finish(self) -> None:
        """Check that nothing is left over."""
        if next(self._head, None) is not None or not self._coder.is_empty():
            raise ValueError("expected the end of the codes, found more")

    def _described(self, families: int = _FAMILIES - 1) -> tuple[int, int, int]:
        family, index, classes = (next(self._head, -1) for _ in range(3))
        if not (0 <= family <= families and 0 <= index <= LOUDEST and 2 <= classes <= _CLASSES):
            raise ValueError(f"expected a family, a table and a number of classes, found {family}, {index}, {classes}")
        return family, index, classes

    def _read(
        self, shape: tuple[int, int], index: np.ndarray, family: Any, classes: int, shifts: np.ndarray | None
    ) -> np.ndarray:
        folded = np.zeros(shape, np.uint32)
        for table, chosen in _groups(shape, index, shifts):
            place = folded[chosen]
            model = _model(family, table, classes) if isinstance(family, int) else family
            numbers = self._coder.decode(model, place.size)
            part = numbers.astype(np.uint32)
            wide = np.flatnonzero(numbers >= 8)  # their low bits follow, class by class
            wide = wide[np.argsort(numbers[wide].astype(np.uint8), kind="stable")]
            for here in np.split(wide, np.flatnonzero(np.diff(numbers[wide])) + 1) if len(wide) else ():
                number = int(numbers[here[0]])
                rest = self._bits(len(here), low_bits(number))
                part[here] = rest | np.uint32((4 + number % 4) << low_bits(number))
            folded[chosen] = part.reshape(place.shape)
        return unfold(folded)

    def _bits(self, count: int, width: int) -> np.ndarray:
        values = np.zeros(count, np.uint32)
        for place in range(0, width, 16):
            symbols = self._coder.decode(_uniform(min(16, width - place)), count)
            values |= symbols.astype(np.uint32) << np.uint32(place)
        return values


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
    return np.log2(FREQUENCIES) - np.log2(table_frequencies(family, table, classes)) + _free_bits(classes)


def _free_bits(classes: int) -> np.ndarray:
    return np.array([low_bits(number) if number >= 8 else 0 for number in range(classes)])


@cache
def _model(family: int, table: int, classes: int) -> Any:
    return perfect_model(table_frequencies(family, table, classes))


@cache
def _uniform(width: int) -> Any:
    """Return the coder's model of values of `width` bits that are all equally probable."""
    return _STREAM.model.Uniform(1 << width)


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
