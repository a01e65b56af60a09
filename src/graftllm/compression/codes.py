"""Quantiser codes as bytes: integers under tables that the format fixes, in one ANS stream.

Every row of a matrix names the table that fits it best, so that strong and silent directions share a
stream without paying for each other. Where some columns are louder than others, tables follow what was
read of each column before. Values are folded and classed as in `entropy`.
"""

import math
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import constriction
import numpy as np

from graftllm.compression.columns import Fixed, Following, cheapest, followed, needed_classes
from graftllm.compression.entropy import FREQUENCIES, class_of, fold, perfect_model, scaled, unfold
from graftllm.compression.tables import (
    CLASSES,
    FAMILIES,
    LOUDEST,
    SILENT,
    SIZES,
    STARTS,
    table_bits,
    table_model,
)

LARGEST = 1 << 30  # codes are below this in magnitude
_OWN = 2  # in place of a family: the table follows
_ALONE, _LINE, _STEPS = range(3)  # what the integers of a vector are told from: nothing, a line, the one before
_LONGEST, _HIGHEST = 1 << 14, 2000  # of vectors that are told from something: their length and magnitude
_WIDE = 1 << 16  # limits above this take two symbols
_PAYING = 0.99  # following the columns takes longer to read, so it has to take fewer bits than this share
_STREAM: Any = getattr(constriction, "stream")  # noqa: B009 - its stubs do not name the submodules
_FIELDS = ("", "hb", "h")  # of that in the head: height and rise of the line, the first
_Models = Callable[[int], Any]  # the coder's model of a table, by its number


