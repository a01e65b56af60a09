"""Packs side by side: their factors in one tensor a module, and the products that add them to the rows of a batch.

What depends on packs and rows alone is computed once for a batch, however many tokens follow. This file
knows nothing of hooks, nor of which module is called when.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import vmap
from transformers.pytorch_utils import Conv1D

from graftllm.errors import FusionError
from graftllm.fusion.branches import Branch

Mix = tuple[tuple[str, float], ...]  # packs of one row with their weights; none for the base


@dataclass(frozen=True)
class Stacked:
    """What the packs of a stack add to one module, on its device.

    Attributes:
        linear: whether the module multiplies its input with its weight.
        left: factors, shape (packs, rows, rank), zeros where a pack has less or nothing; None without any.
        right: shape (packs, rank, columns).
        whole: a pack's number -> its delta, shape (rows, columns), of a vocabulary without factors.
        vectors: by name, shape (packs, length), float32.
    """

    linear: bool
    left: Tensor | None
    right: Tensor | None
    whole: Mapping[int, Tensor]
    vectors: Mapping[str, Tensor]

    def tensors(self) -> Iterator[Tensor]:
        """Yield all that it holds."""
        yield from (one for one in (self.left, self.right) if one is not None)
        yield from (*self.whole.values(), *self.vectors.values())

    @classmethod
    def of(
        cls, branches: Sequence[Branch | None], module: nn.Module, shared: dict[tuple[int, ...], Tensor]
    ) -> "Stacked":
        """Stack branches; `shared` holds stacks by what was stacked, so that tied modules have one."""
        device = next(value.device for value in (*module._parameters.values(),) if value is not None)
        weights = [None if one is None else one.weight for one in branches]
        factors = [weight if isinstance(weight, tuple) else None for weight in weights]
        left = right = None
        if some := next((one for one in factors if one is not None), None):
            rank = max(one[0].shape[1] for one in factors if one is not None)
            both = []
            for side in (0, 1):
                parts = [None if one is None else one[side] for one in factors]
                key = (side, *(0 if part is None else part.data_ptr() for part in parts))
                if key not in shared:
                    shape = (some[0].shape[0], rank) if side == 0 else (rank, some[1].shape[1])
                    shared[key] = _piled(parts, shape, some[0].dtype, device)
                both.append(shared[key])
            left, right = both
        names = {name for one in branches if one is not None for name in one.vectors}
        vectors = {}
        for name in names:
            parts = [None if one is None else one.vectors.get(name) for one in branches]
            length = next(len(part) for part in parts if part is not None)
            vectors[name] = _piled(parts, (length,), torch.float32, device)
        whole = {i: weight.to(device) for i, weight in enumerate(weights) if isinstance(weight, Tensor)}
        return cls(isinstance(module, nn.Linear | Conv1D), left, right, whole, vectors)


def _piled(parts: Sequence[Tensor | None], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return tensors one behind the other, shape (parts, *shape), with zeros where they are smaller or missing."""
    if len(parts) == 1 and parts[0] is not None and parts[0].is_contiguous():
        return parts[0].to(device)[None]  # nothing to copy where it is already
    pile = torch.zeros(len(parts), *shape, dtype=dtype, device=device)
    for place, part in zip(pile, parts, strict=True):
        if part is not None:
            place[tuple(slice(side) for side in part.shape)] = part.to(device)
    return pile


