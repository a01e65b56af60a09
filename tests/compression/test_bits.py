import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftllm.compression import bits
from graftllm.compression.bits import pack_bits, packed_nbytes, unpack_bits


@given(st.integers(1, 40), st.data())
def test_packed_values_come_back(width: int, data: st.DataObject) -> None:
    values = np.array(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=50)), dtype=np.uint64)
    packed = pack_bits(values, width)
    assert 8 * unpack_bits(packed, len(values), width).itemsize < max(16, 2 * width)
    assert len(packed) == packed_nbytes(len(values), width)
    assert np.array_equal(unpack_bits(packed, len(values), width), values)


def test_chunks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(100) % 8
    whole = pack_bits(values, 3)
    monkeypatch.setattr(bits, "_CHUNK", 16)
    assert np.array_equal(pack_bits(values, 3), whole)
    assert np.array_equal(unpack_bits(whole, 100, 3), values)


def test_bytes_that_are_too_few_or_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 bytes of packed values, found 3"):
        unpack_bits(np.zeros(3, np.uint8), 4, 4)
