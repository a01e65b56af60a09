"""Packs beside the weights of a live model: each row of a batch has its own, and the base stays as it is.

y = x W^T + sum_i w_i (x right_i^T) left_i^T, for the packs i of the row that x belongs to: one grouped product of
factors a layer, whatever the number of packs. Norms and biases are those of the row, an embedding's delta is
looked up, a head's multiplied. The result is that of merged weights, up to rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers.pytorch_utils import Conv1D

from graftllm.errors import FusionError
from graftllm.fusion.branches import Branch, decode_branches
from graftllm.fusion.shelf import Shelf
from graftllm.skillpack import SkillPack

Mix = tuple[tuple[str, float], ...]  # packs of one row with their weights; none for the base


class Beside:
    """A live model whose rows choose their packs. One thread at a time, one batch at a time.

    Example:
        >>> def answer(model, batch, packs):  # packs: SkillPacks by name
        ...     with Beside(model, packs).rows(["math", None, {"math": 0.5, "code": 0.5}]):
        ...         return model(**batch).logits
    """

    def __init__(self, model: nn.Module, packs: Mapping[str, SkillPack], shelf: Shelf | None = None) -> None:
        """Keep the packs; none is decoded before a row asks for it.

        Args:
            model: a causal language model of the packs' base, without packs in its weights.
            packs: by name; may change later.
            shelf: where decoded packs are kept; one without a limit by default.
        """
        self.model, self.packs = model, packs
        self.shelf = Shelf(1 << 62) if shelf is None else shelf
        self._checked: set[str] = set()
        self._stack = _Stack((), {})
        self._handles: list[Any] = []
        self._batch: _Batch | None = None
        self._seen: set[str] = set()
        self._inside = False

    @contextmanager
    def rows(self, wanted: Sequence[str | Mapping[str, float] | None]) -> Iterator[nn.Module]:
        """Let each row of the batches that run inside the block have its packs.

        Args:
            wanted: for each row a pack's name, names with weights, or None for the base.

        Raises:
            FusionError: there is no such pack, one can only be merged, a batch has another number of rows, or
                the model's code reads weights without calling their module.
            PackError: a pack is damaged or was made for another base.
        """
        mixes = [mixed(one) for one in wanted]
        present = tuple(sorted({name for mix in mixes for name, _ in mix}))
        if not set(present) <= set(self._stack.packs) or 2 * len(present) < len(self._stack.packs):
            self._restack(present)
        self._batch, self._seen = _Batch(mixes, self._stack.packs), set()
        try:
            yield self.model
            if present and self._seen and (unheard := self._stack.branches.keys() - self._seen - self._head()):
                raise FusionError(
                    f"{type(self.model).__name__}: its code reads the weights of {min(unheard)!r} without calling it, "
                    "so packs cannot run beside them. Use packs merged, one for a batch."
                )
        finally:
            self._batch = None

    @property
    def stacked(self) -> tuple[str, ...]:
        """The packs whose factors are on the model's devices now."""
        return self._stack.packs

    @property
    def nbytes(self) -> int:
        """How much memory they take there, in bytes; zeros that fill them up to one rank count."""
        tensors = {one.data_ptr(): one for part in self._stack.branches.values() for one in part.tensors()}
        return sum(one.nbytes for one in tensors.values())

    def close(self) -> None:
        """Take everything out of the model again; it is the base alone, as it always was between batches."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._stack = [], _Stack((), {})

    def _restack(self, names: tuple[str, ...]) -> None:
        """Put the factors of these packs, and no others, side by side on the model's devices."""
        self.close()
        modules = dict(self.model.named_modules())
        branches = {name: self.shelf.get(("beside", name), lambda name=name: self._decode(name)) for name in names}
        touched = {key for one in branches.values() for key in one.modules}
        shared: dict[tuple[int, ...], Tensor] = {}
        stacked = {
            key: _Stacked.of([branches[name].modules.get(key) for name in names], modules[key], shared)
            for key in touched
        }
        self._stack = _Stack(names, stacked)
        for key in touched:
            self._handles.append(modules[key].register_forward_hook(self._hook(key, stacked[key]), with_kwargs=True))

    def _decode(self, name: str) -> Any:
        if name not in self.packs:
            raise FusionError(f"pack: expected one of base, {', '.join(self.packs)}; found {name!r}.")
        found = decode_branches(self.model, self.packs[name], check=name not in self._checked)
        self._checked.add(name)
        return found

    def _head(self) -> set[str]:
        """Return the name of the output head, which whoever needs hidden states alone does not call."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        return {name for name, module in self.model.named_modules() if head is not None and module is head}

    def _hook(self, key: str, stacked: "_Stacked") -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor | None:
            batch = self._batch
            if batch is None or not batch.lanes or self._inside:
                return None
            self._seen.add(key)
            self._inside = True  # the module may be called again in here, by itself
            try:
                if not inputs or named:
                    raise _refused(key, module, "is called with other arguments than one tensor")
                if isinstance(module, nn.Embedding):
                    return _embedded(key, module, stacked, batch, inputs[0], output)
                batch.check(key, module, inputs[0])
                if stacked.linear:
                    return _multiplied(stacked, batch, inputs[0], output)
                return _normed(module, stacked, batch, inputs)
            finally:
                self._inside = False

        return hook


def mixed(wanted: str | Mapping[str, float] | None) -> Mix:
    """Return packs with their weights, in one order, of a name, of names with weights, or of `base` or None."""
    if wanted is None or isinstance(wanted, str):
        return () if wanted in (None, "base") else ((wanted, 1.0),)
    return tuple(sorted((name, float(weight)) for name, weight in wanted.items() if weight and name != "base"))


class _Batch:
    """Which rows have which packs.

    A lane is a row with one of its packs. Lanes stand in groups, one for each pack of the stack and all of
    the same length; those that are missing have weight 0.
    """

    def __init__(self, mixes: Sequence[Mix], packs: tuple[str, ...]) -> None:
        self.size = len(mixes)
        groups: list[list[tuple[int, float]]] = [[] for _ in packs]
        for row, mix in enumerate(mixes):
            for name, weight in mix:
                groups[packs.index(name)].append((row, weight))
        self.groups = groups
        self.lanes = sum(map(len, groups))
        longest = max(map(len, groups), default=0)
        padded = [group + [(0, 0.0)] * (longest - len(group)) for group in groups]
        self.index = torch.tensor([row for group in padded for row, _ in group], dtype=torch.long)  # (packs * longest,)
        self.weights = torch.tensor([[weight for _, weight in group] for group in padded])  # (packs, longest)
        self.even = bool((self.weights == 1).all())
        self.straight = self.index.tolist() == list(range(self.size))  # rows are in the order of lanes already
        self.vectors: dict[tuple[int, str], Tensor] = {}
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the lanes' rows and weights on a device."""
        if device not in self._there:
            self._there[device] = self.index.to(device), self.weights.to(device)
        return self._there[device]

    def check(self, key: str, module: nn.Module, value: Tensor) -> None:
        """Refuse an input that has not one row for each of the batch."""
        if len(value) != self.size:
            raise _refused(key, module, f"expected {self.size} rows, as packs were given for, and found {len(value)}")