class Batch:
    """Which rows have which packs.

    A lane is a row with one of its packs. Lanes stand in groups, one for each pack from the first to the last that
    is used, and all of the same length; those that are missing have weight 0.

    Attributes:
        size: how many rows there are.
        lanes: how many lanes are not missing.
        groups: for each pack of the stack its lanes: row and weight.
    """

    def __init__(self, mixes: Sequence[Mix], packs: tuple[str, ...]) -> None:
        """Group rows by the packs of a stack."""
        self.size = len(mixes)
        self.groups: list[list[tuple[int, float]]] = [[] for _ in packs]
        for row, mix in enumerate(mixes):
            for name, weight in mix:
                self.groups[packs.index(name)].append((row, weight))
        self.lanes = sum(map(len, self.groups))
        used = [i for i, group in enumerate(self.groups) if group]
        self.span = slice(used[0], used[-1] + 1) if used else slice(0)
        here = self.groups[self.span]
        self._longest = max(map(len, here), default=0)
        padded = [group + [(0, 0.0)] * (self._longest - len(group)) for group in here]
        index = [row for group in padded for row, _ in group]
        weights = [[weight for _, weight in group] for group in padded]
        self._straight = index == list(range(self.size))  # rows are in the order of lanes already
        self._even = all(weight == 1 for group in weights for weight in group)
        self._index, self._weights = torch.tensor(index, dtype=torch.long), torch.tensor(weights)
        self._made: dict[Any, Any] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return on a device the lanes' rows, shape (packs * longest,), and weights, shape (packs, longest)."""
        return self.once(("lanes", device), lambda: (self._index.to(device), self._weights.to(device)))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made under a key before, or make it, as no part of what autograd records."""
        if key not in self._made:
            with torch.inference_mode(False), torch.no_grad():  # the next forward pass may be in another mode
                self._made[key] = make()
        return self._made[key]

    def forget_input(self) -> None:
        """Let go of the input that was gathered last."""
        self._last = None

    def gathered(self, x: Tensor) -> Tensor:
        """Return the lanes' rows of an input, shape (rows, ..., d_in), as (packs, longest * ..., d_in).

        Layers that read the same tensor one after the other, such as those of queries, keys and values, share them.
        """
        if self._last is None or self._last[0] is not x:
            lanes = x if self._straight else x.index_select(0, self.on(x.device)[0])
            self._last = x, lanes.reshape(len(self._weights), -1, x.shape[-1])
        return self._last[1]

    def added(self, output: Tensor, inner: Tensor, matrices: Tensor) -> Tensor:
        """Return an output with its lanes' products, times the lanes' weights.

        Args:
            output: shape (rows, ..., m).
            inner: shape (packs, longest * ..., rank).
            matrices: shape (packs, rank, m).
        """
        packs, _, rank = inner.shape
        index, weights = self.on(output.device)
        if not self._even:
            inner = inner.view(packs, self._longest, -1, rank) * weights[:, :, None, None].to(inner.dtype)
            inner = inner.view(packs, -1, rank)
        if self._straight and inner.dtype == output.dtype:
            sums = torch.baddbmm(output.reshape(packs, -1, output.shape[-1]), inner, matrices)
            return sums.view(output.shape)
        lanes = torch.bmm(inner, matrices).view(len(index), *output.shape[1:]).to(output.dtype)
        return output + lanes if self._straight else output.index_add(0, index, lanes)

    def with_whole(self, stacked: Stacked, output: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return an output, shape (rows, ..., m), with `product(rows, delta)` of the packs that have whole deltas."""
        for number, (i, rows, weights) in enumerate(self.once(("whole", id(stacked)), lambda: self._owners(stacked))):
            added = product(rows, stacked.whole[i])
            if weights is not None:
                added = added * weights.view(-1, *[1] * (added.dim() - 1))
            added = added.to(output.dtype)
            output = output.index_add_(0, rows, added) if number else output.index_add(0, rows, added)
        return output

    def _owners(self, stacked: Stacked) -> list[tuple[int, Tensor, Tensor | None]]:
        """Return the rows, and weights if any is not 1, of each pack of the batch that has a whole delta."""
        found = []
        for i, delta in stacked.whole.items():
            if self.groups[i]:
                rows, weights = zip(*self.groups[i], strict=True)
                scale = None if set(weights) == {1.0} else torch.tensor(weights, device=delta.device)
                found.append((i, torch.tensor(rows, device=delta.device), scale))
        return found

    def where_packed(self, changed: Tensor, output: Tensor) -> Tensor:
        """Return what is changed in rows that have packs, and the output as it was, to the bit, in the others."""
        rows = self.once(("packed", output.device), lambda: self._packed_rows().to(output.device))
        return torch.where(rows.view(-1, *[1] * (output.dim() - 1)), changed, output)

    def _packed_rows(self) -> Tensor:
        packed = {row for group in self.groups for row, _ in group}
        return torch.tensor([row in packed for row in range(self.size)])

    def vector(self, stacked: Stacked, name: str, dim: int, own: Tensor | None = None) -> Tensor:
        """Return for each row its packs' delta of a vector, or with `own` their sum, in its dtype.

        Returns:
            Shape (rows, 1, ..., 1, length) of `dim` dimensions, to be multiplied with or added to tokens.
        """

        def make() -> Tensor:
            piled = stacked.vectors[name]
            index, weights = self.on(piled.device)
            lanes = piled[self.span].repeat_interleave(self._longest, dim=0) * weights.view(-1, 1)
            total = torch.zeros(self.size, lanes.shape[1], device=piled.device).index_add_(0, index, lanes)
            total = total if own is None else (own.float() + total).to(own.dtype)
            return total.view(self.size, *[1] * (dim - 2), -1)

        state = None if own is None else (own.data_ptr(), 0 if own.is_inference() else own._version)
        return self.once((id(stacked), name, dim, state), make)


