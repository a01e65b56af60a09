"""The shelf: what was decoded of packs, kept within a memory limit; the packs themselves stay on disk.

What was used least recently goes first, by bytes. Whatever goes can be decoded again from its
memory-mapped file. Its memory is lent to what comes: to get new memory from the system takes as long as to decode.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor, nn

from graftllm.devices import room_bytes


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
        self._lent: list[tuple[np.ndarray, ReferenceType[np.ndarray]]] = []  # memory, and whoever has it

    @property
    def nbytes(self) -> int:
        """How many bytes the decoded packs take."""
        return sum(one.nbytes for one in self._hot.values())

    def has(self, key: Hashable) -> bool:
        """Return whether something is kept under a key."""
        return key in self._hot

    @property
    def hot(self) -> list[Hashable]:
        """The keys of what is decoded, the least recently used first."""
        return list(self._hot)

    def get(self, key: Hashable, decode: Callable[[], Decoded], expected: int = 0) -> Decoded:
        """Return what is kept under a key, or decode it, and keep it where the limit allows.

        What alone is larger than the limit is decoded every time.

        Args:
            key: tells what is kept from other things.
            decode: makes what is not kept, in memory from `empty` where it can.
            expected: how many bytes that will be, so that others go before it comes.
        """
        if key in self._hot:
            self._hot.move_to_end(key)
            return self._hot[key]
        if expected <= self.limit_bytes:
            self._make_room(expected)
        found = decode()
        if found.nbytes <= self.limit_bytes:
            self._hot[key] = found
            self._make_room(0)
            self._lent = [one for one in self._lent if one[1]() is not None]
        else:
            self._lent = []  # what is not kept shall leave no memory behind
        return found

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor to decode into: in memory of what has left the shelf and is used by nobody, else in new.

        Only memory of processors is lent again: PyTorch does so itself with a GPU's.
        """
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        nbytes = math.prod(shape) * dtype.itemsize
        free = (i for i, (memory, user) in enumerate(self._lent) if memory.nbytes == nbytes and user() is None)
        place = next(free, None)
        memory = torch.empty(nbytes, dtype=torch.uint8).numpy() if place is None else self._lent.pop(place)[0]
        user = memory[:]  # lives as long as any tensor in it
        self._lent.append((memory, ref(user)))
        return torch.from_numpy(user).view(dtype).reshape(tuple(shape))

    def drop(self, key: Hashable) -> None:
        """Forget what is kept under a key, if anything is."""
        self._hot.pop(key, None)
        self._lent = [one for one in self._lent if one[1]() is not None]

    def _make_room(self, nbytes: int) -> None:
        """Let go what was used least recently until so many bytes are left within the limit."""
        while self._hot and self.nbytes + nbytes > self.limit_bytes:
            self._hot.popitem(last=False)


def default_limit(model: nn.Module) -> int:
    """Return how many bytes of decoded packs to keep: as many as the model has, at least 1 GiB, if there is room.

    On several devices packs are taken to be spread as the model is.
    """
    own = Counter[torch.device]()
    for value in model.parameters():
        own[value.device] += value.nbytes
    total = sum(own.values())
    share = min((room_bytes(device) / max(nbytes, 1) for device, nbytes in own.items()), default=0)
    return min(max(total, 1 << 30), int(share * total))
