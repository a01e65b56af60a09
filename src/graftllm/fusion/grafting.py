"""Packs on a live transformers model: plug and unplug.

theta = theta_base + sum_i w_i * delta_i (arXiv 2505.18502). Plugging replaces the touched weights
and keeps the base's, so unplugging gives the old model back bit for bit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from graftllm.errors import FusionError
from graftllm.fusion.applying import Empty, Weighted, agreed_spec, check_weights, combined, in_range
from graftllm.fusion.origin import Origin
from graftllm.live import Binding, bindings, named_values
from graftllm.skillpack import SkillPack
from graftllm.tensors import DTYPES, TensorSpec

_LARGE = 16.0  # weights up to this take no tuned model's values beyond what a dtype holds


@dataclass(frozen=True)
class Graft:
    """Packs that are plugged into a live model, until `unplug` or the end of a `with` block."""

    model: nn.Module
    base_values: dict[str, Tensor]

    def unplug(self) -> None:
        """Give the model its own weights back, bit for bit; a second time does nothing."""
        parameters = named_values(self.model)
        for name, value in self.base_values.items():
            parameters[name].data = value
        if self.base_values:
            _plugged_in[self.model] -= 1
        self.base_values.clear()

    def __enter__(self) -> nn.Module:
        """Return the model with its packs."""
        return self.model

    def __exit__(self, *_: object) -> None:
        """Unplug."""
        self.unplug()


@dataclass(frozen=True)
class Replacement:
    """Live parameters as packs make them, by name, in the dtype and on the device that the model has."""

    values: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """How much memory the parameters take, in bytes."""
        return sum(value.nbytes for value in self.values.values())

    def plug(self, model: nn.Module) -> Graft:
        """Put the parameters into the model that they were decoded for; costs no time worth speaking of."""
        parameters = named_values(model)
        graft = Graft(model, {name: parameters[name].data for name in self.values})
        for name, value in self.values.items():
            parameters[name].data = value
        if self.values:
            _plugged_in[model] = _plugged_in.get(model, 0) + 1
        return graft


_plugged_in: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many grafts a model has


def is_plugged(model: nn.Module) -> bool:
    """Return whether packs are in the place of some of the model's weights."""
    return _plugged_in.get(model, 0) > 0


def plug(model: nn.Module, *packs: SkillPack | Weighted, check: bool = True) -> Graft:
    """Replace the weights that the packs touch, until the returned graft is unplugged.

    Not thread-safe: whoever uses the model meanwhile sees weights change one by one.

    Args:
        model: a transformers model of the base, on any devices; in the base's dtype, in a wider one, or in a narrower
            one if what it was loaded from is still there.
        packs: packs of the same base; alone with weight 1, or `(pack, weight)`. Their order does not matter.
        check: compare every touched base weight with the pack's digest first.

    Raises:
        FusionError: the model has no such parameter, or holds it quantized or offloaded, or in a narrower dtype than a
            base that is not found; or a weight is so large that values would leave it.
        PackError: a pack is damaged or was made for another base; the model is then unchanged.
    """
    return decode(model, *packs, check=check).plug(model)


@torch.inference_mode(False)  # what is kept must do in any mode
@torch.no_grad()
def decode(
    model: nn.Module, *packs: SkillPack | Weighted, check: bool = True, empty: Empty = torch.empty
) -> Replacement:
    """Return what `plug` would put into the model; arguments and errors are the same.

    `empty` makes the tensors that factors are multiplied into, such as a shelf's.
    """
    weighted = _weighted(packs)
    check_weights(weighted)
    parameters, origin, found = named_values(model), Origin(model), {}
    for binding in touched_bindings(model, weighted) if weighted else ():
        values = {name: parameters[name].data for name in binding.live}
        found |= _plugged(values, binding, weighted, origin, check=check, empty=empty)
    return Replacement(found)


def decoded_bytes(model: nn.Module, *packs: SkillPack | Weighted) -> int:
    """Return how much memory takes what `decode` would give; errors are those of `touched_bindings`."""
    parameters = named_values(model)
    touched = touched_bindings(model, _weighted(packs)) if packs else []
    return sum(parameters[name].nbytes for binding in touched for name in binding.live)