class CodeWriter:
    """Collects vectors and matrices of signed integers; `payload` gives their bytes."""

    def __init__(self) -> None:
        """Start empty."""
        self._head: list[bytes] = []
        self._steps: list[tuple[np.ndarray, Any]] = []  # symbols and their model or limits, in the order of decoding

    def vector(self, values: np.ndarray) -> None:
        """Add integers that are alike, shape (count,), int32: one table for all of them, or one of their own.

        Where that takes fewer bytes they are told from a straight line, or each from the one before.
        """
        told: list[tuple[int, tuple[int, ...], np.ndarray]] = [(_ALONE, (), values)]
        if 1 < len(values) <= _LONGEST and np.abs(values).max() <= _HIGHEST:
            line = _line_through(values)
            told.append((_LINE, line, values - _line(len(values), *line)))
            told.append((_STEPS, (int(values[0]),), np.diff(values, prepend=values[0])))
        _, head, table, models, rest = min((_told(*one) for one in told), key=lambda one: one[0])
        self._head.append(head)
        self._add(rest[None], np.array([table]), models)

    def matrix(self, codes: np.ndarray, shifts: np.ndarray | None = None) -> None:
        """Add codes of shape (rows, columns), int32.

        Args:
            codes: below `LARGEST` in magnitude.
            shifts: shape (columns,); how many tables up from its row's a column is, as the decoder knows it. Without
                them tables may follow the columns.
        """
        classes, (bits, family, index) = needed_classes(codes), cheapest(codes, shifts)
        shifted: Fixed = Fixed(codes.shape, shifts)
        if shifts is None:
            fewer, of_rows = followed(codes, family, classes)
            if fewer < _PAYING * bits:
                shifted, index = Following(codes.shape), of_rows
        self._head.append(bytes([family + 4 * isinstance(shifted, Following), classes]))
        self.vector(index)
        for part in shifted.parts():
            self._add(codes[part], shifted.tables(index[part]), partial(table_model, family, classes=classes))
            shifted.saw(codes[part], index[part])

    def below(self, values: np.ndarray, limits: np.ndarray) -> None:
        """Add values of which nothing is known but that each is below its limit (at least 1), as the decoder knows."""
        values, limits = values[limits > 1].astype(np.int64), limits[limits > 1].astype(np.int64)
        wide = limits > _WIDE
        high = limits[wide] - 1 >> 16
        self._steps.append(((values[wide] >> 16).astype(np.int32), (high + 1).astype(np.int32)))
        self._steps.append(((values & 0xFFFF).astype(np.int32), np.where(wide, _WIDE, limits).astype(np.int32)))

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

    def _add(self, values: np.ndarray, tables: np.ndarray, models: _Models) -> None:
        """Add values, each under its table or that of its row."""
        folded = fold(values.astype(np.int32)).ravel()
        numbers = class_of(folded)
        by_table = numbers if tables.size == numbers.size else numbers.reshape(len(tables), -1)
        for table, chosen in _groups(tables):
            self._steps.append((by_table[chosen].ravel(), models(table)))
        self.below(folded - STARTS[numbers], SIZES[numbers])


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
        self._head = payload[2 : 2 + size].tobytes()
        self._coder = _STREAM.stack.AnsCoder(payload[2 + size :].copy().view("<u4").astype(np.uint32))

    def vector(self, count: int) -> np.ndarray:
        """Return `count` integers, int32."""
        told, table, classes = self._take("BBB")
        kind, family = divmod(told, 4)
        if kind > _STEPS or family > _OWN or table > LOUDEST or not 2 <= classes <= CLASSES:
            raise ValueError(f"expected a family, a table and a number of classes, found {told}, {table}, {classes}")
        models: _Models = partial(table_model, family, classes=classes)
        if family == _OWN:
            models = partial(_same, perfect_model(self._frequencies(classes)))
        line = self._take(_FIELDS[kind])
        rest = self._read((1, count), np.array([table]), models)[0]
        if kind == _LINE:
            rest = rest + _line(count, *line)
        elif kind == _STEPS:
            rest = line[0] + np.cumsum(rest, dtype=np.int64)
        return rest.astype(np.int32)

    def matrix(self, rows: int, columns: int, shifts: np.ndarray | None = None) -> np.ndarray:
        """Return codes of shape (rows, columns), int32."""
        told, classes = self._take("BB")
        follows, family = divmod(told, 4)
        if follows > (shifts is None) or family >= FAMILIES or not 2 <= classes <= CLASSES:
            raise ValueError(f"expected a family and a number of classes, found {told}, {classes}")
        index = self.vector(rows)
        if rows and not SILENT <= index.min() <= index.max() <= LOUDEST:
            raise ValueError(f"expected tables from {SILENT} to {LOUDEST}, found {index.min()} to {index.max()}")
        codes, models = np.zeros((rows, columns), np.int32), partial(table_model, family, classes=classes)
        shifted = Following(codes.shape) if follows else Fixed(codes.shape, shifts)
        for part in shifted.parts():
            codes[part] = self._read(codes[part].shape, shifted.tables(index[part]), models)
            shifted.saw(codes[part], index[part])
        return codes

    def below(self, limits: np.ndarray) -> np.ndarray:
        """Return a value below each limit, int64; limits are at least 1 and at most 2 ** 32."""
        values = np.zeros(len(limits), np.int64)
        known, limits = np.flatnonzero(limits > 1), limits[limits > 1].astype(np.int64)
        wide = limits > _WIDE
        high = (limits[wide] - 1 >> 16) + 1
        values[known[wide]] = self._coder.decode(_STREAM.model.Uniform(), high.astype(np.int32)).astype(np.int64) << 16
        rest = np.where(wide, _WIDE, limits).astype(np.int32)
        values[known] |= self._coder.decode(_STREAM.model.Uniform(), rest)
        return values

    def finish(self) -> None:
        """Check that nothing is left over."""
        if self._head or not self._coder.is_empty():
            raise ValueError("expected the end of the codes, found more")

    def _take(self, fields: str) -> tuple[int, ...]:
        """Return the next numbers of the head."""
        size = struct.calcsize(f"<{fields}")
        if len(self._head) < size:
            raise ValueError(f"expected {size} bytes more of the head, found {len(self._head)}")
        found, self._head = struct.unpack(f"<{fields}", self._head[:size]), self._head[size:]
        return found

    def _frequencies(self, classes: int) -> np.ndarray:
        own = np.array(self._take(f"{classes}H"), np.int64)
        if own.sum() != FREQUENCIES or own.min() < 1:
            raise ValueError(f"expected frequencies above 0 that sum to {FREQUENCIES}, found {own.sum()}")
        return own

    def _read(self, shape: tuple[int, ...], tables: np.ndarray, models: _Models) -> np.ndarray:
        """Return values, each under its table or that of its row."""
        numbers = np.zeros(shape, np.int32)
        by_table = numbers.reshape(-1) if tables.shape == shape else numbers
        for table, chosen in _groups(tables):
            place = (len(chosen), *by_table.shape[1:])
            by_table[chosen] = self._coder.decode(models(table), math.prod(place)).reshape(place)
        values = numbers.reshape(-1)
        wide = np.flatnonzero(values >= 8)  # their low bits follow
        if len(wide):
            classes = values[wide]
            limits = SIZES[classes]
            if limits.max() <= _WIDE:
                rest = self._coder.decode(_STREAM.model.Uniform(), limits)
            else:
                rest = self.below(limits).astype(np.int32)
            values[wide] = STARTS[classes] + rest
        return unfold(numbers.view(np.uint32))


