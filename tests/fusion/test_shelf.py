from dataclasses import dataclass
from threading import Thread

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