def _weighted(packs: Iterable[SkillPack | Weighted]) -> list[Weighted]:
    return [pack if isinstance(pack, tuple) else (pack, 1.0) for pack in packs]


def _plugged(
    values: Mapping[str, Tensor],
    binding: Binding,
    packs: Sequence[Weighted],
    origin: Origin,
    *,
    check: bool,
    empty: Empty,
) -> dict[str, Tensor]:
    """Return live parameters with the packs' deltas, in the dtype and on the device that they have."""
    source = packs[0][0].source
    like = values[binding.live[0]]
    for name, value in values.items():
        check_whole(name, value, packs[0][0], binding)
    stored = binding.to_stored({name: value if binding.plain else value.cpu() for name, value in values.items()})
    for name, live in stored.items():
        if agreed_spec(name, packs).shape != tuple(live.shape):
            raise FusionError(
                f"{source}: adds vocabulary rows to {name!r}, which a live model of {live.shape[0]:,} rows "
                "has no room for. Write a checkpoint with `graftllm apply` and load that instead."
            )
        base = origin.stored(name, live, packs[0][0])
        if check:
            for pack, _ in packs:
                pack.check_tensor(name, base.cpu())
        stored[name] = combined(name, base, packs, dtype=live.dtype, empty=empty)
        if any(abs(weight) > _LARGE for _, weight in packs):  # a look at all values, which takes time
            in_range(name, stored[name], lambda base=base: base)
    made = binding.to_live(stored)
    if {name: value.shape for name, value in made.items()} != {name: value.shape for name, value in values.items()}:
        raise FusionError(
            f"{source}: the live model holds {binding.live[0]!r} in another shape than its base. "
            "Write a checkpoint with `graftllm apply` and load that instead."
        )
    return {name: value.to(like.device) for name, value in made.items()}


def touched_bindings(model: nn.Module, packs: Sequence[Weighted]) -> list[Binding]:
    """Return the places of the live model that the packs change, in the order of the pack's names.

    Raises:
        FusionError: the model lacks one.
    """
    found = {name: binding for binding in bindings(model, _base_specs(packs[0][0])) for name in binding.stored}
    touched: dict[int, Binding] = {}
    for pack, _ in packs:
        for name in touched_names(pack):
            if name not in found:
                raise FusionError(
                    f"{pack.source}: touches {name!r}, which the live model does not have under that name. "
                    "Write a checkpoint with `graftllm apply` and load that instead."
                )
            touched[id(found[name])] = found[name]
    return list(touched.values())


def touched_names(pack: SkillPack) -> Iterator[str]:
    """Yield the names of the base's parameters that a pack changes."""
    for name, entry in pack.header.tensors.items():
        if entry.operator != "unchanged" or entry.tuned_spec != entry.spec:
            yield name


def _base_specs(pack: SkillPack) -> dict[str, TensorSpec]:
    return {name: entry.spec for name, entry in pack.header.tensors.items()}


def check_whole(name: str, value: Tensor, pack: SkillPack, binding: Binding) -> None:
    """Refuse a live parameter that is not there as numbers which could be replaced.

    Raises:
        FusionError: it is offloaded by a device map, or quantized.
    """
    if value.is_meta:
        raise FusionError(
            f"{pack.source}: the live model keeps {name!r} off its device until it runs (offloaded by device_map), so "
            "it cannot be replaced. Load the model without offloading, or write a checkpoint with `graftllm apply`."
        )
    dtype = DTYPES[pack.header.tensors[binding.stored[0]].dtype]
    if dtype.is_floating_point and dtype.itemsize > 1 and is_quantized(value):
        kind = value.dtype if type(value.data) is Tensor else type(value.data).__name__
        raise FusionError(
            f"{pack.source}: the live model holds {name!r} quantized ({kind}), and a merged pack replaces whole "
            "weights. Load the base without quantization, or use the pack beside it (way='beside')."
        )


def is_quantized(value: Tensor) -> bool:
    """Return whether a live value is kept in 8 bits or fewer, or by a kind of tensor of its own, as torchao does."""
    return not value.is_floating_point() or value.itemsize < 2 or type(value.data) is not Tensor
