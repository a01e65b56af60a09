"""The values of a live model as its base's checkpoint stores them: exactly, or not at all."""

from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftllm.checkpoint import Checkpoint
from graftllm.errors import FusionError, GraftError
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

    @cached_property
    def _checkpoint(self) -> Checkpoint | None:
        place = self.model.name_or_path if isinstance(self.model, PreTrainedModel) else None
        if not place:
            return None
        commit = getattr(self.model.config, "_commit_hash", None)
        try:
            return Checkpoint.open(f"{place}@{commit}" if commit else place)
        except GraftError:
            return None


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Return whether a dtype has every number of another one."""
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    return narrow.itemsize == 1 or torch.promote_types(wide, narrow) == wide  # PyTorch promotes nothing to or from FP8
