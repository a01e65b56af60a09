import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftllm.training.memory import Batching, Shape, activation_bytes, fit_batch, held_bytes

LLAMA_8B = Shape(8_030_261_248, 32, 4096, 14336, 1024, 128256)


def test_eight_billion_parameters_hold_sixteen_bytes_each() -> None:
    assert held_bytes(LLAMA_8B, LLAMA_8B.parameters) == 16 * 8_030_261_248
    assert held_bytes(LLAMA_8B, 0) == 4 * 8_030_261_248


def test_processes_that_share_nothing_hold_gradients_twice() -> None:
    assert held_bytes(LLAMA_8B, LLAMA_8B.parameters, processes=2) == 20 * 8_030_261_248


def test_processes_that_share_gather_the_outermost_and_two_more_layers() -> None:
    outer = 2 * 128256 * 4096
    layer = (8_030_261_248 - outer) / 32
    found = held_bytes(LLAMA_8B, LLAMA_8B.parameters, processes=8, sharded=True)
    assert found == 16 * 8_030_261_248 / 8 + 6 * (outer + 2 * layer)


@given(st.integers(2, 64))
def test_more_shards_hold_less(processes: int) -> None:
    one, two = (
        held_bytes(LLAMA_8B, LLAMA_8B.parameters, processes=n, sharded=True) for n in (processes, processes + 1)
    )
    assert two < one


def test_activations_by_hand() -> None:
    shape = Shape(1000, layers=3, width=10, inner=20, keys=10, vocabulary=7)
    layer = 2 * (160 + 80)
    assert activation_bytes(shape, 5, checkpointing=False, number=2) == 5 * (3 * layer + 84)
    assert activation_bytes(shape, 5, checkpointing=True, number=2) == 5 * (3 * 20 + layer + 84)


@pytest.mark.parametrize(("rows_that_fit", "expected"), [(0.1, 1), (1, 1), (3.9, 3), (5, 4), (100, 12)])
def test_as_many_rows_at_once_as_fit_and_divide_the_batch(rows_that_fit: float, expected: int) -> None:
    row = activation_bytes(LLAMA_8B, 100, checkpointing=True, number=2)
    found = fit_batch(LLAMA_8B, rows_that_fit * row * 1.001, 12, None, tokens=100, number=2)
    plainly = rows_that_fit * row >= 12 * activation_bytes(LLAMA_8B, 100, checkpointing=False, number=2)
    assert found == Batching(expected, 12 // expected, not plainly)
