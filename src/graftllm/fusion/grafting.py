"""Packs on a live transformers model: plug and unplug.

theta = theta_base + sum_i w_i * delta_i (arXiv 2505.18502). Plugging replaces the touched weights and keeps the base's,
or, where memory is short, writes over them and reads the base's files again; either way unplugging gives the old model
back bit for bit.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from graftllm.delta import growable
from graftllm.devices import free_bytes
from graftllm.errors import FusionError, PackError
from graftllm.fusion.applying import Empty, Weighted, agreed_spec, combined, in_range, with_weights
from graftllm.fusion.grafts import Graft, is_plugged, is_widened
from graftllm.fusion.origin import Origin
from graftllm.live import Binding, bindings, named_values
from graftllm.skillpack import SkillPack
from graftllm.tensors import DTYPES, TensorSpec

_LARGE = 16.0  # weights up to this take no tuned model's values beyond what a dtype holds
_SHARE = 0.75  # of a device's free memory, that packs may take


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
        return Graft(model).put(self.values)


def plug(model: nn.Module, *packs: SkillPack | Weighted, check: bool = True) -> Graft:
    """Replace the weights that the packs touch, until the returned graft is unplugged.

    What the model held is kept. Where less than a third of a device's free memory would be left beside that, new values
    are written over it instead, as far as the directory that the model was loaded from holds the same, and read from
    there by `unplug`.

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
    weighted = with_weights(packs)
    if all(nbytes <= room_bytes(device) for device, nbytes in _touched_bytes(model, weighted).items()):
        return decode(model, *weighted, check=check).plug(model)
    return plug_in_place(model, *weighted, check=check)


@torch.inference_mode(False)
@torch.no_grad()
def plug_in_place(
    model: nn.Module, *packs: SkillPack | Weighted, check: bool = True, over: Graft | None = None
) -> Graft:
    """Write what `plug` would put into the model over its own weights; errors are the same.

    One tensor at a time is in memory beside the model. Base values are read from where the model was loaded, now and
    when it is unplugged; what is not there, or is not what the model holds, is replaced and kept.

    Args:
        model: see `plug`.
        packs: see `plug`.
        check: see `plug`.
        over: packs that are plugged in place, and give way to these; what is returned then.
    """
    weighted = with_weights(packs)
    graft, origin, parameters = over or Graft(model), Origin(model), named_values(model)
    try:
        touched = touched_bindings(model, weighted) if weighted else []
        in_place = {binding.live for binding in touched if _keeps_shape(binding, parameters, weighted)}
        graft.unplug(but=in_place)
        written = {parameters[name].data_ptr() for names in in_place if graft.lent(names) for name in names}
        for binding in touched:
            live = {name: parameters[name].data for name in binding.live}
            for name, value in live.items():
                check_whole(name, value, weighted[0][0], binding)
            places, again = {value.data_ptr() for value in live.values()}, graft.lent(binding.live)
            tied = not written.isdisjoint(places)  # packs' values stand there, so digests have to tell the base's
            if binding.live not in in_place:
                base = None
            elif again is not None:
                base = again()
            else:
                base = origin.read(binding, None if tied else live)
            checks = check or (tied and again is None)
            if base is None:
                others = graft.others_plugged
                graft.put(_plugged(live, binding, weighted, origin, check=checks, empty=torch.empty, others=others))
            else:
                if checks:
                    _check_base(base, weighted)
                graft.lend(binding, partial(origin.read_again, binding, weighted[0][0]))
                _write(base, live, binding, weighted)
                written |= places
    except BaseException:
        graft.unplug()
        raise
    return graft


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
        others = is_plugged(model)
        found |= _plugged(values, binding, weighted, origin, check=check, empty=empty, others=others)
    return Replacement(found)


def decoded_bytes(model: nn.Module, *packs: SkillPack | Weighted) -> int:
    """Return how much memory takes what `decode` would give; errors are those of `touched_bindings`."""
    return sum(_touched_bytes(model, with_weights(packs)).values())


def room_bytes(device: torch.device) -> int:
    """Return how much of a device's memory packs may take now; the rest is for answering."""
    return int(_SHARE * free_bytes(device))


def _touched_bytes(model: nn.Module, packs: Sequence[Weighted]) -> Counter[torch.device]:
    """Return by device how much memory the parameters take that packs make."""
    parameters, found = named_values(model), Counter[torch.device]()
    for binding in touched_bindings(model, packs) if packs else ():
        first = binding.stored[0]
        before, after = packs[0][0].header.tensors[first].shape, agreed_spec(first, packs).shape
        growth = after[0] / before[0] if before != after else 1.0
        for name in binding.live:
            found[parameters[name].device] += round(growth * parameters[name].nbytes)
    return found


def _plugged(
    values: Mapping[str, Tensor],
    binding: Binding,
    packs: Sequence[Weighted],
    origin: Origin,
    *,
    check: bool,
    empty: Empty,
    others: bool,
) -> dict[str, Tensor]:
    """Return live parameters with the packs' deltas, in the dtype and on the device that they have.

    Where `others` are plugged in, values that are not the base's are theirs.
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
                _check_base({name: base}, packs)
            except PackError as error:
                raise (_merged_already(source, name) if others else error) from error
        value = _summed(name, base, packs, dtype=live.dtype, empty=empty)
        stored[name] = torch.cat([value, live[len(value) :].to(value.device)]) if resized else value
    made = binding.to_live(stored)
    if made.keys() != values.keys() or not all(_replaces(made[name], value) for name, value in values.items()):
        raise FusionError(
            f"{source}: the live model holds {binding.live[0]!r} in another shape than its base. "
            "Write a checkpoint with `graftllm apply` and load that instead."
        )
    return {name: value.to(like.device) for name, value in made.items()}


def _keeps_shape(binding: Binding, live: Mapping[str, Tensor], packs: Sequence[Weighted]) -> bool:
    """Return whether parameters have no rows that the base does not have, now or with the packs."""
    entry, tuned = packs[0][0].header.tensors[binding.stored[0]], agreed_spec(binding.stored[0], packs)
    return tuned.shape == entry.shape and (not binding.plain or live[binding.live[0]].shape == entry.shape)


def _write(base: Mapping[str, Tensor], live: Mapping[str, Tensor], binding: Binding, packs: Sequence[Weighted]) -> None:
    """Write base + packs into live memory."""
    first = live[binding.live[0]]

    def empty(shape: torch.Size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        fits = binding.plain and shape == first.shape and dtype == first.dtype and device == first.device
        return first if fits else torch.empty(shape, dtype=dtype, device=device)

    stored = {
        name: _summed(name, value.to(first.device), packs, dtype=first.dtype, empty=empty)
        for name, value in base.items()
    }
    for name, made in binding.to_live(stored).items():
        if made is not live[name]:
            live[name].copy_(made)


def _summed(name: str, base: Tensor, packs: Sequence[Weighted], *, dtype: torch.dtype, empty: Empty) -> Tensor:
    """Return base + packs of one parameter in the dtype that the live model has."""
    value = combined(name, base, packs, dtype=dtype, empty=empty)
    if any(abs(weight) > _LARGE for _, weight in packs):  # a look at all values, which takes time
        in_range(name, value, lambda: base)
    return value


def _replaces(made: Tensor, live: Tensor) -> bool:
    """Return whether a value has the shape of a live one, or more rows."""
    return made.shape == live.shape or growable(tuple(live.shape), tuple(made.shape))


def _check_base(base: Mapping[str, Tensor], packs: Sequence[Weighted]) -> None:
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
