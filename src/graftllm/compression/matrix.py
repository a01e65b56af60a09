"""Parameters as matrices: how a tensor of any shape is cut into rows and columns, and what such operators share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from graftllm.compression.roles import Role
from graftllm.tensors import LARGE

BLOCK = 1 << 24  # entries that are coded at a time; bounds the memory
DOUBLE = 2048  # columns up to which a matrix, or the moments of its inputs, are calculated with in float64
CACHED = 1 << 18  # numbers that stay in a core's cache from one step to the next


@dataclass(frozen=True)
class Levels:
    """Codes of a payload, and what they stand for: codes * rows[:, None] * columns.

    Attributes:
        codes: whole numbers, int32, shape (rows, columns).
        rows: steps, float32, shape (rows,).
        columns: steps, float32, shape (columns,).
    """

    codes: np.ndarray
    rows: Tensor
    columns: Tensor

    def values(self, codes: Tensor | None = None) -> Tensor:
        """Return what the codes stand for, or others in their place, in float32 or the dtype of the others."""
        codes = torch.from_numpy(self.codes).float() if codes is None else codes
        return codes * self.rows.to(codes)[:, None] * self.columns.to(codes)


class MatrixOperator(BaseModel, ABC):
    """An operator that codes a delta as a matrix, in blocks of rows.

    The tensor is cut by `matrix_shape`; `transposed` says that the matrix is the transpose of that.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    transposed: bool = False

    @model_serializer(mode="wrap")
    def _only_what_differs(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key != "transposed" or value}

    @abstractmethod
    def blocks(self, payload: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the entries, float32, of each block of rows."""

    @abstractmethod
    def levels(self, payload: np.ndarray, shape: tuple[int, int]) -> list[Levels]:
        """Return all codes of a payload, for `joined` and `recoded`.

        Raises:
            ValueError: the payload is not an encoding of that shape.
        """

    @abstractmethod
    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Return the matrix, shape (rows, columns), that the values of all `levels` make; gradients pass."""

    @abstractmethod
    def recoded(
        self, payload: np.ndarray, shape: tuple[int, int], codes: Sequence[np.ndarray]
    ) -> tuple[Self, np.ndarray]:
        """Return the operator and payload with other codes, int32, in place of those of all `levels`.

        Raises:
            ValueError: as for `levels`.
        """

    def matrix(self, payload: np.ndarray, shape: tuple[int, int]) -> Tensor:
        """Return all entries in float32, shape (rows, columns).

        Raises:
            ValueError: the payload is not an encoding of that shape.
        """
        values = torch.zeros(shape)
        for start, part in self.blocks(payload, shape):
            values[start : start + len(part)] = part
        return values

    def delta(self, payload: np.ndarray, base: Tensor) -> Tensor:
        """Return the delta in float32, in the shape of `base`.

        Raises:
            ValueError: the payload is not an encoding of that shape.
        """
        shape = matrix_shape(tuple(base.shape))
        if not self.transposed:
            return self.matrix(payload, shape).reshape(base.shape)
        return self.matrix(payload, (shape[1], shape[0])).T.reshape(base.shape)

    def restore(self, payload: np.ndarray, base: Tensor) -> Tensor:
        """Return base + delta in the base's dtype, a block of rows in memory at a time.

        Raises:
            ValueError: as for `delta`.
        """
        if self.transposed:
            return (base.float() + self.delta(payload, base)).to(base.dtype)
        shape = matrix_shape(tuple(base.shape))
        values = base.clone(memory_format=torch.contiguous_format)
        flat = values.view(shape)
        for start, part in self.blocks(payload, shape):
            rows = flat[start : start + len(part)]
            rows.copy_(part.add_(rows.float()))
        return values


@dataclass(frozen=True)
class Source:
    """A matrix whose rows are read when they are needed.

    Attributes:
        shape: (rows, columns).
        read: gives the rows from one number up to another, on `device`, in the dtype to calculate in.
        device: where they are.
    """

    shape: tuple[int, int]
    read: Callable[[int, int], Tensor]
    device: torch.device

    @property
    def large(self) -> bool:
        """Whether it is too large to be decomposed: such matrices (vocabularies) are coded by rows alone."""
        return self.shape[0] * self.shape[1] > LARGE

    def whole(self) -> Tensor:
        """Return all rows."""
        return self.read(0, self.shape[0])

    def held(self) -> "Source":
        """Return the same with all rows in memory, which those that it reads are parts of."""
        whole = self.whole()
        return replace(self, read=lambda start, stop: whole[start:stop])

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the numbers of some rows and these rows, of at most 2 ** 24 entries."""
        height = max(1, BLOCK // self.shape[1])
        for start in range(0, self.shape[0], height):
            stop = min(start + height, self.shape[0])
            yield torch.arange(start, stop), self.read(start, stop)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns: the shape cut in two where the sides are most alike, the first such cut.

    >>> matrix_shape((768, 3, 16, 16)), matrix_shape((8, 512, 256)), matrix_shape((5,)), matrix_shape((3, 4))
    ((768, 768), (4096, 256), (1, 5), (3, 4))
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    cuts = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return max(cuts, key=lambda cut: min(cut))


def is_matrix(shape: tuple[int, ...], role: Role) -> bool:
    """Return whether a parameter is coded as a matrix: not vectors, and not norms or biases, stacked ones either.

    >>> is_matrix((8, 512, 256), "expert"), is_matrix((8, 512), "bias"), is_matrix((512, 1), "other")
    (True, False, False)
    """
    return min(matrix_shape(shape)) > 1 and role not in ("norm", "bias")
