"""How the tensors of a checkpoint become the parameters of a live transformers model, and back.

Most go by the same name on both sides. transformers renames some, and stacks, splits or transposes
others (the experts of a layer become one 3-D parameter), by rules that it keeps for every
architecture and uses to load and save. Those rules are asked here; no architecture is named.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from graftllm.errors import CheckpointError
from graftllm.tensors import DTYPES, TensorSpec


def looks_up_its_input(module: nn.Module) -> bool:
    """Return whether a module is an embedding that looks up its input; OPT's positions look up something else."""
    return isinstance(module, nn.Embedding) and len(signature(type(module).forward).parameters) == 2


Names = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Binding:
    """Tensors of a checkpoint and the live parameters that are made of them: one to one, or a group.

    Attributes:
        stored: names in the checkpoint.
        live: names in the model's state dict.
    """

    stored: tuple[str, ...]
    live: tuple[str, ...]
    _model: nn.Module
    _converter: WeightConverter | None = None
    _members: tuple[tuple[str, str], ...] = ()  # stored names, each with the converter's pattern that it matched

    @property
    def names(self) -> Names:
        """The names on both sides, which tell it from others."""
        return self.stored, self.live

    @property
    def plain(self) -> bool:
        """Whether it is one tensor with the same values on both sides."""
        return self._converter is None

    def to_live(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the live parameters that the stored values make."""
        if self._converter is None:
            return {self.live[0]: values[self.stored[0]]}
        return _converted(self._model, self.live[0], self._converter, self._members, values)

    def to_stored(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the stored tensors that the live values were made of.

        Raises:
            CheckpointError: transformers does not turn them into tensors of these names.
        """
        if self._converter is None:
            return {self.stored[0]: values[self.live[0]]}
        try:
            found = revert_weight_conversion(cast(PreTrainedModel, self._model), dict(values))
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{type(self._model).__name__}: transformers cannot turn the live {self.live[0]!r} back into the "
                f"tensors of the checkpoint ({error}). Load the model without quantization and on whole devices."
            ) from error
        if set(found) != set(self.stored):
            odd = min(set(found) ^ set(self.stored))
            raise CheckpointError(
                f"{type(self._model).__name__}: transformers cannot turn the live {self.live[0]!r} into the tensors "
                f"of the checkpoint; they differ on {odd!r}. Load the model from that checkpoint by from_pretrained()."
            )
        return found


def bindings(model: nn.Module, specs: Mapping[str, TensorSpec]) -> list[Binding]:
    """Return how the tensors of a checkpoint become the model's parameters and persistent buffers.

    Args:
        model: on any device, `meta` included.
        specs: names, shapes and dtypes of the checkpoint's tensors; what the model has no place for is left out.

    Raises:
        CheckpointError: transformers' own rules do not fit these shapes.
    """
    state = model.state_dict(keep_vars=True)
    pretrained = isinstance(model, PreTrainedModel)
    rules = deepcopy(_rules(model)) if pretrained else []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: list[Binding] = []
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(specs, key=dot_natural_key):
        place, pattern = name, None
        if pretrained:
            prefix = cast(PreTrainedModel, model).base_model_prefix
            place, pattern = rename_source_key(name, renamings, converters, prefix, cast(Any, state))
            if place not in state:
                place, pattern = rename_source_key(name, [], [], prefix, cast(Any, state))
        if place in state and pattern is None:
            found.append(Binding((name,), (place,), model))
        elif place in state and pattern is not None:
            groups.setdefault(place, []).append((name, pattern))
    for place, members in groups.items():
        converter = by_pattern[members[0][1]]
        try:
            empty = {name: _empty(specs[name]) for name, _ in members}
            live = tuple(_converted(model, place, converter, members, empty))
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            raise CheckpointError(
                f"{type(model).__name__}: transformers cannot make {place!r} of {members[0][0]!r} and its like "
                f"({error}). The checkpoint is of another architecture or incomplete."
            ) from error
        found.append(Binding(tuple(name for name, _ in members), live, model, converter, tuple(members)))
    return found


def named_values(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by every name they have, so that a tied head is found under its own."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _rules(model: nn.Module) -> list[Any]:
    """Return the rules that the model was loaded by, or those that it would be."""
    used = getattr(model, "_weight_conversions", None)
    return get_model_conversion_mapping(cast(PreTrainedModel, model)) if used is None else used


def _converted(
    model: nn.Module, place: str, converter: WeightConverter, members: Any, values: Any
) -> dict[str, Tensor]:
    running = deepcopy(converter)  # it collects what it is given
    for name, pattern in members:
        running.add_tensor(place, name, pattern, values[name])
    made = running.convert(place, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _empty(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta")
