"""What every encoded tensor can do, whichever operator made it."""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from graftllm.compression.elementwise import Elementwise
from graftllm.compression.exact import Exact
from graftllm.compression.factored import Factored, Hybrid
from graftllm.compression.lowrank import LowRank
from graftllm.compression.matrix import MatrixOperator
from graftllm.compression.prediction import is_predicting, predicted
from graftllm.compression.pruning import Sparse

_BLOCK = 1 << 22  # values that are added at a time


class Unchanged(BaseModel):
    """The tuned values are the base's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    operator: Literal["unchanged"] = "unchanged"

    def delta(self, payload: np.ndarray, base: Tensor) -> Tensor:
        """Return zeros in float32.

        Raises:
            ValueError: there is a payload.
        """
        self.check(payload)
        return torch.zeros(base.shape)

    def check(self, payload: np.ndarray) -> None:
        """Refuse a payload.

        Raises:
            ValueError: there is one.
        """
        if payload.nbytes:
            raise ValueError(f"expected no payload, found {payload.nbytes} bytes")


Operator = Annotated[
    Unchanged | Exact | Sparse | LowRank | Elementwise | Factored | Hybrid, Field(discriminator="operator")
]


@dataclass(frozen=True)
class ExactLayer:
    """What makes tuned bits of a lossy layer: coded given base + weight * delta."""

    weight: float
    how: Exact
    payload: np.ndarray


class Refinement(BaseModel):
    """What a header says of an exact layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    weight: float = Field(ge=0, le=1)
    how: Exact
    nbytes: int = Field(ge=0)
    payload_digest: str


@dataclass(frozen=True)
class EncodedTensor:
    """One parameter's delta: the operator that made it and the operator's payload (flat uint8).

    Decoding needs the base value, on CPU: it gives the shape and dtype, and exact values are coded
    as differences from it. Where there is a refinement, operator and payload are the lossy layer under it.
    """

    operator: Operator
    payload: np.ndarray
    refinement: ExactLayer | None = None

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes, both layers."""
        return self.payload.nbytes + (self.refinement.payload.nbytes if self.refinement else 0)

    def decode(self, base: Tensor) -> Tensor:
        """Return the delta, tuned - base, in float32.

        Raises:
            ValueError: the payload does not fit the operator and the base's shape.
        """
        if self.refinement is not None:
            return self.restore(base).float() - base.float()
        return self.operator.delta(self.payload, base)

    def factors(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Return the factors of a matrix, float32, shapes (rows, rank) and (rank, columns), whose product is the delta.

        None where the operator is no product.

        Args:
            shape: of the parameter.

        Raises:
            ValueError: the payload does not fit the operator and the shape.
        """
        if isinstance(self.operator, LowRank):
            return self.operator.factors(self.payload, shape)
        if not isinstance(self.operator, Factored):
            return None
        if not self.operator.transposed:
            return self.operator.factors(self.payload, shape)
        left, right = self.operator.factors(self.payload, (shape[1], shape[0]))
        return right.T, left.T

    def restore(self, base: Tensor) -> Tensor:
        """Return the tuned values in the base's dtype; bit for bit when the operator is exact.

        Raises:
            ValueError: as for `decode`.
        """
        if self.refinement is not None:
            layer = self.refinement
            return layer.how.restore(layer.payload, self.prediction(base, layer.weight))
        if isinstance(self.operator, Exact | MatrixOperator):
            return self.operator.restore(self.payload, base)
        if isinstance(self.operator, Unchanged):
            self.operator.check(self.payload)
            return base.clone()
        values, delta = torch.empty(base.shape, dtype=base.dtype), self.decode(base).reshape(-1)
        for value, before, change in zip(
            *(each.split(_BLOCK) for each in (values.view(-1), base.reshape(-1), delta)), strict=True
        ):
            value.copy_(change.add_(before.float()))
        return values

    def prediction(self, base: Tensor, weight: float) -> Tensor:
        """Return base + weight * delta as an exact layer needs it: in the base's dtype, the same bits everywhere.

        Raises:
            ValueError: as for `decode`; or the operator does not decode to the same bits everywhere.
        """
        if weight == 0:
            return base
        if not is_predicting(self.operator):
            raise ValueError(f"expected an exact layer of weight 0 over {self.operator.operator}, found {weight}")
        return predicted(self.operator, self.payload, base, weight)


def payload_digest(payload: np.ndarray | bytes) -> str:
    """Return the first 16 hexadecimal digits of a payload's SHA-256."""
    return hashlib.sha256(payload if isinstance(payload, bytes) else payload.data).hexdigest()[:16]
