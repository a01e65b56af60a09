"""Small unsigned integers packed at their width: bit k of value i is bit i * width + k of the stream."""

import numpy as np

_CHUNK = 1 << 20  # values; a multiple of 8, so that every chunk but the last ends on a whole byte


def packed_nbytes(count: int, width: int) -> int:
    """Return how many bytes `count` values of `width` bits take.

    >>> packed_nbytes(3, 3), packed_nbytes(8, 1), packed_nbytes(5, 0)
    (2, 1, 0)
    """
    return (count * width + 7) // 8


def pack_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Return values of `width` bits, low bit first and without gaps, as bytes.

    >>> pack_bits(np.array([1, 2, 3]), 2).tolist()
    [57]

    Args:
        values: shape (count,), each in [0, 2 ** width).
        width: 0 to 64.
    """
    if width == 8:
        return values.astype(np.uint8)
    places = np.arange(width, dtype=np.uint64)
    chunks = [
        np.packbits(
            (values[start : start + _CHUNK, None].astype(np.uint64) >> places & np.uint64(1)).astype(bool),
            bitorder="little",
        )
        for start in range(0, len(values), _CHUNK)
    ]
    return np.concatenate(chunks) if chunks else np.empty(0, np.uint8)


def unpack_bits(data: np.ndarray, count: int, width: int) -> np.ndarray:
    """Return the `count` values that `pack_bits` packed, in the smallest unsigned dtype that holds them.

    >>> unpack_bits(np.array([57], dtype=np.uint8), 3, 2).tolist()
    [1, 2, 3]

    Raises:
        ValueError: `data` is not exactly as long as such values take.
    """
    if len(data) != packed_nbytes(count, width):
        raise ValueError(f"expected {packed_nbytes(count, width)} bytes of packed values, found {len(data)}")
    if width == 8:
        return data.copy()
    values = np.zeros(count, f"u{next(size for size in (1, 2, 4, 8) if 8 * size >= width)}")
    places = np.arange(width, dtype=np.uint64)
    for start in range(0, count, _CHUNK):
        some = min(_CHUNK, count - start)
        first = start * width // 8
        bits = np.unpackbits(data[first : first + packed_nbytes(some, width)], count=some * width, bitorder="little")
        values[start : start + some] = (bits.reshape(some, width).astype(np.uint64) << places).sum(
            axis=1, dtype=np.uint64
        )
    return values
