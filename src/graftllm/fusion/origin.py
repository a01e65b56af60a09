"""The values of a live model as its base's checkpoint stores them: exactly, or not at all."""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftllm.checkpoint import Checkpoint
from graftllm.errors import FusionError, GraftError, PackError
from graftllm.live import Binding
from graftllm.skillpack import SkillPack
from graftllm.tensors import DTYPES, open_shard, same_bits

_MAPPED = 1 << 28  # bytes of a shard after which it is opened anew: what was read stays in memory till then


class Origin:
    """Where the values of a live model come from.

    A model in its base's dtype, or in a wider one, holds them itself. One in a narrower dtype, in which transformers
    also loads a checkpoint of several, does not: they are read again from where it was loaded, and have to round to
    what the model holds.

    Attributes:
        model: the live model.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at nothing yet."""
        self.model = model

    def stored(self, name: str, live: Tensor, pack: SkillPack) -> Tensor:
        """Return a parameter as the base stores it, on the device of the live value or on CPU.

        Args:
            name: in the checkpoint.
            live: what the model holds of it, in its stored shape.
            pack: of this base.

        Raises:
            FusionError: the model is in a narrower dtype, and what it was loaded from is not there or is not its own.
        """
        dtype = DTYPES[pack.header.tensors[name].dtype]
        if live.dtype == dtype or _holds(live.dtype, dtype):
            return live.to(dtype)
        found = self.files.find(name) if live.is_floating_point() and self.files is not None else None
        if found is not None and found.dtype == dtype and found.to(live.dtype).equal(live.cpu()):
            return found
        raise FusionError(
            f"{pack.source}: the live model holds {name!r} in {live.dtype}, narrower than its base's {dtype}, and was "
            f"not loaded from that base. Load the base with dtype={dtype}, or from its directory."
        )

    @cached_property
    def files(self) -> "Files | None":
        """What the model was loaded from; None where that is not known, or not here."""
        place = self.model.name_or_path if isinstance(self.model, PreTrainedModel) else None
        if not place:
            return None
        commit = getattr(self.model.config, "_commit_hash", None)
        if os.path.isdir(place):
            place = os.path.realpath(place)  # whatever the working directory will be
        elif commit:
            place = f"{place}@{commit}"
        else:
            return None
        try:
            return Files(Checkpoint.open(place))
        except (GraftError, OSError):
            return None


class Files:
    """A checkpoint that may change on disk, which is seen."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Remember how its files are now."""
        self._checkpoint, self._changed = checkpoint, False
        self._shards = [checkpoint.path / shard for shard in sorted(set(checkpoint.shards.values()))]
        self._seen = self._stamps()
        self._open: tuple[str, Any] | None = None  # a shard
        self._mapped = 0  # bytes that were read of it

    def find(self, name: str) -> Tensor | None:
        """Return a tensor, or None if there is none of this name."""
        return self._tensor(name) if name in self._checkpoint.specs else None

    def hold(self, binding: Binding, live: Mapping[str, Tensor], pack: SkillPack) -> bool:
        """Return whether the tensors of a binding are, bit for bit, what a model holds, and of the base's dtype."""
        specs = self._checkpoint.specs
        if any(specs.get(name) != pack.header.tensors[name].spec for name in binding.stored):
            return False
        made = binding.to_live({name: self._tensor(name) for name in binding.stored})
        return made.keys() == live.keys() and all(same_bits(made[name].to(live[name]), live[name]) for name in live)

    def again(self, names: Iterable[str], pack: SkillPack) -> dict[str, Tensor]:
        """Return tensors that the files held when they were first seen.

        Raises:
            FusionError: they hold other values than the pack's base now.
            CheckpointError: they are gone or damaged.
        """
        if (stamps := self._stamps()) != self._seen:
            self._open, self._checkpoint = None, Checkpoint.open(self._checkpoint.path)
            self._seen, self._changed = stamps, True
        found: dict[str, Tensor] = {}
        for name in names:
            try:
                found[name] = self._tensor(name)
                if self._changed:
                    pack.check_tensor(name, found[name])
            except (KeyError, PackError) as error:
                raise FusionError(
                    f"{self._checkpoint.path}: expected the base as the live model was loaded from it, whose {name!r} "
                    "it has to get back now, found other values. Put the files back and unplug once more, or load the "
                    "model anew."
                ) from error
        return found

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor, backed by its shard, which stays open for the next ones until too much of it is mapped."""
        shard = self._checkpoint.shards[name]
        if self._open is None or self._open[0] != shard or self._mapped > _MAPPED:
            self._open, self._mapped = (shard, open_shard(self._checkpoint.path / shard)), 0
        self._mapped += self._checkpoint.specs[name].nbytes
        return self._open[1].get_tensor(name)

    def _stamps(self) -> list[tuple[int, ...]]:
        """Return what changes when a file does; nothing of one that is gone."""
        found: list[tuple[int, ...]] = []
        for shard in self._shards:
            with suppress(OSError):
                told = os.stat(shard)
                found.append((told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns))
        return found


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Return whether a dtype has every number of another one."""
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    return narrow.itemsize == 1 or torch.promote_types(wide, narrow) == wide  # PyTorch promotes nothing to or from FP8
