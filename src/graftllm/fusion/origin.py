"""The values of a live model as its base's checkpoint stores them: exactly, or not at all."""

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftllm.checkpoint import Checkpoint
from graftllm.errors import FusionError, GraftError, PackError
from graftllm.live import Binding
from graftllm.skillpack import SkillPack
from graftllm.tensors import DTYPES


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
        self._seen: list[tuple[int, int, int]] = []

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
        if live.is_floating_point() and self._checkpoint is not None and name in self._checkpoint.specs:
            found = self._checkpoint.tensor(name)
            if found.dtype == dtype and found.to(live.dtype).equal(live.cpu()):
                return found
        raise FusionError(
            f"{pack.source}: the live model holds {name!r} in {live.dtype}, narrower than its base's {dtype}, and was "
            f"not loaded from that base. Load the base with dtype={dtype}, or from its directory."
        )

    def read(self, binding: Binding, live: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Return tensors of the checkpoint that the model was loaded from, backed by its files.

        Args:
            binding: which.
            live: what the model holds of them; None where that is not looked at.

        Returns:
            By name in the checkpoint; None where there is none, or it is not what the model holds.
        """
        checkpoint = self._checkpoint
        if checkpoint is None or not all(name in checkpoint.specs for name in binding.stored):
            return None
        found = {name: checkpoint.tensor(name) for name in binding.stored}
        if live is None:
            return found
        made = binding.to_live(found)
        same = made.keys() == live.keys() and all(made[name].to(live[name]).equal(live[name]) for name in live)
        return found if same else None

    def read_again(self, binding: Binding, pack: SkillPack) -> dict[str, Tensor]:
        """Return what `read` has seen, from the same files.

        Raises:
            FusionError: the files hold other values now.
            CheckpointError: they are gone or damaged.
        """
        checkpoint = self._checkpoint
        assert checkpoint is not None
        if self._seen == _stamps(checkpoint):
            return {name: checkpoint.tensor(name) for name in binding.stored}
        checkpoint = Checkpoint.open(checkpoint.path)
        found: dict[str, Tensor] = {}
        for name in binding.stored:
            try:
                found[name] = checkpoint.tensor(name)
                pack.check_tensor(name, found[name])
            except (KeyError, PackError) as error:
                raise FusionError(
                    f"{checkpoint.path}: expected the base as the live model was loaded from it, whose {name!r} it has "
                    "to get back now, found other values. Put the files back and unplug once more, or load the model "
                    "anew."
                ) from error
        return found

    @cached_property
    def _checkpoint(self) -> Checkpoint | None:
        place = self.model.name_or_path if isinstance(self.model, PreTrainedModel) else None
        if not place:
            return None
        commit = getattr(self.model.config, "_commit_hash", None)
        if os.path.isdir(place):
            place = os.path.abspath(place)  # whatever the working directory will be
        elif commit:
            place = f"{place}@{commit}"
        try:
            found = Checkpoint.open(place)
        except GraftError:
            return None
        self._seen = _stamps(found)
        return found


def _stamps(checkpoint: Checkpoint) -> list[tuple[int, int, int]]:
    """Return what changes when a file of weights does; nothing of one that is gone."""
    found: list[tuple[int, int, int]] = []
    for shard in sorted(set(checkpoint.shards.values())):
        with suppress(OSError):
            told = os.stat(checkpoint.path / shard)
            found.append((told.st_ino, told.st_size, told.st_mtime_ns))
    return found


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Return whether a dtype has every number of another one."""
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    return narrow.itemsize == 1 or torch.promote_types(wide, narrow) == wide  # PyTorch promotes nothing to or from FP8
