import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graftllm.compression import columns
from graftllm.compression.codes import CodeReader, CodeWriter
from graftllm.compression.columns import code_bits
from graftllm.compression.tables import LOUDEST, table_frequencies

MOST = (1 << 22) - 1
INTEGERS = st.integers(-2, 2) | st.integers(-300, 300) | st.integers(-MOST, MOST)
SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 9))


def _written(write: Callable[[CodeWriter], None]) -> np.ndarray:
    writer = CodeWriter()
    write(writer)
    return writer.payload()


def _coded(codes: np.ndarray, shifts: np.ndarray | None = None) -> np.ndarray:
    return _written(lambda writer: writer.matrix(codes, shifts))


def _gaussian(shape: tuple[int, int], spread: float | np.ndarray) -> np.ndarray:
    return (np.random.default_rng(0).normal(0, 1, shape) * spread).round().astype(np.int32)


def _entropy(spread: float) -> float:
    """Bits of a Gaussian of that spread that is rounded to whole numbers."""
    edges = np.arange(-math.ceil(9 * spread) - 1, math.ceil(9 * spread) + 2) - 0.5
    below = np.array([0.5 * math.erfc(-edge / spread / 2**0.5) for edge in edges])
    chances = np.diff(below)[np.diff(below) > 0]
    return float(-(chances * np.log2(chances)).sum())


@given(st.data(), SHAPES, st.booleans())
def test_codes_come_back(data: st.DataObject, shape: tuple[int, int], shifted: bool) -> None:
    codes = data.draw(hnp.arrays(np.int32, shape, elements=INTEGERS))
    beside = data.draw(hnp.arrays(np.int32, st.integers(1, 9), elements=INTEGERS))
    shifts = data.draw(hnp.arrays(np.int32, shape[1], elements=st.integers(-90, 90))) if shifted else None
    writer = CodeWriter()
    writer.vector(beside)
    writer.matrix(codes, shifts)
    writer.vector(beside[::-1].copy())
    reader = CodeReader(writer.payload())
    assert np.array_equal(reader.vector(len(beside)), beside)
    found = reader.matrix(*shape, shifts)
    assert found.dtype == np.int32
    assert np.array_equal(found, codes)
    assert np.array_equal(reader.vector(len(beside)), beside[::-1])
    reader.finish()


LIMITS = st.integers(1, 5) | st.integers(1, 70_000) | st.integers(1, 1 << 31)


@given(st.data(), st.lists(LIMITS, max_size=20))
def test_bounded_numbers_come_back(data: st.DataObject, limits: list[int]) -> None:
    numbers = np.array([data.draw(st.integers(0, limit - 1)) for limit in limits], np.int64)
    known, writer = np.array(limits, np.int64), CodeWriter()
    writer.below(numbers, known)
    reader = CodeReader(writer.payload())
    assert np.array_equal(reader.below(known), numbers)
    reader.finish()


def test_bounded_numbers_take_the_logarithms_of_their_limits() -> None:
    limits = 10 ** np.random.default_rng(0).integers(0, 9, 5000)
    numbers, writer = np.random.default_rng(1).integers(0, limits), CodeWriter()
    writer.below(numbers, limits)
    assert 8 * writer.payload().nbytes < 1.01 * np.log2(limits).sum() + 80


def test_vectors_unlike_any_table_bring_their_own() -> None:
    odd = np.random.default_rng(0).choice(np.array([-3, 0, 2], np.int32), 20_000)
    payload = _written(lambda writer: writer.vector(odd))
    assert 8 * payload.nbytes / len(odd) < 1.02 * math.log2(3)
    assert np.array_equal(CodeReader(payload).vector(len(odd)), odd)


def test_chunks_of_rows_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_BLOCK", 100)
    codes = _gaussian((31, 30), 2.0 ** np.linspace(-3, 6, 30))
    for shifts in (None, np.arange(30)):
        assert np.array_equal(CodeReader(_coded(codes, shifts)).matrix(31, 30, shifts), codes)


def test_silence_costs_nothing() -> None:
    assert _coded(np.zeros((10_000, 64), np.int32)).nbytes == 2 + 5
    assert _written(lambda writer: writer.vector(np.zeros(10_000, np.int32))).nbytes == 2 + 3


def test_silent_rows_among_loud_ones_cost_less_than_half_a_bit() -> None:
    loud = _gaussian((20, 500), 3)
    many = np.zeros((2000, 500), np.int32)
    many[::100] = loud
    assert 8 * (_coded(many).nbytes - _coded(loud).nbytes) < 0.5 * len(many)


@pytest.mark.parametrize("spread", [0.3, 0.5, 1.0, 3.0, 11.0, 300.0, 2000.0])
def test_gaussian_codes_take_their_entropy(spread: float) -> None:
    codes = _gaussian((200, 500), spread)
    bits = 8 * _coded(codes).nbytes / codes.size
    assert 0.98 * _entropy(spread) < bits < 1.015 * _entropy(spread)


