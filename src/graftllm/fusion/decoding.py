"""What packs make of a live model's parameters: decoded and added to the base's values, in the model's dtype.

theta = theta_base + sum_i w_i * delta_i (arXiv 2505.18502). Nothing is plugged in here; `grafting` does.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graftllm.delta import growable
from graftllm.errors import FusionError, PackError
from graftllm.fusion.applying import Empty, Weighted, agreed_spec, combined, in_range, with_weights
from graftllm.fusion.grafts import is_plugged, is_widened
from graftllm.fusion.origin import Origin
from graftllm.live import Binding, bindings, named_values
from graftllm.skillpack import SkillPack
from graftllm.tensors import DTYPES, TensorSpec

_LARGE = 16.0  # weights up to this take no tuned model's values beyond what a dtype holds


@dataclass(frozen=True)
class Replacement:
    """Live parameters as packs make them, by name, in the dtype and on the device that the model has."""

    values: Mapping[str, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """How much memory the parameters take, in bytes."""
        return sum(value.nbytes for value in self.values.values())


@torch.inference_mode(False)  # what is kept must do in any mode
@torch.no_grad()
def decode(
    model: nn.Module, *packs: SkillPack | Weighted, check: bool = True, empty: Empty = torch.empty
) -> Replacement:
    """Return what `plug` puts into the model where there is room; arguments and errors are the same.

    `empty` makes the tensors that factors are multiplied into, such as a shelf's.
    """
    weighted = with_weights(packs)
    parameters, origin, others, found = named_values(model), Origin(model), is_plugged(model), {}
    for binding in touched_bindings(model, weighted) if weighted else ():
        values = {name: parameters[name].data for name in binding.live}
        found |= decoded(values, binding, weighted, origin, check=check, empty=empty, others=others)
    return Replacement(found)


def touched_bytes(model: nn.Module, packs: Sequence[Weighted]) -> Counter[torch.device]:
    """Return by device how much memory takes what `decode` would give; errors are those of `touched_bindings`."""
    parameters, found = named_values(model), Counter[torch.device]()
    for binding in touched_bindings(model, packs) if packs else ():
        first = binding.stored[0]
        before, after = packs[0][0].header.tensors[first].shape, agreed_spec(first, packs).shape
        growth = after[0] / before[0] if before != after else 1.0
        for name in binding.live:
            found[parameters[name].device] += round(growth * parameters[name].nbytes)
    return found


def decoded(
    values: Mapping[str, Tensor],
    binding: Binding,
    packs: Sequence[Weighted],
    origin: Origin,
    *,
    check: bool,
    others: bool,
    empty: Empty = torch.empty,
) -> dict[str, Tensor]:
    """Return live parameters with the packs' deltas, in the dtype and on the device that they have.

    Args:
        values: the parameters of a binding, as the model holds them.
        binding: which they are.
        packs: with their weights.
        origin: of the model.
        check: compare the base's values with the packs' digests first.
        others: packs are plugged into the model, which are told of where values are not the base's.
        empty: makes the tensors that factors are multiplied into.
    """
    source = packs[0][0].source
    like = values[binding.live[0]]
    for name, value in values.items():
        check_whole(name, value, packs[0][0], binding)
    stored = binding.to_stored({name: value if binding.plain else value.cpu() for name, value in values.items()})
    for name, live in stored.items():
        known = packs[0][0].header.tensors[name].shape
        resized = growable(known, tuple(live.shape))
        if resized and is_widened(origin.model):
            raise _merged_already(source, name)
        base = origin.stored(name, live[: known[0]] if resized else live, packs[0][0])
        if check:
            try:
                check_base({name: base}, packs)
            except PackError as error:
                raise (_merged_already(source, name) if others else error) from error
        value = summed(name, base, packs, dtype=live.dtype, empty=empty)
        stored[name] = torch.cat([value, live[len(value) :].to(value.device)]) if resized else value
    made = binding.to_live(stored)
    if made.keys() != values.keys() or not all(_replaces(made[name], value) for name, value in values.items()):
        raise FusionError(
            f"{source}: the live model holds {binding.live[0]!r} in another shape than its base. "
            "Write a checkpoint with `graftllm apply` and load that instead."
        )
    return {name: value.to(like.device) for name, value in made.items()}


def summed(name: str, base: Tensor, packs: Sequence[Weighted], *, dtype: torch.dtype, empty: Empty) -> Tensor:
    """Return base + packs of one parameter in the dtype that the live model has."""
    value = combined(name, base, packs, dtype=dtype, empty=empty)
    if any(abs(weight) > _LARGE for _, weight in packs):  # a look at all values, which takes time
        in_range(name, value, lambda: base)
    return value


def _replaces(made: Tensor, live: Tensor) -> bool:
    """Return whether a value has the shape of a live one, or more rows."""
    return made.shape == live.shape or growable(tuple(live.shape), tuple(made.shape))


def check_base(base: Mapping[str, Tensor], packs: Sequence[Weighted]) -> None:
    """Refuse values that are not those that the packs were made for."""
    for name, value in base.items():
        for pack, _ in packs:
            pack.check_tensor(name, value.cpu())


def _merged_already(source: str, name: str) -> FusionError:
    return FusionError(
        f"{source}: the live model holds {name!r} as packs that are plugged in made it; unplug them first, or plug all "
        "in one call: plug(model, one, another)."
    )


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
            "no pack can reach it. Load the model without offloading, or write a checkpoint with `graftllm apply`."
        )
    dtype = DTYPES[pack.header.tensors[binding.stored[0]].dtype]
    if dtype.is_floating_point and dtype.itemsize > 1 and is_quantized(value):
        kind = value.dtype if type(value.data) is Tensor else type(value.data).__name__
        raise FusionError(
            f"{pack.source}: the live model holds {name!r} quantized ({kind}), and a merged pack replaces whole "
            "weights. Load the base without quantization, or use a pack made with `graftllm pack --servable` beside "
            "it (way='beside')."
        )


def is_quantized(value: Tensor) -> bool:
    """Return whether a live value is kept in 8 bits or fewer, or by a kind of tensor of its own, as torchao does."""
    return not value.is_floating_point() or value.itemsize < 2 or type(value.data) is not Tensor