def _refused(key: str, module: nn.Module, what: str) -> FusionError:
    return FusionError(
        f"{key} ({type(module).__name__}): {what}. Give one pack for each row of the batch, or use packs merged."
    )


@dataclass(frozen=True)
class _Stacked:
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
    ) -> "_Stacked":
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


@dataclass(frozen=True)
class _Stack:
    """The packs that stand side by side, in this order, and what they add to each module."""

    packs: tuple[str, ...]
    branches: Mapping[str, _Stacked]


def _piled(parts: Sequence[Tensor | None], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return tensors one behind the other, shape (parts, *shape), with zeros where they are smaller or missing."""
    pile = torch.zeros(len(parts), *shape, dtype=dtype, device=device)
    for place, part in zip(pile, parts, strict=True):
        if part is not None:
            place[tuple(slice(side) for side in part.shape)] = part.to(device)
    return pile


def _multiplied(stacked: _Stacked, batch: _Batch, x: Tensor, output: Tensor) -> Tensor:
    """Add to a linear layer's output, shape (rows, ..., d_out), what its rows' packs do."""
    index, weights = batch.on(x.device)
    if stacked.left is not None and stacked.right is not None:
        lanes = x if batch.straight else x[index]  # (lanes, ..., d_in)
        inner = _grouped(lanes.to(stacked.right.dtype), stacked.right.mT)
        output = _added(output, _grouped(inner, stacked.left.mT), batch)
    for i, delta in stacked.whole.items():
        if batch.groups[i]:
            rows = torch.tensor([row for row, _ in batch.groups[i]], device=x.device)
            scale = weights[i, : len(rows)].view(-1, *[1] * (x.dim() - 1))
            output = output.index_add(0, rows, (x[rows] @ delta.T * scale).to(output.dtype))
    for name in stacked.vectors:
        bias = _rows_of(stacked, name, batch, x.device)  # (rows, d_out)
        output = output + bias.view(len(bias), *[1] * (output.dim() - 2), -1).to(output.dtype)
    return output


def _embedded(key: str, module: nn.Module, stacked: _Stacked, batch: _Batch, ids: Tensor, output: Tensor) -> Tensor:
    """Add to an embedding's output, shape (rows, tokens, width), what the rows' packs have for their tokens.

    The module itself looks up, so that whatever scale it applies is applied.
    """
    if len(ids) == 1 and batch.size > 1:  # positions, the same for all rows
        ids, output = ids.expand(batch.size, *ids.shape[1:]), output.expand(batch.size, *output.shape[1:])
    batch.check(key, module, ids)
    index, weights = batch.on(ids.device)
    if stacked.left is not None and stacked.right is not None:
        packs, tokens, rank = stacked.left.shape
        first = torch.arange(packs, device=ids.device).repeat_interleave(len(index) // packs) * tokens
        lanes = ids[index] + first.view(-1, *[1] * (ids.dim() - 1))
        looked_up = functional_call(module, {"weight": stacked.left.view(-1, rank)}, (lanes,))  # (lanes, tokens, rank)
        output = _added(output, _grouped(looked_up, stacked.right), batch)
    for i, delta in stacked.whole.items():
        if batch.groups[i]:
            rows = torch.tensor([row for row, _ in batch.groups[i]], device=ids.device)
            scale = weights[i, : len(rows)].view(-1, *[1] * ids.dim())
            added = functional_call(module, {"weight": delta}, (ids[rows],))
            output = output.index_add(0, rows, (added * scale).to(output.dtype))
    return output


def _grouped(lanes: Tensor, matrices: Tensor) -> Tensor:
    """Return lanes, shape (packs * rows of each, ..., n), times their pack's matrix; matrices: (packs, n, m)."""
    packs, n, m = matrices.shape
    return torch.bmm(lanes.reshape(packs, -1, n), matrices).view(*lanes.shape[:-1], m)


def _added(output: Tensor, lanes: Tensor, batch: _Batch) -> Tensor:
    """Return an output with what each lane adds to its row, times the lane's weight."""
    index, weights = batch.on(output.device)
    if not batch.even:
        lanes = lanes * weights.view(-1, *[1] * (lanes.dim() - 1)).to(lanes.dtype)
    return output + lanes if batch.straight else output.index_add(0, index, lanes.to(output.dtype))


def _normed(module: nn.Module, stacked: _Stacked, batch: _Batch, inputs: tuple[Tensor, ...]) -> Tensor:
    """Run a module whose parameters are vectors on each row with the row's own."""
    values = {}
    for name in stacked.vectors:
        own = module.get_parameter(name)
        delta = _rows_of(stacked, name, batch, own.device)
        values[name] = (own.float() + delta).to(own.dtype)  # (rows, length)
    return vmap(lambda value, row: functional_call(module, value, row))(values, inputs)


def _rows_of(stacked: _Stacked, name: str, batch: _Batch, device: torch.device) -> Tensor:
    """Return the delta of a vector for each row of the batch, shape (rows, length), float32; once for a batch."""
    key = (id(stacked), name)
    if key not in batch.vectors:
        index, weights = batch.on(device)
        lanes = stacked.vectors[name].repeat_interleave(weights.shape[1], dim=0) * weights.view(-1, 1)
        total = torch.zeros(batch.size, lanes.shape[1], device=device)
        batch.vectors[key] = total.index_add_(0, index, lanes)
    return batch.vectors[key]