def _groups(tables: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the tables in use but silence, ascending, and which of all are of them, in row-major order."""
    flat = tables.reshape(-1).astype(np.uint8)
    order, ends = np.argsort(flat, kind="stable"), np.bincount(flat, minlength=LOUDEST + 1).cumsum()
    for table in range(1, LOUDEST + 1):
        if ends[table] > ends[table - 1]:
            yield table, order[ends[table - 1] : ends[table]]


def _same(model: Any, _: int) -> Any:
    return model


def _told(kind: int, line: tuple[int, ...], rest: np.ndarray) -> tuple[float, bytes, int, _Models, np.ndarray]:
    """Return the bits that a vector takes, its head, table and models, and what is left to tell."""
    rest = rest.astype(np.int32)
    classes, after = needed_classes(rest), struct.pack(f"<{_FIELDS[kind]}", *line)
    counts = np.bincount(class_of(fold(rest)), minlength=classes)
    own, costs = scaled(counts), [table_bits(family, classes) @ counts for family in range(FAMILIES)]
    own_bits = 16 * classes + float(counts @ (np.log2(FREQUENCIES) - np.log2(own) + np.log2(SIZES[:classes])))
    family = int(np.argmin([cost.min() for cost in costs]))
    bits, table = float(costs[family].min()), int(costs[family].argmin()) + 1
    if not rest.any():
        bits, table = 0.0, SILENT
    if own_bits < bits:
        head = bytes([_OWN + 4 * kind, LOUDEST, classes]) + own.astype("<u2").tobytes() + after
        return own_bits + 8 * len(after), head, LOUDEST, partial(_same, perfect_model(own)), rest
    head = bytes([family + 4 * kind, table, classes]) + after
    return bits + 8 * len(after), head, table, partial(table_model, family, classes=classes), rest


def _line_through(values: np.ndarray) -> tuple[int, int]:
    """Return height, in sixteenths, and rise, in fourths, of the line that is nearest to integers."""
    rise, height = np.polyfit(np.arange(len(values)) / len(values), values, 1)
    return int(np.clip(np.rint(16 * height), -32768, 32767)), int(np.clip(np.rint(4 * rise), -128, 127))


def _line(count: int, height: int, rise: int) -> np.ndarray:
    """Return whole numbers along a line, int64: height / 16 + rise / 4 * i / count, rounded."""
    return (height * count + 4 * rise * np.arange(count) + 8 * count) // (16 * count)
