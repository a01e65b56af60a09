"""The exact operator: the tuned values bit for bit, as coded differences of bit patterns.

Floating-point patterns are put in numeric order as signed integers, so that neighbours differ by
one; the tuned value's place minus the base value's is small where training moved little. It is
coded by `entropy`, or the tuned bytes are stored as they are where that is smaller.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from graftllm.checkpoint import raw_bytes
from graftllm.compression.entropy import decode_integers, encode_integers, fold, unfold

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Exact(BaseModel):
    """Tuned values bit for bit. `coding` is `difference` (entropy-coded) or `raw` (the tuned bytes)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    operator: Literal["exact"] = "exact"
    coding: Literal["difference", "raw"]

    def restore(self, payload: np.ndarray, base: Tensor) -> Tensor:
        """Return the tuned values, in the dtype and shape of `base`.

        Raises:
            ValueError: the payload is not an encoding of that many values.
        """
        if self.coding == "raw":
            if payload.nbytes != base.nbytes:
                raise ValueError(f"expected {base.nbytes} raw bytes, found {payload.nbytes}")
            return torch.from_numpy(payload.copy()).view(base.dtype).reshape(base.shape)
        places = _ordered(base)
        difference = unfold(decode_integers(payload, base.numel(), np.dtype(f"u{base.element_size()}")))
        return _pattern(places + difference, base)

    def delta(self, payload: np.ndarray, base: Tensor) -> Tensor:
        """Return tuned - base in float32."""
        return self.restore(payload, base).float() - base.float()


def encode_exact(base: Tensor, tuned: Tensor) -> tuple[Exact, np.ndarray]:
    """Return the operator and payload that give `tuned` back from `base` bit for bit (same shape and dtype)."""
    raw = raw_bytes(tuned)
    if tuned.element_size() <= 4:  # wider differences would not fit the coder
        coded = encode_integers(fold(_ordered(tuned) - _ordered(base)))
        if coded.nbytes < raw.nbytes:
            return Exact(coding="difference"), coded
    return Exact(coding="raw"), raw


def _ordered(tensor: Tensor) -> np.ndarray:
    """Return bit patterns as signed integers in the numeric order of the values; wraps, never overflows."""
    patterns = tensor.contiguous().reshape(-1).view(_SIGNED[tensor.element_size()]).numpy()
    if not tensor.is_floating_point():
        return patterns
    return np.where(patterns < 0, patterns ^ np.iinfo(patterns.dtype).max, patterns)


def _pattern(places: np.ndarray, like: Tensor) -> Tensor:
    """Return the values whose places in numeric order these are."""
    patterns = np.where(places < 0, places ^ np.iinfo(places.dtype).max, places) if like.is_floating_point() else places
    return torch.from_numpy(patterns).view(like.dtype).reshape(like.shape)