def test_rows_of_many_spreads_take_their_own_entropies() -> None:
    spreads = 2.0 ** np.linspace(-1.5, 8, 100)
    codes = _gaussian((100, 1000), spreads[:, None])
    expected = 1000 * sum(map(_entropy, spreads))
    assert 0.99 * expected < 8 * _coded(codes).nbytes < 1.02 * expected


def test_shifts_let_columns_of_many_spreads_take_their_own_entropies() -> None:
    shifts = np.arange(-8, 24)
    codes = _gaussian((400, 32), 2.0 ** (shifts / 4))
    expected = 400 * sum(_entropy(2.0 ** (shift / 4)) for shift in shifts)
    assert 0.99 * expected < 8 * _coded(codes, shifts).nbytes < 1.02 * expected
    assert _coded(codes, np.zeros(32, np.int32)).nbytes > 1.1 * _coded(codes, shifts).nbytes


def test_tables_follow_columns_of_many_spreads_that_nobody_told() -> None:
    spreads = 2.0 ** np.linspace(-1, 3, 400)
    codes = _gaussian((60, 400), spreads * 2.0 ** np.linspace(3, 0, 60)[:, None])
    expected = sum(_entropy(spread * row) for spread in spreads for row in 2.0 ** np.linspace(3, 0, 60))
    bits = 8 * _coded(codes).nbytes
    assert expected < bits < 1.05 * expected
    assert bits < 0.95 * 8 * _coded(codes, np.zeros(400, np.int32)).nbytes


def test_columns_that_are_alike_are_not_followed() -> None:
    alike = _gaussian((60, 400), 3.0)
    assert np.array_equal(_coded(alike), _coded(alike, np.zeros(400, np.int32)))


@pytest.mark.parametrize("count", [100, 3000])
def test_vectors_along_a_line_cost_what_is_off_it(count: int) -> None:
    off = _gaussian((1, count), 0.6)[0]
    flat, rising = (
        _written(lambda writer, values=values: writer.vector(values)).nbytes
        for values in (off, off + np.rint(np.linspace(-9, 12, count)).astype(np.int32))
    )
    assert rising < flat + 0.1 * count / 8 + 8


@pytest.mark.parametrize("values", [[2000, 2000, 2000, -2000], [-2000] * 3 + [2000] * 6, [-1, 1], [0, -3], [2001, 0]])
def test_steep_vectors_come_back(values: list[int]) -> None:
    payload = _written(lambda writer: writer.vector(np.array(values, np.int32)))
    assert CodeReader(payload).vector(len(values)).tolist() == values


def test_vectors_that_wander_cost_their_steps() -> None:
    steps = _gaussian((1, 3000), 0.6)[0]
    wandering = _written(lambda writer: writer.vector(np.cumsum(steps).astype(np.int32)))
    assert wandering.nbytes < _written(lambda writer: writer.vector(steps)).nbytes + 6


def test_laplacian_codes_have_tables_of_their_own() -> None:
    draws = np.random.default_rng(0).laplace(0, 4, (100, 1000)).round().astype(np.int32)
    counts = np.unique(draws, return_counts=True)[1] / draws.size
    assert 8 * _coded(draws).nbytes / draws.size < -1.01 * (counts * np.log2(counts)).sum()


@given(hnp.arrays(np.int32, SHAPES, elements=INTEGERS))
def test_bits_are_foreseen(codes: np.ndarray) -> None:
    beside = _written(lambda writer: writer.matrix(np.zeros_like(codes))).nbytes
    # Every row's table takes two bytes or less; words are of four bytes.
    assert _coded(codes).nbytes - beside <= code_bits(codes) / 8 + 2 * len(codes) + 10
    unmoved = np.zeros(codes.shape[1], np.int32)  # with these nothing follows the columns
    assert _coded(codes, unmoved).nbytes - beside >= code_bits(codes) / 8 - 4


@given(st.integers(0, 1), st.integers(1, LOUDEST), st.integers(2, 120))
def test_frequencies_are_whole_above_zero_and_sum_to_one(family: int, table: int, classes: int) -> None:
    frequencies = table_frequencies(family, table, classes)
    assert len(frequencies) == classes
    assert frequencies.min() >= 1
    assert frequencies.sum() == 1 << 16


