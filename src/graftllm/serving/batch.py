"""A batch whose rows come and go between steps: prompts are read together, their caches join those that run.

Every row has its own positions and its padding on the left, so that a row's logits are those of the
row alone, up to rounding. This file knows nothing of packs, requests or text.
"""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from graftllm.errors import FusionError


class Batch:
    """Rows in the middle of being written, with their keys and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Start without rows."""
        self._model = model
        self._takes = inspect.signature(model.forward).parameters
        self._cache = DynamicCache()
        self._mask = torch.zeros(0, 0, dtype=torch.long)  # (rows, length)

    @property
    def size(self) -> int:
        """How many rows there are."""
        return len(self._mask)

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Add a row for each prompt, after those that are there; return logits of the tokens that come next.

        Returns:
            Shape (prompts, vocabulary).
        """
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        mask, cache = mask.to(self._model.device), DynamicCache()
        logits = self._forward(ids, mask, cache)
        self._join(cache, mask)
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Give every row its next token; return logits of the one after, shape (rows, vocabulary)."""
        mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        logits = self._forward(torch.tensor(tokens).view(-1, 1), mask, self._cache)
        self._mask = mask
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the columns that are padding in all that stay."""
        if len(rows) == self.size:
            return
        if not rows:
            self._cache, self._mask = DynamicCache(), self._mask[:0, :0]
            return
        index = torch.tensor(rows, dtype=torch.long, device=self._mask.device)
        mask = self._mask[index]
        first = int(mask.any(dim=0).int().argmax())
        self._mask = mask[:, first:]
        for layer in _filled(self._cache):
            layer.keys, layer.values = layer.keys[index, :, first:], layer.values[index, :, first:]

    def _forward(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Run the model on new tokens, shape (rows, new), which join the cache; `mask` covers both."""
        inputs: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # count from the first real token
        inputs |= {"position_ids": positions} if "position_ids" in self._takes else {}
        inputs |= {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}
        return cast(Any, self._model)(input_ids=ids.to(mask.device), **inputs).logits[:, -1]

    def _join(self, cache: DynamicCache, mask: Tensor) -> None:
        if not self.size:
            self._cache, self._mask = cache, mask
            return
        length = max(self._mask.shape[1], mask.shape[1])
        for layer, new in zip(_filled(self._cache), _filled(cache), strict=True):
            layer.keys = _stacked(layer.keys, new.keys, length, dim=2)  # (rows, heads, length, width)
            layer.values = _stacked(layer.values, new.values, length, dim=2)
        self._mask = _stacked(self._mask, mask, length, dim=1)


def check_servable(model: PreTrainedModel) -> None:
    """Refuse a model whose rows cannot join a running batch, such as one with a recurrent state.

    Raises:
        FusionError: it is one.
    """
    layers = DynamicCache(config=model.config).layers
    if odd := next((one for one in layers if type(one) not in (DynamicLayer, DynamicSlidingWindowLayer)), None):
        raise FusionError(
            f"{type(model).__name__}: keeps something else ({type(odd).__name__}) than the keys and values of every "
            "token, so its rows cannot join a running batch, and it cannot be served. Use `graftllm chat`."
        )


def _filled(cache: DynamicCache) -> list[Any]:
    """Return the layers that hold keys and values; layers may share those of others."""
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def _stacked(old: Tensor, new: Tensor, length: int, *, dim: int) -> Tensor:
    """Return the rows of both, padded with zeros on the left to one length along a dimension."""
    return torch.cat([_padded(old, length, dim), _padded(new, length, dim)])


def _padded(value: Tensor, length: int, dim: int) -> Tensor:
    if value.shape[dim] == length:
        return value
    shape = list(value.shape)
    shape[dim] = length - value.shape[dim]
    return torch.cat([value.new_zeros(shape), value], dim=dim)
