"""The sparse operator: magnitude pruning, the largest entries of a delta kept and the others dropped."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from graftllm.compression.entropy import BLOCK, decoded_blocks, encode_integers
from graftllm.compression.quantization import Factor, factor_nbytes, pack_factor, quantize_factor, unpack_factor


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
        size, flat, last = factor_nbytes(self.count, _BANDS, self.group_size), torch.zeros(base.numel()), -1
        factor = unpack_factor(payload[:size], self.count, _BANDS, self.group_size)
        for start, gaps in decoded_blocks(payload[size:], self.count, np.dtype(np.uint32)):
            places = last + np.cumsum(gaps.astype(np.int64) + 1)
            last = int(places[-1])
            if last >= base.numel():
                raise ValueError(f"expected places below {base.numel()}, found {last}")
            groups = torch.arange(start, start + len(gaps)) // self.group_size
            codes = factor.codes[0, start : start + len(gaps)].float()
            values = factor.scales[0, groups].float() * (codes - factor.zero_points[0, groups].float())
            flat[torch.from_numpy(places)] = values
        return flat.reshape(base.shape)


def encode_sparse(delta: Tensor, density: float, group_size: int) -> tuple[Sparse, np.ndarray]:
    """Return the operator and payload that keep the share `density` of `delta` that is largest in magnitude.

    At least one entry is kept; of equal ones, the first are. Besides `delta` and the payload, little memory is taken.
    """
    flat = delta.reshape(-1)
    count = max(1, round(density * flat.numel()))
    factors: list[Factor] = []
    coded: list[np.ndarray] = []
    waiting, gaps, last = torch.empty(0), np.empty(0, np.uint32), -1  # what does not fill a group or a block yet
    for places in _largest(flat, count):
        waiting = torch.cat([waiting, flat[places]])
        whole = len(waiting) // group_size * group_size
        factors += [quantize_factor(waiting[None, :whole], _BANDS, group_size)] if whole else []
        waiting = waiting[whole:]
        gaps = np.concatenate([gaps, (np.diff(places.numpy(), prepend=last) - 1).astype(np.uint32)])
        last = int(places[-1])
        while len(gaps) >= BLOCK:
            coded.append(encode_integers(gaps[:BLOCK]))
            gaps = gaps[BLOCK:]
    factors += [quantize_factor(waiting[None], _BANDS, group_size)] if len(waiting) else []
    factor = Factor(
        torch.cat([one.codes for one in factors], dim=1),
        torch.cat([one.scales for one in factors], dim=1),
        torch.cat([one.zero_points for one in factors], dim=1),
        group_size,
    )
    payload = [pack_factor(factor, _BANDS), *coded, encode_integers(gaps)]
    return Sparse(count=count, group_size=group_size), np.concatenate(payload)


_BANDS = ((8, 1),)  # one row at 8 bits
_LOW_BITS = 15  # of a magnitude's 31; the others are looked at first


def _largest(flat: Tensor, count: int) -> Iterator[Tensor]:
    """Yield the places of the `count` entries of largest magnitude, ascending; of equal ones the first."""
    least, larger = _least(flat, count)
    equal = count - larger  # of those that are as large as the least
    for start, patterns in zip(range(0, len(flat), BLOCK), _patterns(flat), strict=True):
        kept, ties = patterns > least, np.flatnonzero(patterns == least)[:equal]
        kept[ties] = True
        equal -= len(ties)
        if kept.any():
            yield torch.from_numpy(np.flatnonzero(kept) + start)


def _least(flat: Tensor, count: int) -> tuple[int, int]:
    """Return the bit pattern of the least magnitude that is kept, and how many entries are larger.

    Magnitudes of float32 are in the order of their patterns: the high bits are found first, then the low ones.
    """
    high, above = _reached((patterns >> _LOW_BITS for patterns in _patterns(flat)), 1 << 31 - _LOW_BITS, count)
    alike = (patterns[patterns >> _LOW_BITS == high] & ((1 << _LOW_BITS) - 1) for patterns in _patterns(flat))
    low, more = _reached(alike, 1 << _LOW_BITS, count - above)
    return high << _LOW_BITS | low, above + more


def _reached(numbers: Iterator[np.ndarray], bins: int, count: int) -> tuple[int, int]:
    """Return the number at which `count` are reached, counted down from the largest, and how many are above it."""
    counts = np.zeros(bins, np.int64)
    for some in numbers:
        counts += np.bincount(some, minlength=bins)
    reached = np.cumsum(counts[::-1])
    place = int(np.argmax(reached >= count))
    return bins - 1 - place, int(reached[place] - counts[bins - 1 - place])


def _patterns(flat: Tensor) -> Iterator[np.ndarray]:
    """Yield the bit patterns of magnitudes, some at a time."""
    for part in flat.split(BLOCK):
        yield part.float().abs().numpy().view(np.int32)
