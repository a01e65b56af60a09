"""Entropy coding of integers, the same to the bit on every platform.

A signed integer is folded to an unsigned one (0, -1, 1, -2 -> 0, 1, 2, 3) and split in two: its
class, which an ANS coder (arXiv 1311.2540, by `constriction`) writes at its information content
under one table of frequencies, and the rest, written as it is. Values below 8 are their own class;
above, a class holds the values of one bit length with the same two bits below the leading one.
Tables are stored as integers and never recomputed from floating-point numbers.
"""

from collections.abc import Iterator
from typing import Any

import constriction
import numpy as np

from graftllm.compression.bits import pack_bits, packed_nbytes, unpack_bits

BLOCK = 1 << 22  # values that share one table; bounds the memory of coding
FREQUENCIES = 1 << 16  # what a table's frequencies sum to
_ANS: Any = getattr(constriction, "stream")  # noqa: B009 - its stubs do not name the submodules
_ANS_TOTAL = 1 << 24  # the coder's own resolution, 2 ** 8 times as fine


def fold(values: np.ndarray) -> np.ndarray:
    """Return signed integers as unsigned ones of the same width, small magnitudes first.

    >>> fold(np.array([0, -1, 1, -2], dtype=np.int16)).tolist()
    [0, 1, 2, 3]
    """
    width = values.dtype.itemsize * 8
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    return (values << 1 ^ values >> (width - 1)).view(unsigned)


def unfold(values: np.ndarray) -> np.ndarray:
    """Return the signed integers that `fold` folded.

    >>> unfold(np.array([0, 1, 2, 3], dtype=np.uint16)).tolist()
    [0, -1, 1, -2]
    """
    signed = np.dtype(f"i{values.dtype.itemsize}")
    return (values >> 1).view(signed) ^ -(values & 1).view(signed)


def encode_integers(values: np.ndarray) -> np.ndarray:
    """Return unsigned integers as bytes, in blocks of 2 ** 22 values.

    Each block: the number of classes (1 byte); their frequencies (u16 each, sum 2 ** 16); the
    number of ANS words (u32); the words (u32 each); then for each class from 8 on, the low bits of
    its values, packed and padded to a byte: `class // 4 - 1` bits each.

    Args:
        values: shape (count,), unsigned, below 2 ** 53.
    """
    blocks = [_encode_block(values[start : start + BLOCK]) for start in range(0, len(values), BLOCK)]
    return np.concatenate(blocks) if blocks else np.empty(0, np.uint8)


def decode_integers(data: np.ndarray, count: int, dtype: np.dtype) -> np.ndarray:
    """Return the `count` integers that `encode_integers` wrote, as unsigned `dtype`.

    Raises:
        ValueError: the bytes are not such an encoding of exactly `count` values that fit `dtype`.
    """
    values = np.empty(count, dtype)
    for start, part in decoded_blocks(data, count, dtype):
        values[start : start + len(part)] = part
    return values


def decoded_blocks(data: np.ndarray, count: int, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    """Yield what `decode_integers` returns in blocks of 2 ** 22, each with where it begins; errors are the same."""
    reader = _Reader(data)
    for start in range(0, count, BLOCK):
        yield start, _decode_block(reader, min(BLOCK, count - start), dtype)
    if reader.left:
        raise ValueError(f"expected {count} coded integers, found {reader.left} bytes more")


def _encode_block(values: np.ndarray) -> np.ndarray:
    classes = class_of(values)
    frequencies = scaled(np.bincount(classes, minlength=2))
    coder = _ANS.stack.AnsCoder()
    coder.encode_reverse(classes, perfect_model(frequencies))
    words = coder.get_compressed()
    rests = [
        pack_bits(values[classes == number] & ((1 << low_bits(number)) - 1), low_bits(number))
        for number in range(_DIRECT, len(frequencies))
    ]
    parts = [
        np.array([len(frequencies)], np.uint8),
        frequencies.astype("<u2").view(np.uint8),
        np.array([len(words)], "<u4").view(np.uint8),
        words.astype("<u4").view(np.uint8),
        *rests,
    ]
    return np.concatenate(parts)


def _decode_block(reader: "_Reader", count: int, dtype: np.dtype) -> np.ndarray:
    size, most = int(reader.take(1)[0]), 4 * dtype.itemsize * 8 - 4
    if not 2 <= size <= most:
        raise ValueError(f"expected 2 to {most} classes, found {size}")
    frequencies = reader.take(2 * size).view("<u2").astype(np.int64)
    if frequencies.sum() != FREQUENCIES or frequencies.min() < 1:
        raise ValueError(f"expected frequencies above 0 that sum to {FREQUENCIES}, found {frequencies.sum()}")
    words = reader.take(4 * int(reader.take(4).view("<u4")[0])).view("<u4").astype(np.uint32)
    coder = _ANS.stack.AnsCoder(words)
    classes = coder.decode(perfect_model(frequencies), count)
    if not coder.is_empty():
        raise ValueError(f"expected {count} coded classes, found more")
    values = classes.astype(dtype)
    for number in range(_DIRECT, size):
        here = np.flatnonzero(classes == number)
        width = low_bits(number)
        rest = unpack_bits(reader.take(packed_nbytes(len(here), width)), len(here), width)
        values[here] = (rest | np.uint64((4 + number % 4) << width)).astype(dtype)
    return values


_DIRECT = 8  # values below this are their own class


def class_of(values: np.ndarray) -> np.ndarray:
    """Return each value's class; four to a bit length from 8 on, so class 8 holds 8 and 9, class 9 holds 10 and 11."""
    if values.max(initial=0) < len(_CLASS_OF):
        return _CLASS_OF[values]
    return _computed_class(values)


def _computed_class(values: np.ndarray) -> np.ndarray:
    lengths = np.frexp(values.astype(np.float64))[1].astype(np.int32)
    lengths_below = np.maximum(lengths - 3, 0)
    leading = (values >> lengths_below.astype(values.dtype)).astype(np.int32)  # 4 to 7 from 4 on
    return np.where(values < _DIRECT, values.astype(np.int32), 4 * lengths_below + leading).astype(np.int32)


_CLASS_OF = _computed_class(np.arange(1 << 16, dtype=np.uint32))


def low_bits(number: int) -> int:
    """Return how many bits of a value its class leaves open."""
    return number // 4 - 1


def scaled(counts: np.ndarray) -> np.ndarray:
    """Return counts scaled to integers of at least 1 that sum to 2 ** 16."""
    frequencies = np.maximum(1, counts * FREQUENCIES // max(1, counts.sum()))
    frequencies[np.argmax(frequencies)] += FREQUENCIES - frequencies.sum()
    return frequencies


def perfect_model(frequencies: np.ndarray) -> Any:
    """Return the coder's model of a table, without rounding.

    The coder gives symbol i the share 1 + floor(p_i * (2 ** 24 - n)) / 2 ** 24. With whole p_i that
    sum to 2 ** 24 - n, nothing is rounded and the share is exactly frequency / 2 ** 16.
    """
    whole = frequencies.astype(np.float64) * (_ANS_TOTAL // FREQUENCIES) - 1
    return _ANS.model.Categorical(whole, perfect=False)


class _Reader:
    """Bytes taken from the front, never past the end."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.position = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, count: int) -> np.ndarray:
        if count > self.left:
            raise ValueError(f"expected {count} bytes more, found {self.left}")
        self.position += count
        return np.ascontiguousarray(self.data[self.position - count : self.position])
