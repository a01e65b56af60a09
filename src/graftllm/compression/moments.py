"""Sums of x x^T under names, in memory up to a bound and in files beyond it."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch
from torch import Tensor

from graftllm.errors import CompressionError


class Sums:
    """Running sums of x x^T, each under a key; files are deleted with the object."""

    def __init__(self, spool: Path | None, memory_bytes: int) -> None:
        """Keep sums in memory up to `memory_bytes` in all, then in files in a new directory in `spool`."""
        self._room = memory_bytes
        self._in_memory: dict[str, Tensor] = {}
        self._files: dict[str, tuple[Path, int]] = {}  # file and width
        self._spool = spool
        self._directory: Path | None = None

    def __contains__(self, key: str) -> bool:
        return key in self._in_memory or key in self._files

    def add(self, key: str, x: Tensor) -> None:
        """Add x^T x, for x of shape (tokens, d_in)."""
        if key not in self:
            self._make(key, x.shape[1])
        total = self.total(key, writable=True)
        if x.device == total.device:
            total.addmm_(x.T, x)
        else:
            total.add_((x.T @ x).cpu())

    def total(self, key: str, *, writable: bool = False) -> Tensor:
        """Return a sum, of shape (d_in, d_in), in float32 on CPU; from a file its pages are mapped."""
        if key in self._in_memory:
            return self._in_memory[key]
        path, width = self._files[key]
        mapped = np.memmap(path, np.float32, "r+" if writable else "c", shape=(width, width))
        return torch.from_numpy(mapped)

    def keys(self) -> list[str]:
        """Return the keys that have a sum."""
        return [*self._in_memory, *self._files]

    def _make(self, key: str, width: int) -> None:
        if width * width * 4 <= self._room:
            self._room -= width * width * 4
            self._in_memory[key] = torch.zeros(width, width)
            return
        if self._directory is None:
            directory = tempfile.TemporaryDirectory(dir=self._spool, prefix="moments-")
            finalize(self, directory.cleanup)
            self._directory = Path(directory.name)
        path = self._directory / f"{len(self._files)}.f32"
        with open(path, "wb") as file:
            file.truncate(width * width * 4)  # a sparse file: zeros
        self._files[key] = (path, width)


class Moments(Mapping[str, Tensor]):
    """Sums over their number of tokens, by parameter name; computed when asked for, and one tensor for one key.

    Raises:
        CompressionError: when one is asked for that is not finite.
    """

    def __init__(self, sums: Sums, keys: Mapping[str, str], tokens: int) -> None:
        """Show the sums under the names of `keys`, a parameter's name -> its sum's key."""
        self._sums, self._keys, self._tokens = sums, keys, tokens
        self._alive: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def __getitem__(self, name: str) -> Tensor:
        key = self._keys[name]
        mean = self._alive.get(key)
        if mean is None:
            mean = self._alive[key] = self._sums.total(key) / self._tokens
            if not bool(mean.isfinite().all()):
                raise CompressionError(
                    f"calibration: what reaches {key!r} is not finite on these rows, or too large for float32. The "
                    "training diverged, or a file is damaged; pack an earlier checkpoint, or without calibration."
                )
        return mean

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
