import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftllm.compression.pruning import Sparse, encode_sparse


@given(st.integers(0, 1000), st.floats(0.001, 1.0), st.integers(1, 40), st.integers(1, 40))
def test_the_largest_entries_are_kept_in_their_places(seed: int, density: float, rows: int, columns: int) -> None:
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    operator, payload = encode_sparse(delta, density, 64)
    decoded = operator.delta(payload, torch.zeros(rows, columns))
    kept = decoded != 0
    assert operator.count == max(1, round(density * delta.numel()))
    assert int(kept.sum()) <= operator.count
    dropped_largest = (delta.abs() * ~kept).max()
    spread = float(delta.max().clamp(min=0) - delta.min().clamp(max=0))  # the grid always holds 0
    assert float((decoded - delta).abs()[kept].max()) <= spread / 150
    if operator.count < delta.numel():
        assert float(dropped_largest) <= float(delta.abs()[kept].min()) + spread / 150


def test_full_density_keeps_everything_to_eight_bits() -> None:
    delta = torch.randn(64, 64)
    operator, payload = encode_sparse(delta, 1.0, 128)
    assert float((operator.delta(payload, delta) - delta).norm() / delta.norm()) < 0.01


def test_rare_entries_take_little_more_than_their_values() -> None:
    operator, payload = encode_sparse(torch.randn(1000, 100), 0.01, 128)
    assert operator.count == 1000
    assert payload.nbytes < 1000 * (1 + 1.2)  # a byte for the value; log2(100 e) = 8.1 bits for the place


def test_places_outside_the_tensor_are_refused() -> None:
    operator, payload = encode_sparse(torch.randn(100), 0.5, 128)
    with pytest.raises(ValueError, match=r"expected places below 60, found"):
        operator.delta(payload, torch.zeros(60))
    with pytest.raises(ValueError, match="expected at most 10 entries, found 50"):
        operator.delta(payload, torch.zeros(10))
    with pytest.raises(ValueError, match="bytes of factor"):
        Sparse(count=90, group_size=128).delta(np.zeros(4, np.uint8), torch.zeros(100))
