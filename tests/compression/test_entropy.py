import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graftllm.compression import entropy
from graftllm.compression.entropy import decode_integers, encode_integers, fold, unfold


@given(st.sampled_from([np.int8, np.int16, np.int32]), st.data())
def test_folding_is_undone(dtype: type, data: st.DataObject) -> None:
    values = data.draw(hnp.arrays(dtype, st.integers(0, 30)))
    assert np.array_equal(unfold(fold(values)), values)
    assert fold(values).dtype == np.dtype(dtype).str.replace("i", "u")


@given(st.sampled_from([np.uint8, np.uint16, np.uint32]), st.data())
def test_coded_integers_come_back(dtype: type, data: st.DataObject) -> None:
    values = data.draw(hnp.arrays(dtype, st.integers(0, 60)))
    assert np.array_equal(decode_integers(encode_integers(values), len(values), np.dtype(dtype)), values)


def test_blocks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "BLOCK", 64)
    values = np.random.default_rng(0).geometric(0.1, 1000).astype(np.uint32)
    assert np.array_equal(decode_integers(encode_integers(values), 1000, np.dtype(np.uint32)), values)


@pytest.mark.parametrize("spread", [0.3, 3.0, 300.0])
def test_size_is_near_the_entropy_of_gaussian_integers(spread: float) -> None:
    values = np.random.default_rng(0).normal(0, spread, 100_000).round().astype(np.int32)
    counts = np.unique(values, return_counts=True)[1] / len(values)
    information = -(counts * np.log2(counts)).sum() * len(values) / 8
    assert encode_integers(fold(values)).nbytes < 1.01 * information + 150


def test_equal_values_take_almost_nothing() -> None:
    assert encode_integers(np.zeros(1_000_000, np.uint16)).nbytes < 100


@given(st.binary(max_size=60), st.integers(0, 50))
def test_random_bytes_decode_to_integers_or_are_refused(data: bytes, count: int) -> None:
    try:
        values = decode_integers(np.frombuffer(data, np.uint8), count, np.dtype(np.uint16))
    except ValueError:
        return
    assert len(values) == count


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_changed_byte_gives_other_integers_or_is_refused(place: int, value: int) -> None:
    original = np.random.default_rng(0).geometric(0.2, 200).astype(np.uint16)
    coded = encode_integers(original).copy()
    coded[place % len(coded)] = value
    try:
        decoded = decode_integers(coded, 200, np.dtype(np.uint16))
    except ValueError:
        return
    assert decoded.shape == (200,)


def test_fewer_values_than_were_coded_are_refused() -> None:
    coded = encode_integers(np.arange(100, dtype=np.uint16))
    for count in (0, 1, 50, 90):
        with pytest.raises(ValueError, match="expected"):
            decode_integers(coded, count, np.dtype(np.uint16))
