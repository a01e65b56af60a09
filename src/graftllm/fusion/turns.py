"""Taking turns: one thread uses a model at a time, others wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident


class Turn:
    """A lock that the thread which holds it may take again, and that any thread may give back.

    A generator that holds a turn may be continued, and closed, by another thread than began it.
    """

    def __init__(self) -> None:
        """Nobody's turn yet."""
        self._lock, self._owner, self._depth = Lock(), 0, 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the turn, and give it back when the block ends."""
        if self._owner != get_ident():
            self._lock.acquire()
            self._owner = get_ident()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._owner = 0
                self._lock.release()
