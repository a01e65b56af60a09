"""The sparse operator: magnitude pruning, the largest entries of a delta kept and the others dropped."""

from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from graftllm.compression.entropy import decode_integers, encode_integers
from graftllm.compression.quantization import factor_nbytes, pack_factor, quantize_factor, unpack_factor


class Sparse(BaseModel):
    """`count` entries of a delta at 8 bits, packed as one row of `quantization`, then their places.

    Places are coded as gaps: how many dropped entries lie before each kept one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    operator: Literal["sparse"] = "sparse"
    count: int = Field(ge=1)
    group_size: int = Field(ge=1, le=1 << 20)

    def delta(self, payload: np.ndarray, base: Tensor) -> Tensor:
        """Return the delta in float32, in the shape of `base`.

        Raises:
            ValueError: the payload is not an encoding of that many entries inside that shape.
        """
        if self.count > base.numel():
            raise ValueError(f"expected at most {base.numel()} entries, found {self.count}")
        size = factor_nbytes(self.count, _BANDS, self.group_size)
        values = unpack_factor(payload[:size], self.count, _BANDS, self.group_size).values()[0]
        gaps = decode_integers(payload[size:], self.count, np.dtype(np.uint32)).astype(np.int64)
        places = np.cumsum(gaps + 1) - 1
        if places[-1] >= base.numel():
            raise ValueError(f"expected places below {base.numel()}, found {places[-1]}")
        flat = torch.zeros(base.numel())
        flat[torch.from_numpy(places)] = values
        return flat.reshape(base.shape)


def encode_sparse(delta: Tensor, density: float, group_size: int) -> tuple[Sparse, np.ndarray]:
    """Return the operator and payload that keep the share `density` of `delta` that is largest in magnitude.

    At least one entry is kept; of equal ones, the first are.
    """
    flat = delta.reshape(-1)
    count = max(1, round(density * flat.numel()))
    places = torch.sort(torch.sort(flat.abs(), descending=True, stable=True).indices[:count]).values
    factor = quantize_factor(flat[places][None], _BANDS, group_size)
    gaps = np.diff(places.numpy(), prepend=-1) - 1
    return Sparse(count=count, group_size=group_size), np.concatenate(
        [pack_factor(factor, _BANDS), encode_integers(gaps.astype(np.uint32))]
    )


_BANDS = ((8, 1),)  # one row at 8 bits
