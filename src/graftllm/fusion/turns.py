"""Taking turns: one thread uses a model at a time, others wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, local


class Turn:
    """A lock that the thread which holds it may take again, and that any thread may give back.

    A generator that holds a turn may be continued, and closed, by another thread than began it.
    """

    def __init__(self) -> None:
        """Nobody's turn yet."""
        self._lock, self._depth = Lock(), 0
        self._owner: object = None
        self._mine = local()  # not a thread's number, which another gets when it has ended

    def passed(self) -> None:
        """Make the turn that somebody holds this thread's, which goes on with what the holder began."""
        self._owner = self._me()

    def _me(self) -> object:
        return self._mine.__dict__.setdefault("token", object())

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the turn, and give it back when the block ends."""
        me = self._me()
        if self._owner is not me:
            self._lock.acquire()
            self._owner = me
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._lock.release()
