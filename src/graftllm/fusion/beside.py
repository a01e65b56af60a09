"""Packs beside the weights of a live model: each row of a batch has its own, and the base stays as it is.

y = x W^T + sum_i w_i (x right_i^T) left_i^T, for the packs i of the row that x belongs to: one grouped product of
factors a layer, whatever the number of packs. Norms and biases are those of the row, an embedding's delta is
looked up, a head's multiplied. The result is that of merged weights, up to rounding.
"""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftllm.errors import FusionError
from graftllm.fusion.branches import kept_branches
from graftllm.fusion.grafts import is_plugged, running_beside
from graftllm.fusion.names import unknown_pack
from graftllm.fusion.routes import BASE
from graftllm.fusion.shelf import Shelf
from graftllm.fusion.stacks import Batch, Mix, Stacked, embedded, multiplied, normed, refused, takes_rows
from graftllm.skillpack import SkillPack


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
            packs: by name; a name may come to mean another pack, or none, between batches.
            shelf: where decoded packs are kept; one without a limit by default.
        """
        self.model, self.packs = model, packs
        self.shelf = Shelf(1 << 62) if shelf is None else shelf
        self._checked: dict[str, SkillPack] = {}
        self._stack = _Stack({}, {})
        self._handles: list[Any] = []
        self._batch: Batch | None = None
        self._last: tuple[list[Mix], Batch] | None = None
        self._seen: set[str] = set()
        self._by_type: dict[type, bool] = {}

    @contextmanager
    def rows(self, wanted: Sequence[str | Mapping[str, float] | None]) -> Iterator[nn.Module]:
        """Let each row of the batches that run inside the block have its packs.

        Args:
            wanted: for each row a pack's name, names with weights, or None for the base.

        Raises:
            FusionError: there is no such pack, a weight is no finite number, one can only be merged, packs are merged
                into the model or run beside it already, a batch has another number of rows, or the model's code
                reads weights without calling their module.
            PackError: a pack is damaged or was made for another base.
        """
        if self._batch is not None or is_plugged(self.model):
            how = "merged into" if self._batch is None else "beside the weights of"
            raise FusionError(f"rows: packs are {how} this model already; leave that block first, or unplug them.")
        if isinstance(wanted, str | Mapping):
            raise FusionError(f"rows: expected a list with an entry for each row, found {wanted!r}.")
        batch = self._batch = self._grouped([mixed(one, self.packs) for one in wanted])
        self._seen = set()
        running_beside.add(self.model)
        try:
            yield self.model
            if batch.lanes and self._seen and (unheard := self._stack.branches.keys() - self._seen):
                if unheard := unheard - self._head():
                    raise FusionError(
                        f"{type(self.model).__name__}: its code reads the weights of {min(unheard)!r} without calling "
                        "it, so packs cannot run beside them. Use packs merged, one for a batch."
                    )
        finally:
            batch.forget_input()
            running_beside.discard(self.model)
            self._batch = None

    @property
    def stacked(self) -> tuple[str, ...]:
        """The packs whose factors are on the model's devices now."""
        return tuple(self._stack.packs)

    @property
    def nbytes(self) -> int:
        """How much memory they take there, in bytes; zeros that fill them up to one rank count."""
        tensors = {one.data_ptr(): one for part in self._stack.branches.values() for one in part.tensors()}
        return sum(one.nbytes for one in tensors.values())

    def close(self) -> None:
        """Take everything out of the model again; it is the base alone, as it always was between batches."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._stack, self._last = [], _Stack({}, {}), None

    def _grouped(self, mixes: list[Mix]) -> Batch:
        """Return which rows have which packs, after putting these side by side where they are not yet."""
        present = {name: self.packs[name] for name in sorted({name for mix in mixes for name, _ in mix})}
        missing = any(self._stack.packs.get(name) is not pack for name, pack in present.items())
        if missing or self._last is None or self._last[0] != mixes:  # the next token of the same rows needs nothing new
            with torch.inference_mode(False), torch.no_grad():  # it outlives the mode that this batch runs in
                if missing or 2 * len(present) < len(self._stack.packs):
                    self._restack(present)
                self._last = mixes, Batch(mixes, self.stacked)
        return self._last[1]

    def _restack(self, packs: Mapping[str, SkillPack]) -> None:
        """Put the factors of these packs, and no others, side by side on the model's devices."""
        self.close()
        modules, names = dict(self.model.named_modules()), list(packs)
        branches = {}
        for name, pack in packs.items():
            check = self._checked.get(name) is not pack
            branches[name] = kept_branches(self.shelf, name, self.model, pack, check=check)
            self._checked[name] = pack
        touched = {key for one in branches.values() for key in one.modules}
        shared: dict[tuple[int, ...], Tensor] = {}
        stacked = {
            key: Stacked.of([branches[name].modules.get(key) for name in names], modules[key], shared)
            for key in touched
        }
        self._stack = _Stack(packs, stacked)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code knows only of the hooks that were there when it was made
        for key in touched:
            self._attach(key, modules[key], stacked[key])

    def _head(self) -> set[str]:
        """Return the name of the output head, which whoever needs hidden states alone does not call."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        return {name for name, module in self.model.named_modules() if head is not None and module is head}

    def _attach(self, key: str, module: nn.Module, stacked: Stacked) -> None:
        """Let a module add what the packs of its rows do."""
        own: dict[str, Any] = {}  # a norm's vectors while it runs with those of the rows

        def running(inputs: tuple[Any, ...], named: dict[str, Any]) -> Batch | None:
            batch = self._batch
            if batch is None or not batch.lanes:
                return None
            self._seen.add(key)
            if not inputs or named:
                raise refused(key, module, "is called with other arguments than one tensor")
            if not isinstance(module, nn.Embedding) and len(inputs[0]) != batch.size:
                raise _other_size(key, module, batch, inputs[0])
            return batch

        def enter(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if batch := running(inputs, named):
                own.update((name, module._parameters[name]) for name in stacked.vectors)
                for name, value in own.items():
                    rows = batch.vector(stacked, name, inputs[0].dim(), value)
                    module._parameters[name] = cast(nn.Parameter, rows)

        def leave(*_: Any) -> None:
            module._parameters.update(own)
            own.clear()

        def add(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor | None:
            batch = running(inputs, named)
            if batch is None:
                return None
            inputs = tuple(value.to(output.device) for value in inputs)  # a device map moves them inside `forward`
            if stacked.linear:
                return multiplied(stacked, batch, inputs[0], output)
            if not isinstance(module, nn.Embedding):
                return batch.where_packed(normed(module, stacked, batch, inputs), output)
            ids = inputs[0]
            if len(ids) == 1 and batch.size > 1:  # positions, the same for all rows
                ids, output = ids.expand(batch.size, *ids.shape[1:]), output.expand(batch.size, *output.shape[1:])
            if len(ids) != batch.size:
                raise _other_size(key, module, batch, ids)
            return embedded(module, stacked, batch, ids, output)

        if stacked.linear or isinstance(module, nn.Embedding) or not self._takes_rows(module, stacked):
            self._handles.append(module.register_forward_hook(add, with_kwargs=True))
        else:  # one that takes vectors for each row is run once, with those
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))

    def _takes_rows(self, module: nn.Module, stacked: Stacked) -> bool:
        if type(module) not in self._by_type:
            self._by_type[type(module)] = takes_rows(module, list(stacked.vectors))
        return self._by_type[type(module)]


def mixed(wanted: str | Mapping[str, float] | None, packs: Collection[str], *, also: Collection[str] = (BASE,)) -> Mix:
    """Return packs with their weights, in one order, of a name, of names with weights, or of `base` or None.

    Args:
        wanted: what is asked for.
        packs: the names of those that there are.
        also: what the error tells of, besides them.

    Raises:
        FusionError: there is no such pack, or a weight is no finite number.
    """
    shares = {wanted: 1.0} if isinstance(wanted, str) else wanted or {}
    for name, weight in shares.items():
        if name != BASE and name not in packs:
            raise unknown_pack(name, [*also, *packs])
        if not _is_finite(weight):
            raise FusionError(f"pack: expected a finite weight for {name!r}, found {weight!r}.")
    return tuple(sorted((name, float(weight)) for name, weight in shares.items() if weight and name != BASE))


def _is_finite(weight: Any) -> bool:
    try:
        return abs(weight) <= torch.finfo(torch.float32).max
    except TypeError:
        return False


def _other_size(key: str, module: nn.Module, batch: Batch, value: Tensor) -> FusionError:
    return refused(key, module, f"expected {batch.size} rows, as packs were given for, and found {len(value)}")


@dataclass(frozen=True)
class _Stack:
    """The packs that stand side by side, in this order, and what they add to each module."""

    packs: Mapping[str, SkillPack]
    branches: Mapping[str, Stacked]
