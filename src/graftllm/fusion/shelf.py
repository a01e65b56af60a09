"""The shelf: what was decoded of packs, kept within a memory limit; the packs themselves stay on disk.

What was used least recently goes first, by bytes. Whatever goes can be decoded again from its
memory-mapped file.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def nbytes(self) -> int:
        """How much, in bytes."""
        ...


Decoded = TypeVar("Decoded", bound=Sized)


class Shelf:
    """Decoded packs by key, at most `limit_bytes` of them. One thread at a time."""

    def __init__(self, limit_bytes: int) -> None:
        """Start empty."""
        self.limit_bytes = limit_bytes
        self._hot: OrderedDict[Hashable, Any] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """How many bytes the decoded packs take."""
        return sum(one.nbytes for one in self._hot.values())

    @property
    def hot(self) -> list[Hashable]:
        """The keys of what is decoded, the least recently used first."""
        return list(self._hot)

    def get(self, key: Hashable, decode: Callable[[], Decoded]) -> Decoded:
        """Return what is kept under a key, or decode it, and keep it where the limit allows.

        What alone is larger than the limit is decoded every time.
        """
        if key in self._hot:
            self._hot.move_to_end(key)
            return self._hot[key]
        found = decode()
        if found.nbytes <= self.limit_bytes:
            self._hot[key] = found
            while self.nbytes > self.limit_bytes:
                self._hot.popitem(last=False)
        return found

    def drop(self, key: Hashable) -> None:
        """Forget what is kept under a key, if anything is."""
        self._hot.pop(key, None)
