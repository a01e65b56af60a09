"""Packs on a live transformers model: plug, unplug, and the arithmetic of several packs at once.

theta = theta_base + sum_i w_i * delta_i (arXiv 2505.18502). Plugging replaces the touched weights
and keeps the base's, so unplugging gives the old model back bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftllm.checkpoint import DTYPES, TensorSpec
from graftllm.delta import align
from graftllm.errors import FusionError
from graftllm.skillpack import SkillPack

Weighted = tuple[SkillPack, float]


@dataclass(frozen=True)
class Graft:
    """Packs that are plugged into a live model, until `unplug` or the end of a `with` block."""

    model: nn.Module
    base_values: dict[str, Tensor]

    def unplug(self) -> None:
        """Give the model its own weights back, bit for bit; a second time does nothing."""
        parameters = _parameters(self.model)
        for name, value in self.base_values.items():
            parameters[name].data = value
        self.base_values.clear()

    def __enter__(self) -> nn.Module:
        """Return the model with its packs."""
        return self.model

    def __exit__(self, *_: object) -> None:
        """Unplug."""
        self.unplug()


def plug(model: nn.Module, *packs: SkillPack | Weighted, check: bool = True) -> Graft:
    """Replace the weights that the packs touch, until the returned graft is unplugged.

    Not thread-safe: whoever uses the model meanwhile sees weights change one by one.

    Args:
        model: a transformers model of the base, in the base's dtype or a wider one, on any device.
        packs: packs of the same base; alone with weight 1, or `(pack, weight)`. Their order does not matter.
        check: compare every touched base weight with the pack's digest first.

    Raises:
        FusionError: the model has no such parameter, or holds the base in a narrower dtype.
        PackError: a pack is damaged or was made for another base; the model is then unchanged.
    """
    weighted = [pack if isinstance(pack, tuple) else (pack, 1.0) for pack in packs]
    graft = Graft(model, {})
    parameters = _parameters(model)
    try:
        for name in _touched(weighted):
            if name not in parameters:
                raise FusionError(
                    f"{weighted[0][0].source}: touches {name!r}, which the live model does not have under that name. "
                    "Write a checkpoint with `graftllm apply` and load that instead."
                )
            parameter = parameters[name]
            if agreed_spec(name, weighted).shape != tuple(parameter.shape):
                raise FusionError(
                    f"{weighted[0][0].source}: adds vocabulary rows to {name!r}, which a live model of "
                    f"{parameter.shape[0]:,} rows has no room for. "
                    "Write a checkpoint with `graftllm apply` and load that instead."
                )
            base = _in_base_dtype(parameter.data, name, weighted[0][0])
            if check:
                for pack, _ in weighted:
                    pack.check_tensor(name, base)
            value = combined(name, base, weighted, dtype=parameter.dtype).to(parameter.device)
            graft.base_values[name] = parameter.data
            parameter.data = value
    except BaseException:
        graft.unplug()
        raise
    return graft


def combined(name: str, base: Tensor, packs: Sequence[Weighted], *, dtype: torch.dtype) -> Tensor:
    """Return base + sum of weighted deltas of one parameter in `dtype`; `base` is on CPU in the base's dtype.

    One pack of weight 1 gives its own restored value, so an exact pack gives the tuned bits.

    Raises:
        FusionError: the packs do not agree on the tuned shape and dtype.
    """
    pack, weight = packs[0]
    alone = len(packs) == 1 and weight == 1
    spec = agreed_spec(name, packs)
    if alone and (dtype == DTYPES[spec.dtype] or pack.header.tensors[name].how.operator == "exact"):
        return pack.restore(name, base).to(dtype)
    total = torch.zeros(spec.shape)
    for pack, weight in sorted(packs, key=lambda pair: (pair[0].source, pair[1])):  # one order of summing
        total += weight * pack.delta(name, base)
    return (align(base, spec).float() + total).to(dtype)


def agreed_spec(name: str, packs: Sequence[Weighted]) -> TensorSpec:
    """Return the shape and dtype that the packs' tuned models have for one parameter.

    Raises:
        FusionError: they differ.
    """
    specs = [pack.header.tensors[name].tuned_spec for pack, _ in packs]
    if odd := next((i for i, spec in enumerate(specs) if spec != specs[0]), None):
        raise FusionError(
            f"{packs[odd][0].source}: makes {name!r} {specs[odd].dtype} of shape {list(specs[odd].shape)}, but "
            f"{packs[0][0].source} makes it {specs[0].dtype} of shape {list(specs[0].shape)}. "
            "Only packs of tuned models with the same vocabulary and dtype add up; use them one by one."
        )
    return specs[0]


def _touched(packs: Sequence[Weighted]) -> list[str]:
    return list(
        dict.fromkeys(
            name
            for pack, _ in packs
            for name, entry in pack.header.tensors.items()
            if entry.how.operator != "unchanged"
        )
    )


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by every name they have, so that a tied head is found under its own."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _in_base_dtype(value: Tensor, name: str, pack: SkillPack) -> Tensor:
    """Return a live value as the base checkpoint stores it, on CPU: exactly, or not at all."""
    dtype = DTYPES[pack.header.tensors[name].dtype]
    live = value.detach().cpu()
    stored = live.to(dtype)
    if torch.finfo(live.dtype).bits < torch.finfo(dtype).bits if dtype.is_floating_point else live.dtype != dtype:
        raise FusionError(
            f"{pack.source}: the live model holds {name!r} in {live.dtype}, narrower than its base's {dtype}. "
            f"Load the base with dtype={dtype}."
        )
    return stored
