"""Grafts: which of a live model's weights are not its own now, and how they become so again, bit for bit."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from graftllm.errors import FusionError
from graftllm.live import Binding, Names, named_values

_ROWS = ("num_embeddings", "out_features")  # what modules call them

running_beside: WeakSet[nn.Module] = WeakSet()  # the models whose rows have packs now
_widened: WeakKeyDictionary[nn.Module, dict[int, int]] = WeakKeyDictionary()  # rows without packs, by parameter
_plugged_in: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()  # the marks of a model's grafts


class Graft:
    """Packs that are plugged into a live model, until `unplug` or the end of a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        """Change nothing yet."""
        self.model = model
        self._undo: list[Callable[[], object]] = []
        self._lent: dict[Names, _Lent] = {}
        self._mark = object()

    def put(self, values: Mapping[str, Tensor]) -> "Graft":
        """Put values, by name, in the place of parameters; what was there is kept. Return this graft.

        Raises:
            FusionError: packs run beside the model's weights now.
        """
        self._begin()
        parameters = named_values(self.model)
        try:
            for name, value in values.items():
                parameter = parameters[name]
                before = parameter.data
                self._undo.append(partial(_put_back, *_place(self.model, name), before))
                parameter.data = value
                if before.shape != value.shape:
                    self._tell_rows(parameter, len(before))
        except BaseException:
            self.unplug()
            raise
        return self

    def lend(self, binding: Binding, live: Mapping[str, Tensor], base: Callable[[], Mapping[str, Tensor]]) -> None:
        """Let parameters be written over.

        Args:
            binding: which they are.
            live: the parameters, by name.
            base: gives what they hold, as the checkpoint stores it.

        Raises:
            FusionError: packs run beside the model's weights now.
        """
        self._begin()
        places = {name: (*_place(self.model, name), value.dtype) for name, value in live.items()}
        self._lent.setdefault(binding.names, _Lent(binding, places, base))

    def lends(self, binding: Binding) -> bool:
        """Return whether the parameters of a binding may be written over."""
        return binding.names in self._lent

    def base(self, binding: Binding) -> Mapping[str, Tensor]:
        """Return what parameters that may be written over held, as the checkpoint stores it."""
        return self._lent[binding.names].base()

    @property
    def others_plugged(self) -> bool:
        """Whether other packs than these are plugged into the model."""
        return bool(_plugged_in.get(self.model, set()) - {self._mark})

    def unplug(self, but: Container[Names] = ()) -> None:
        """Give the model its own weights back, bit for bit, where it is now; a second time does nothing.

        Args:
            but: the bindings whose parameters may stay as they are, since they will be written over again.

        Raises:
            FusionError, CheckpointError: weights that were written over are not in the base's files any more. Put these
                back and call it once more, or load the model anew.
        """
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        for names in [names for names in reversed(self._lent) if names not in but]:
            self._lent[names].give_back()
            del self._lent[names]
        if not self._lent:
            _plugged_in.get(self.model, set()).discard(self._mark)

    def _begin(self) -> None:
        if self.model in running_beside:
            raise FusionError("plug: packs run beside the weights of this model now; leave that block first.")
        _plugged_in.setdefault(self.model, set()).add(self._mark)

    def _tell_rows(self, parameter: Tensor, before: int) -> None:
        """Let modules and config know how many rows a parameter has now."""
        modules = list(self.model.modules())
        owners = [one for one in modules if any(own is parameter for own in one._parameters.values())]
        holders: list[tuple[Any, str]] = [(one, key) for one in owners for key in _ROWS]
        config = getattr(self.model, "config", None)
        texts = [config, config.get_text_config()] if isinstance(config, PreTrainedConfig) else []
        holders += [(one, "vocab_size") for one in (*texts, *modules) if getattr(one, "vocab_size", None) == before]
        for holder, key in holders:
            if isinstance(count := getattr(holder, key, None), int) and count != len(parameter):
                self._undo.append(partial(setattr, holder, key, count))
                setattr(holder, key, len(parameter))
        self._undo.append(partial(_widened.pop, self.model, None))
        _widened.setdefault(self.model, {})[id(parameter)] = before

    def __enter__(self) -> nn.Module:
        """Return the model with its packs."""
        return self.model

    def __exit__(self, *_: object) -> None:
        """Unplug."""
        self.unplug()


def rows_without_packs(model: nn.Module, parameter: Tensor) -> int:
    """Return how many rows a parameter has when no pack is plugged in."""
    return _widened.get(model, {}).get(id(parameter), len(parameter))


def is_widened(model: nn.Module) -> bool:
    """Return whether packs that are plugged in have added rows."""
    return model in _widened


def is_plugged(model: nn.Module) -> bool:
    """Return whether packs are in the place of some of the model's weights."""
    return bool(_plugged_in.get(model))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter, and the parameter's own name there.

    Modules stay what they are where a model is wrapped meanwhile; a parameter that moves is another object.
    """
    module, _, key = name.rpartition(".")
    return model.get_submodule(module), key


def _put_back(module: nn.Module, key: str, value: Tensor) -> None:
    here = cast(Tensor, getattr(module, key))
    here.data = value.to(here)


@dataclass(frozen=True)
class _Lent:
    """Parameters that are written over.

    Attributes:
        binding: which they are.
        places: by name, the module that holds one, its name there, and its dtype.
        base: gives the base's values.
    """

    binding: Binding
    places: Mapping[str, tuple[nn.Module, str, torch.dtype]]
    base: Callable[[], Mapping[str, Tensor]]

    def give_back(self) -> None:
        """Write the base's values over what is there."""
        for name, stored in self.binding.to_live(self.base()).items():
            module, key, dtype = self.places[name]
            value = stored.to(dtype)  # first as the model had it; it may be in another dtype by now
            here = cast(Tensor, getattr(module, key))
            if here.shape == value.shape:
                here.data.copy_(value)
            else:
                here.data = value.to(here)