def multiplied(stacked: Stacked, batch: Batch, x: Tensor, output: Tensor) -> Tensor:
    """Return a linear layer's output, shape (rows, ..., d_out), with what its rows' packs add."""
    if stacked.left is not None and stacked.right is not None:
        right, left = batch.once(
            (id(stacked), "factors"),
            lambda: [cast(Tensor, side)[batch.span].mT for side in (stacked.right, stacked.left)],
        )  # (packs, d_in, rank), (packs, rank, d_out)
        output = batch.added(output, torch.bmm(batch.gathered(x).to(right.dtype), right), left)
    if stacked.whole:
        output = batch.with_whole(stacked, output, lambda rows, delta: x.index_select(0, rows) @ delta.T)
    for name in stacked.vectors:
        output = output + batch.vector(stacked, name, output.dim()).to(output.dtype)
    return output


def embedded(module: nn.Module, stacked: Stacked, batch: Batch, ids: Tensor, output: Tensor) -> Tensor:
    """Return an embedding's output, shape (rows, tokens, width), with what the rows' packs have for their tokens.

    The module itself looks up, so that whatever scale it applies is applied.
    """
    if stacked.left is not None and stacked.right is not None:
        index, _ = batch.on(ids.device)
        left, right = stacked.left[batch.span], stacked.right[batch.span]
        packs, tokens, rank = left.shape
        first = batch.once(
            (id(stacked), "first"),
            lambda: (torch.arange(packs, device=ids.device) * tokens).repeat_interleave(len(index) // packs),
        )
        lanes = ids.index_select(0, index) + first.view(-1, *[1] * (ids.dim() - 1))
        looked_up = with_values(module, {"weight": left.reshape(-1, rank)}, lanes)  # (lanes, tokens, rank)
        output = batch.added(output, looked_up.view(packs, -1, rank), right)
    return batch.with_whole(
        stacked, output, lambda rows, delta: with_values(module, {"weight": delta}, ids.index_select(0, rows))
    )


def normed(module: nn.Module, stacked: Stacked, batch: Batch, inputs: Sequence[Tensor]) -> Tensor:
    """Return what a module whose parameters are vectors makes of each row with the row's own."""
    values = {name: batch.vector(stacked, name, 2, module.get_parameter(name)) for name in stacked.vectors}
    if type(module) is nn.LayerNorm:  # its kernel wants one vector for all rows
        x, dim = inputs[0], inputs[0].dim()
        weight, bias = (
            batch.vector(stacked, name, dim, own) if name in values else own
            for name, own in (("weight", module.weight), ("bias", module.bias))
        )
        plain = nn.functional.layer_norm(x.float(), module.normalized_shape, eps=module.eps)  # rounded once, as it does
        plain = plain if weight is None else plain * weight
        return (plain if bias is None else plain + bias).to(x.dtype)
    return vmap(lambda value, *row: with_values(module, value, *row))(values, *inputs)


def takes_rows(module: nn.Module, names: Sequence[str]) -> bool:
    """Return whether a module multiplies with and adds its vectors in a way that takes one for each row of its input.

    It is tried on small random numbers, against each row with its own.
    """
    like = module.get_parameter(names[0])
    draw = torch.Generator().manual_seed(0)
    x, *vectors = torch.rand(1 + len(names), 2, len(like), generator=draw).to(like.device, like.dtype)
    values = dict(zip(names, vectors, strict=True))
    x = x[:, None].expand(2, 3, -1)
    try:
        expected = vmap(lambda value, row: with_values(module, value, row))(values, x)
        found = with_values(module, {name: value[:, None] for name, value in values.items()}, x)
    except RuntimeError:  # it wants inputs of another width, or vectors and nothing else
        return False
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


def with_values(module: nn.Module, values: Mapping[str, Tensor], *inputs: Tensor) -> Any:
    """Run a module's own code with other values for some of its parameters, which get their own back."""
    own = {name: module._parameters[name] for name in values}
    module._parameters.update(cast(Any, values))
    try:
        return module.forward(*inputs)
    finally:
        module._parameters.update(own)


def refused(key: str, module: nn.Module, what: str) -> FusionError:
    """Return the error of a module that packs cannot run beside."""
    return FusionError(
        f"{key} ({type(module).__name__}): {what}. Give one pack for each row of the batch, or use packs merged."
    )
