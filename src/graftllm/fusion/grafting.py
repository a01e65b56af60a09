"""Packs on a live transformers model: plug and unplug.

theta = theta_base + sum_i w_i * delta_i (arXiv 2505.18502). Plugging replaces the touched weights
and keeps the base's, so unplugging gives the old model back bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from graftllm.delta import growable
from graftllm.errors import FusionError, PackError
from graftllm.fusion.applying import Empty, Weighted, agreed_spec, combined, in_range, with_weights
from graftllm.fusion.origin import Origin
from graftllm.live import Binding, bindings, named_values
from graftllm.skillpack import SkillPack
from graftllm.tensors import DTYPES, TensorSpec

_ROWS = ("num_embeddings", "out_features")  # what modules call them
_LARGE = 16.0  # weights up to this take no tuned model's values beyond what a dtype holds


class Graft:
    """Packs that are plugged into a live model, until `unplug` or the end of a `with` block."""

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Put parameters, by name, into a model; what was there is kept.

        Raises:
            FusionError: packs run beside the model's weights now.
        """
        if values and model in running_beside:
            raise FusionError("plug: packs run beside the weights of this model now; leave that block first.")
        self.model = model
        parameters = named_values(model)
        # Modules stay what they are where a model is wrapped meanwhile; a parameter that moves is another object.
        self._kept = [(*_place(model, name), parameters[name].data) for name in values]
        self._sizes: list[tuple[Any, str, int]] = []  # what said how many rows there are, and what it said
        self._widens = False
        if values:
            _plugged_in[model] = _plugged_in.get(model, 0) + 1
        try:
            for name, value in values.items():
                before, parameters[name].data = parameters[name].shape, value
                if before != value.shape:
                    self._tell_rows(parameters[name], before[0])
        except BaseException:
            self.unplug()
            raise

    def unplug(self) -> None:
        """Give the model its own weights back, bit for bit, where it is now; a second time does nothing."""
        for module, key, value in self._kept:
            here = cast(Tensor, getattr(module, key))
            here.data = value.to(here)
        for holder, key, count in self._sizes:
            setattr(holder, key, count)
        if self._kept:
            _plugged_in[self.model] -= 1
        if self._widens:
            _widened.pop(self.model, None)
        self._kept, self._sizes, self._widens = [], [], False

    def _tell_rows(self, parameter: Tensor, before: int) -> None:
        """Let modules and config know how many rows a parameter has now; `unplug` takes that back."""
        modules = list(self.model.modules())
        owners = [one for one in modules if any(own is parameter for own in one._parameters.values())]
        holders: list[tuple[Any, str]] = [(one, key) for one in owners for key in _ROWS]
        config = getattr(self.model, "config", None)
        texts = [config, config.get_text_config()] if isinstance(config, PreTrainedConfig) else []
        holders += [(one, "vocab_size") for one in (*texts, *modules) if getattr(one, "vocab_size", None) == before]
        for holder, key in holders:
            if isinstance(count := getattr(holder, key, None), int) and count != len(parameter):
                self._sizes.append((holder, key, count))
                setattr(holder, key, len(parameter))
        self._widens = True
        _widened.setdefault(self.model, {})[id(parameter)] = before

    def __enter__(self) -> nn.Module:
        """Return the model with its packs."""
        return self.model

    def __exit__(self, *_: object) -> None:
        """Unplug."""
        self.unplug()


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter, and the parameter's own name there."""
    module, _, key = name.rpartition(".")
    return model.get_submodule(module), key


@dataclass(frozen=True)
class Replacement:
    """Live parameters as packs make them, by name, in the dtype and on the device that the model has."""

    values: Mapping[str, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """How much memory the parameters take, in bytes."""
        return sum(value.nbytes for value in self.values.values())

    def plug(self, model: nn.Module) -> Graft:
        """Put the parameters into the model that they were decoded for; costs no time worth speaking of."""
        return Graft(model, self.values)


running_beside: WeakSet[nn.Module] = WeakSet()  # the models whose rows have packs now
_widened: WeakKeyDictionary[nn.Module, dict[int, int]] = WeakKeyDictionary()  # rows without packs, by parameter
_plugged_in: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many grafts a model has


def rows_without_packs(model: nn.Module, parameter: Tensor) -> int:
    """Return how many rows a parameter has when no pack is plugged in."""
    return _widened.get(model, {}).get(id(parameter), len(parameter))


def is_plugged(model: nn.Module) -> bool:
    """Return whether packs are in the place of some of the model's weights."""
    return _plugged_in.get(model, 0) > 0


def plug(model: nn.Module, *packs: SkillPack | Weighted, check: bool = True) -> Graft:
    """Replace the weights that the packs touch, until the returned graft is unplugged.

    Not thread-safe: whoever uses the model meanwhile sees weights change one by one.

    Args:
        model: a transformers model of the base, on any devices; in the base's dtype, in a wider one, or in a narrower
            one if what it was loaded from is still there. It may have more vocabulary rows, and gets those that the
            packs add, until they are unplugged.
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
    weighted = with_weights(packs)
    parameters, origin, found = named_values(model), Origin(model), {}
    for binding in touched_bindings(model, weighted) if weighted else ():
        values = {name: parameters[name].data for name in binding.live}
        found |= _plugged(values, binding, weighted, origin, check=check, empty=empty)
    return Replacement(found)


def decoded_bytes(model: nn.Module, *packs: SkillPack | Weighted) -> int:
    """Return how much memory takes what `decode` would give; errors are those of `touched_bindings`."""
    parameters, weighted = named_values(model), with_weights(packs)
    found = 0
    for binding in touched_bindings(model, weighted) if weighted else ():
        first = binding.stored[0]
        before, after = weighted[0][0].header.tensors[first].shape, agreed_spec(first, weighted).shape
        growth = after[0] / before[0] if before != after else 1.0
        found += round(growth * sum(parameters[name].nbytes for name in binding.live))
    return found


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
        known = packs[0][0].header.tensors[name].shape
        resized = growable(known, tuple(live.shape))
        if resized and origin.model in _widened:
            raise _merged_already(source, name)
        base = origin.stored(name, live[: known[0]] if resized else live, packs[0][0])
        if check:
            _check_base(name, base, packs, origin.model)
        value = combined(name, base, packs, dtype=live.dtype, empty=empty)
        if any(abs(weight) > _LARGE for _, weight in packs):  # a look at all values, which takes time
            in_range(name, value, lambda base=base: base)
        stored[name] = torch.cat([value, live[len(value) :].to(value.device)]) if resized else value
    made = binding.to_live(stored)
    if made.keys() != values.keys() or not all(_replaces(made[name], value) for name, value in values.items()):
        raise FusionError(
            f"{source}: the live model holds {binding.live[0]!r} in another shape than its base. "
            "Write a checkpoint with `graftllm apply` and load that instead."
        )
    return {name: value.to(like.device) for name, value in made.items()}


def _replaces(made: Tensor, live: Tensor) -> bool:
    """Return whether a value has the shape of a live one, or more rows."""
    return made.shape == live.shape or growable(tuple(live.shape), tuple(made.shape))


def _check_base(name: str, value: Tensor, packs: Sequence[Weighted], model: nn.Module) -> None:
    """Refuse a live value that is not the one that the packs were made for."""
    for pack, _ in packs:
        try:
            pack.check_tensor(name, value.cpu())
        except PackError as error:
            if not is_plugged(model):
                raise
            raise _merged_already(pack.source, name) from error


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
