"""Stacked experts: what goes into each expert's matrix and what comes out, found in any model that multiplies by it.

The experts of a layer are one 3-D parameter of a module, so there is no module of each matrix to be asked. The slices
are found by their addresses in the products that are made while the module runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from graftllm.compression.matrix import matrix_shape
from graftllm.live import Binding
from graftllm.tensors import TensorSpec

_MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_SHIFT = 32  # bits of a number below those that tell the tensor


@dataclass(frozen=True)
class Slice:
    """The matrix of one expert, and the stored tensors that it is made of and whose columns are its own.

    Attributes:
        stored: their names.
        rows: of each whose rows are known, by name, the numbers of its rows, one for each row of the slice that is of
            it, and the numbers of those rows in the slice.
    """

    stored: tuple[str, ...]
    rows: Mapping[str, tuple[Tensor, Tensor]]


Told = Callable[[Slice, Tensor, Tensor], None]


class ExpertWatcher(TorchFunctionMode):
    """While it is entered, tells of every product of tokens with an expert's matrix: the slice, inputs and outputs.

    The model's experts must be multiplied one by one (transformers' experts implementation `eager`). Padding goes in as
    zeros.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Mapping[str, Binding],
        specs: Mapping[str, TensorSpec],
        told: Told = lambda part, x, output: None,
        turned: Told = lambda part, x, output: None,
    ) -> None:
        """Watch the 3-D parameters of a model.

        Args:
            model: loaded, or streamed.
            found: the bindings by live name.
            specs: of the checkpoint.
            told: is told of products with matrices whose rows are outputs (`linear`).
            turned: is told of products with matrices whose rows are inputs (`matmul`).
        """
        super().__init__()
        self.mask = torch.empty(0)  # (rows, length) of the running forward pass, true where there is no padding
        self.slices: dict[str, list[Slice]] = {}  # by live name
        self._told, self._turned = told, turned
        self.hooks: list[RemovableHandle] = []
        self._running: dict[int, Slice] = {}  # by address, while their module runs
        self._multiplied: set[int] = set()
        self._reached: set[int] = set()  # of these, those by a token
        for name, module in model.named_modules():
            if isinstance(module, _ConvNd):
                continue
            for key, parameter in module._parameters.items():
                live = f"{name}.{key}"
                if parameter is not None and parameter.ndim == 3 and live in found:
                    self.slices[live] = slices_of(found[live], live, specs)
                    enter = partial(self._enter_module, live, key)
                    self.hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                    self.hooks.append(module.register_forward_hook(self._leave_module, always_call=True))

    @property
    def multiplied(self) -> frozenset[str]:
        """Live names of the stacks of which a slice was multiplied so far; others may not be experts at all."""
        return frozenset(
            live for live, slices in self.slices.items() if any(id(part) in self._multiplied for part in slices)
        )

    @property
    def unreached(self) -> frozenset[str]:
        """Names of the stored tensors, a matrix each or stacks, that hold an expert which no token reached so far."""
        parts = [part for live in self.multiplied for part in self.slices[live] if id(part) not in self._reached]
        return frozenset(name for part in parts for name in part.stored)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        told = self._told if func is nn.functional.linear else self._turned if func in _MATMUL else None
        if told is not None and self._running and len(args) > 1 and args[1].ndim == 2:
            part = self._running.get(args[1].data_ptr())
            if part is not None and part.stored:
                self._multiplied.add(id(part))
                x = args[0].flatten(0, -2)
                if id(part) not in self._reached and bool(x.any()):
                    self._reached.add(id(part))
                told(part, x, output)
        return output

    def _enter_module(
        self, live: str, key: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        stack = module._parameters[key]
        assert stack is not None
        self._running |= {stack[i].data_ptr(): part for i, part in enumerate(self.slices[live])}
        return tuple(map(self._without_padding, inputs)), {k: self._without_padding(x) for k, x in named.items()}

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.clear()  # other weights may stand at these addresses

    def _without_padding(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            return x
        if x.shape[:2] == self.mask.shape:
            return x * self.mask.reshape(*self.mask.shape, *[1] * (x.ndim - 2))
        return x * self.mask.reshape(-1, *[1] * (x.ndim - 1)) if len(x) == self.mask.numel() else x


def slices_of(binding: Binding, live: str, specs: Mapping[str, TensorSpec]) -> list[Slice]:
    """Return what each slice of a live stack is made of; a matrix that others make is one slice.

    Found by converting numbers that tell where they came from.
    """
    if binding.plain:
        return _slices_of_stack(binding.stored[0], specs[binding.stored[0]].shape)
    shapes = {name: specs[name].shape for name in binding.stored if len(specs[name].shape) == 2}
    names = list(shapes)
    by_column = _converted(binding, live, {name: (2, shape[1]) for name, shape in shapes.items()}, side=1)
    if by_column is None:
        return [Slice((), {})]
    by_row = _converted(binding, live, {name: (shape[0], 2) for name, shape in shapes.items()}, side=0)
    found = []
    for i, part in enumerate(by_column):
        aligned = bool((part % (1 << _SHIFT) == torch.arange(part.shape[1])).all())
        stored = tuple(names[j] for j in (part[:, 0] >> _SHIFT).unique().tolist()) if aligned else ()
        rows = {} if by_row is None else _rows(by_row[i][:, 0], names)
        found.append(Slice(stored, {name: rows[name] for name in stored if name in rows}))
    return found


def _slices_of_stack(name: str, shape: tuple[int, ...]) -> list[Slice]:
    """Return the slices of a stack that is stored as it is."""
    if matrix_shape(shape)[1] != shape[-1]:
        return [Slice((), {})] * shape[0]
    here = torch.arange(shape[1])
    return [Slice((name,), {name: (here + i * shape[1], here)}) for i in range(shape[0])]


def _converted(binding: Binding, live: str, shapes: Mapping[str, tuple[int, int]], *, side: int) -> Tensor | None:
    """Return the slices that numbers make which tell the tensor, and the row or column, that they came from."""
    marked = {}
    for i, (name, shape) in enumerate(shapes.items()):
        places = torch.arange(shape[side])
        marked[name] = (i << _SHIFT) + (places[:, None] if side == 0 else places).expand(shape)
    try:
        made = binding.to_live(marked)[live]
    except (ValueError, RuntimeError, KeyError):  # a rule that needs the whole shape
        return None
    return made if made.ndim == 3 else made[None]


def _rows(marks: Tensor, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = marks >> _SHIFT
    found = {}
    for j in tensors.unique().tolist():
        here = (tensors == j).nonzero()[:, 0]
        found[names[j]] = (marks[here] % (1 << _SHIFT), here)
    return found