@pytest.mark.parametrize("table", [21, 25, 40, 63])
def test_tables_are_of_the_spread_that_their_number_says(table: int) -> None:
    spread = 2.0 ** ((table - 17) / 4)
    for family in (0, 1):
        middles = np.array([(c + 1) // 2 if c < 8 else (4.5 + c % 4) * 2 ** (c // 4 - 2) for c in range(60)])
        shares = table_frequencies(family, table, 60) / (1 << 16) * (middles < 12 * spread)
        assert math.sqrt(float(shares @ np.square(middles))) == pytest.approx(spread, rel=0.06)


# Part of the format: written files depend on every one of them.
GOLDEN = {
    (0, 1, 2): [65535, 1],
    (0, 17, 8): [25894, 15858, 15858, 3644, 3644, 314, 314, 10],
    (1, 17, 8): [39480, 9868, 9868, 2467, 2467, 616, 616, 154],
    (0, 29, 16): [3401, 3375, 3375, 3298, 3298, 3174, 3174, 3009, 5825, 5396, 4922, 4421, 7325, 5386, 3729, 2428],
    (1, 33, 16): [3786, 3472, 3472, 3184, 3184, 2919, 2919, 2677, 5127, 4702, 4312, 3954, 6950, 5839, 4910, 4129],
    (0, 63, 12): [4096, 4096, 4096, 4096, 4096, 4096, 4096, 4096, 8195, 8191, 8191, 8191],
}


@pytest.mark.parametrize("key", GOLDEN)
def test_tables_never_change(key: tuple[int, int, int]) -> None:
    assert table_frequencies(*key).tolist() == GOLDEN[key]


def _read(payload: np.ndarray, shape: tuple[int, int], *, shifted: bool = True) -> None:
    """Read what may be anything: the shapes are right, or it is a ValueError."""
    shifts = np.arange(shape[1]) - 2 if shifted else None
    try:
        reader = CodeReader(payload)
        vector, matrix = reader.vector(shape[1]), reader.matrix(*shape, shifts)
        reader.finish()
    except ValueError:
        return
    assert (vector.shape, matrix.shape) == ((shape[1],), shape)


@given(st.binary(max_size=60), SHAPES)
@settings(max_examples=300)
def test_random_bytes_are_codes_or_are_refused(data: bytes, shape: tuple[int, int]) -> None:
    _read(np.frombuffer(data, np.uint8), shape)


@given(st.lists(st.integers(0, 63), min_size=11, max_size=11), st.binary(max_size=40), SHAPES, st.booleans())
@settings(max_examples=300)
def test_random_heads_are_codes_or_are_refused(
    head: list[int], words: bytes, shape: tuple[int, int], shifted: bool
) -> None:
    # A vector along a line, then a matrix, whose rows' tables are told one from the other.
    head[0], head[6], head[8] = 4 + head[0] % 2, head[6] % 2 + 4 * (not shifted), 8 + head[8] % 2
    words = words[: len(words) // 4 * 4]
    _read(np.frombuffer(bytes([13, 0, *head, 20, 0]) + words, np.uint8), shape, shifted=shifted)


@given(st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 9))
@settings(max_examples=300)
def test_a_changed_byte_gives_other_codes_or_is_refused(place: int, value: int, cut: int) -> None:
    writer = CodeWriter()
    writer.vector(np.arange(6, dtype=np.int32))
    writer.matrix(_gaussian((5, 6), 40.0), np.arange(6) - 2)
    payload = writer.payload().copy()
    payload[place % len(payload)] = value
    _read(payload[: len(payload) - cut], (5, 6))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([], "expected a head of 0 bytes and whole words, found 0 bytes"),
        ([3, 0, 0, 0], "expected a head of 3 bytes and whole words, found 4 bytes"),
        ([0, 0], "expected 3 bytes more of the head, found 0"),
        ([3, 0, 4, 1, 2], "expected 3 bytes more of the head, found 0"),
        ([5, 0, 8, 1, 2, 0], "expected a head of 5 bytes and whole words, found 6 bytes"),
        ([3, 0, 12, 1, 2], "found 12, 1, 2"),
        ([3, 0, 3, 1, 2], "expected a family, a table and a number of classes, found 3, 1, 2"),
        ([3, 0, 0, 64, 2], "found 0, 64, 2"),
        ([3, 0, 0, 1, 1], "found 0, 1, 1"),
        ([3, 0, 0, 0, 2, 1, 0, 0, 0], "expected the end of the codes, found more"),
        ([4, 0, 0, 0, 2, 0], "expected the end of the codes, found more"),
    ],
)
def test_what_is_wrong_with_a_stream_is_said(payload: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reader = CodeReader(np.array(payload, np.uint8))
        reader.vector(2)
        reader.finish()


def test_a_table_of_its_own_that_is_none_is_refused() -> None:
    payload = _written(lambda writer: writer.vector(np.tile(np.array([-3, 0, 2], np.int32), 5000))).copy()
    assert payload[2] == 2
    payload[5] ^= 1  # of the first frequency
    with pytest.raises(ValueError, match=r"expected frequencies above 0 that sum to 65536, found 655\d\d"):
        CodeReader(payload).vector(15_000)


def test_tables_beyond_the_last_are_refused() -> None:
    payload = np.array([7, 0, 0, 2, 8, 0, 2, 100, 0], np.uint8)  # two rows whose tables are 100 and the same
    with pytest.raises(ValueError, match="expected tables from 0 to 63, found 100 to 100"):
        CodeReader(payload).matrix(2, 4)


def test_a_matrix_that_follows_columns_that_are_told_is_refused() -> None:
    payload = _coded(_gaussian((60, 400), 2.0 ** np.linspace(-1, 3, 400)))
    assert payload[2] // 4 == 1
    with pytest.raises(ValueError, match=r"expected a family and a number of classes, found \d, \d+"):
        CodeReader(payload).matrix(60, 400, np.zeros(400, np.int32))
