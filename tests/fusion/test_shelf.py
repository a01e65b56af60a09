from dataclasses import dataclass
from threading import Thread

import torch
from hypothesis import given
from hypothesis import strategies as st

from graftllm.fusion.shelf import Shelf
from graftllm.fusion.turns import Turn


@dataclass(frozen=True)
class _Block:
    nbytes: int


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), max_size=30))
def test_the_shelf_never_holds_more_than_its_limit_and_always_what_was_used_last(asked: list[tuple[int, int]]) -> None:
    shelf, sizes = Shelf(100), {}
    for key, size in asked:
        sizes.setdefault(key, size)
        assert shelf.get(key, lambda key=key: _Block(sizes[key])).nbytes == sizes[key]
        assert shelf.nbytes <= 100
        assert shelf.hot[-1] == key


def test_what_was_used_least_recently_goes_first() -> None:
    shelf, decoded = Shelf(100), []
    for key in ("a", "b", "a", "c", "a", "b"):
        shelf.get(key, lambda key=key: decoded.append(key) or _Block(40))
    assert decoded == ["a", "b", "c", "b"]
    assert shelf.hot == ["a", "b"]


def test_what_is_larger_than_the_shelf_is_not_kept_and_drives_nothing_out() -> None:
    shelf = Shelf(100)
    shelf.get("small", lambda: _Block(40))
    assert shelf.get("large", lambda: _Block(101)).nbytes == 101
    assert shelf.hot == ["small"]


@dataclass(frozen=True)
class _Values:
    values: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


def _filled(shelf: Shelf, key: int, count: int = 10) -> _Values:
    def decode() -> _Values:
        return _Values(shelf.empty((count,), torch.float32, torch.device("cpu")).fill_(key))

    return shelf.get(key, decode, 4 * count)


def test_memory_of_what_left_the_shelf_is_lent_again_unless_someone_has_it() -> None:
    shelf = Shelf(90)
    places = {key: _filled(shelf, key).values.data_ptr() for key in (0, 1)}
    part = _filled(shelf, 2).values[3:]  # in the place of 0
    assert part.data_ptr() == places[0] + 12
    assert _filled(shelf, 3).values.data_ptr() == places[1]
    fourth = _filled(shelf, 4)
    assert shelf.hot == [3, 4]
    assert fourth.values.untyped_storage().data_ptr() not in places.values()
    assert part.tolist() == [2] * 7
    del part
    _filled(shelf, 5, 20)  # of another size
    assert sum(memory.nbytes for memory, _ in shelf._lent) == 80 + 40  # and `fourth`
    assert fourth.values.tolist() == [4] * 10


def test_what_is_not_kept_leaves_no_memory_behind_and_drives_nothing_out() -> None:
    shelf = Shelf(90)
    _filled(shelf, 0)
    assert _filled(shelf, 1, 30).values.tolist() == [1] * 30
    assert shelf.hot == [0]
    assert not shelf._lent


def test_what_is_dropped_leaves_no_memory_behind() -> None:
    shelf = Shelf(90)
    _filled(shelf, 0)
    shelf.drop(0)
    assert not shelf._lent


def test_a_turn_may_be_taken_again_by_its_thread_and_given_back_by_another() -> None:
    turn, order = Turn(), []

    def pieces():
        with turn.taken(), turn.taken():
            yield "first"
            yield "second"

    def wait() -> None:
        with turn.taken():
            order.append("other")

    reading = pieces()
    order.append(next(reading))
    other = Thread(target=wait)
    other.start()
    finisher = Thread(target=lambda: order.extend(reading))
    finisher.start()
    finisher.join()
    other.join()
    assert order == ["first", "second", "other"]
