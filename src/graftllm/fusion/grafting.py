"""Packs on a live transformers model: plug and unplug.

Plugging replaces the touched weights and keeps the base's, or, where memory is short, writes over them and reads the
base's files again; either way unplugging gives the old model back bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from graftllm.devices import backed_by_files, room_bytes
from graftllm.fusion.applying import Weighted, agreed_spec, with_weights
from graftllm.fusion.decoding import (
    check_base,
    check_whole,
    decode,
    decoded,
    summed,
    touched_bindings,
    touched_bytes,
)
from graftllm.fusion.grafts import Graft
from graftllm.fusion.origin import Files, Origin
from graftllm.live import Binding, Names, named_values
from graftllm.skillpack import SkillPack


def plug(model: nn.Module, *packs: SkillPack | Weighted, check: bool = True) -> Graft:
    """Replace the weights that the packs touch, until the returned graft is unplugged.

    What the model held is kept. Where the new values would take more than three quarters of a device's free memory,
    they are written over it instead, as far as the directory that the model was loaded from holds the same, which
    `unplug` reads again.

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
    weighted, graft = with_weights(packs), Graft(model)
    if all(nbytes <= room_bytes(device) for device, nbytes in touched_bytes(model, weighted).items()):
        return graft.put(decode(model, *weighted, check=check).values)
    write_over(graft, weighted, check=check)
    return graft


@torch.inference_mode(False)
@torch.no_grad()
def write_over(graft: Graft, packs: Sequence[Weighted], *, check: bool = True) -> None:
    """Plug packs in by writing over the model's own weights, one tensor at a time; errors are those of `plug`.

    Base values are read from where the model was loaded, now and when the packs leave. What those files do not hold bit
    for bit is replaced and kept; so is what the model has in memory that is a file's, of which writing makes a copy.

    Args:
        graft: of the model; packs that it has give way.
        packs: with their weights, at least one.
        check: see `plug`.
    """
    model, first = graft.model, packs[0][0]
    try:
        touched, parameters = touched_bindings(model, packs), named_values(model)
        for binding in touched:
            for name in binding.live:
                check_whole(name, parameters[name], first, binding)
        stay = _apart(touched, parameters, lambda one: graft.lends(one) and _keeps_shape(one, parameters, packs))
        graft.unplug(but=stay)

        # Nothing is written before all is looked at: parameters may share memory.
        origin, others = Origin(model), graft.others_plugged
        files = None if others else origin.files  # others' values, such as a shelf's, are not to be written over
        held = _held(touched, parameters, files, packs)
        over = _apart(touched, parameters, lambda one: one.names in held or one.names in stay)
        live = {one.names: {name: parameters[name].data for name in one.live} for one in touched}
        kept: dict[str, Tensor] = {}
        for binding in touched:
            if binding.names not in over:
                kept |= decoded(live[binding.names], binding, packs, origin, check=check, others=others)
        for names, binding in over.items():
            if files is not None and not graft.lends(binding):
                graft.lend(binding, live[names], partial(files.again, binding.stored, first))
            if check:
                check_base(graft.base(binding), packs)
        graft.put(kept)
        for names, binding in over.items():
            _write(graft.base(binding), live[names], binding, packs)
    except BaseException:
        graft.unplug()
        raise


def _held(
    bindings: Sequence[Binding], parameters: Mapping[str, Tensor], files: Files | None, packs: Sequence[Weighted]
) -> set[Names]:
    """Return the names of the bindings that can be written over: files hold the same, and their memory is no file's."""
    if files is None:
        return set()
    backed = backed_by_files(parameters[name].data_ptr() for one in bindings for name in one.live)
    found: set[Names] = set()
    for one in bindings:
        live = {name: parameters[name].data for name in one.live}
        own = backed.isdisjoint(value.data_ptr() for value in live.values())
        if own and _keeps_shape(one, live, packs) and files.hold(one, live, packs[0][0]):
            found.add(one.names)
    return found


def _apart(
    bindings: Sequence[Binding], parameters: Mapping[str, Tensor], good: Callable[[Binding], bool]
) -> dict[Names, Binding]:
    """Return the bindings that are good and share no memory with any that is not, by their names."""
    places = {one.names: {parameters[name].untyped_storage().data_ptr() for name in one.live} for one in bindings}
    found = {one.names: one for one in bindings if good(one)}
    while True:
        others = set[int]().union(*(places[one.names] for one in bindings if one.names not in found))
        apart = {names: one for names, one in found.items() if others.isdisjoint(places[names])}
        if len(apart) == len(found):
            return found
        found = apart


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
        name: summed(name, value.to(first.device), packs, dtype=first.dtype, empty=empty)
        for name, value in base.items()
    }
    for name, made in binding.to_live(stored).items():
        if made is not live[name]:
            live[name].copy_(made)
