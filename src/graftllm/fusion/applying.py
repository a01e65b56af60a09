"""Base + packs, one parameter in memory at a time: the sum of several packs, and the checkpoint that it is.

theta = theta_base + sum_i w_i * delta_i (arXiv 2505.18502). No model is run, and nothing here waits for transformers.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from graftllm.checkpoint import Checkpoint, check_opened, check_vacant, write_checkpoint
from graftllm.companions import agreed_companions
from graftllm.compression.matrix import CACHED
from graftllm.delta import align
from graftllm.errors import FusionError
from graftllm.progress import progress
from graftllm.skillpack import SkillPack
from graftllm.storage import check_apart
from graftllm.tensors import DTYPE_NAMES, DTYPES, TensorSpec, is_finite

Weighted = tuple[SkillPack, float]


class Empty(Protocol):
    """Makes a tensor whose values are not set yet, as `torch.empty` does."""

    def __call__(self, shape: torch.Size, /, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return one of this shape and dtype."""
        ...


_BLOCK = 1 << 26


def apply_packs(base: Checkpoint, packs: SkillPack | Iterable[SkillPack | Weighted], out: str | Path) -> bool:
    """Write base + weighted packs as a checkpoint, with the base's config, tokenizer and shards.

    Where the tuned models had more vocabulary rows or another dtype, the checkpoint has them too, and the token ids,
    tokenizer, chat template and generation config on which they agree.
    One exact pack of weight 1 gives the tuned checkpoint's weights bit for bit.

    Args:
        base: what the packs were made for.
        packs: one or several; each with weight 1, or `(pack, weight)`. Their order does not matter, and one of weight
            0 beside others is as if it were not given.
        out: checkpoint directory; appears whole or not at all.

    Returns:
        Whether the packs agree on tokenizer, chat template and generation config; where not, the base's are written.

    Raises:
        FusionError: the packs' tuned models differ in vocabulary or dtype, or a weight is no finite number, or one
            that leads beyond what the dtype holds.
        PackError: a pack is damaged or was made for another base; nothing is then written.
        StorageError: there is no room, or the place cannot be written, or what would be replaced is read, or was not
            written here.
    """
    check_opened(base=base)
    packs = with_weights(packs)
    check_apart(Path(out), [base.path, *(place for pack, _ in packs if (place := Path(pack.source)).exists())])
    check_vacant(base, Path(out))
    for pack, _ in packs:
        pack.check_base(base)
    packs = [one for one in packs if one[1]] or packs
    specs = {name: agreed_spec(name, packs) for name in base.specs}
    config = agreed_config([pack.header.config for pack, _ in packs])
    companions = agreed_companions([pack.companions() for pack, _ in packs])
    with progress("applying") as show:
        done = 0

        def tensor(name: str) -> Tensor:
            nonlocal done
            value = base.tensor(name)
            for pack, _ in packs:
                pack.check_tensor(name, value)
            show(done := done + 1, len(base.specs))
            return in_range(name, combined(name, value, packs, dtype=DTYPES[specs[name].dtype]), lambda: value)

        write_checkpoint(base, Path(out), tensor, specs=specs, config=config, companions=companions)
    return companions is not None


def in_range(name: str, value: Tensor, base: Callable[[], Tensor]) -> Tensor:
    """Return a sum of weights.

    Args:
        name: of the parameter.
        value: the sum.
        base: gives the base's value, which may be infinite itself.

    Raises:
        FusionError: it is beyond what its dtype holds.
    """
    if not is_finite(value) and is_finite(base()):
        raise FusionError(
            f"{name}: expected weights whose sum stays within {DTYPE_NAMES[value.dtype]}, found values beyond it; take "
            "smaller ones."
        )
    return value


def with_weights(packs: SkillPack | Iterable[SkillPack | Weighted]) -> list[Weighted]:
    """Return packs with their weights; one that is given without has the weight 1.

    Raises:
        FusionError: what is given is no pack, or a weight is no finite number.
    """
    several = [packs] if isinstance(packs, SkillPack) else packs  # a pack by itself lists its parameters
    found = [pack if isinstance(pack, tuple) else (pack, 1.0) for pack in several]
    for one in found:
        if len(one) != 2 or not isinstance(one[0], SkillPack) or not isinstance(one[1], Real):
            raise FusionError(f"packs: expected packs, or (pack, weight) with a number as weight, found {one!r}.")
        if not math.isfinite(one[1]):
            raise FusionError(f"{one[0].source}: expected a finite weight, found {one[1]:g}.")
    return found


def combined(
    name: str, base: Tensor, packs: Sequence[Weighted], *, dtype: torch.dtype, empty: Empty = torch.empty
) -> Tensor:
    """Return base + sum of weighted deltas of one parameter in `dtype`; `base` is in the base's dtype.

    One pack of weight 1 gives its own restored value, so an exact pack gives the tuned bits. What no pack changes keeps
    its own, and whole numbers become the tuned ones where all packs have the same, whatever their weights.

    Raises:
        FusionError: the packs do not agree on the tuned shape and dtype.
    """
    spec = agreed_spec(name, packs)
    if all(pack.header.tensors[name].operator == "unchanged" for pack, _ in packs):
        return align(base, spec).to(dtype)
    # In one order of summing, however the packs are given.
    packs = sorted(packs, key=lambda one: (one[0].header.tensors[name].payload_digest, one[1]))
    if (products := _products(name, packs)) is not None:
        return _with_products(base, products, empty(base.shape, dtype=dtype, device=base.device))
    base = base.cpu()
    pack, weight = packs[0]
    exact = pack.header.tensors[name].operator == "exact"
    if len(packs) == 1 and weight == 1 and (exact or dtype == DTYPES[spec.dtype]):
        return pack.restore(name, base).to(dtype)
    if not base.is_floating_point():
        values = [pack.restore(name, base) for pack, _ in packs]
        return (values[0] if all(value.equal(values[0]) for value in values) else align(base, spec)).to(dtype)
    total = torch.zeros(spec.shape, dtype=torch.float64 if spec.dtype == "F64" else torch.float32)
    for pack, weight in packs:
        total += weight * pack.delta(name, base)
    return (align(base, spec).to(total.dtype) + total).to(dtype)


def _products(name: str, packs: Sequence[Weighted]) -> tuple[Tensor, Tensor] | None:
    """Return factors, (rows, ranks) and (ranks, columns), of the sum of deltas; None where one is no product."""
    found: list[tuple[Tensor, Tensor]] = []
    for pack, weight in packs:
        entry, factors = pack.header.tensors[name], pack.factors(name)
        if entry.tuned_spec != entry.spec or (factors is None and entry.operator != "unchanged"):
            return None
        if factors is not None:
            found.append((factors[0] * weight, factors[1]))
    if not found:
        return None
    return torch.cat([left for left, _ in found], dim=1), torch.cat([right for _, right in found])


def _with_products(base: Tensor, products: tuple[Tensor, Tensor], made: Tensor) -> Tensor:
    """Return `made` with base + left right, in one pass over the base; it is where the base is."""
    left, right = (factor.to(base.device) for factor in products)
    step = CACHED * torch.get_num_threads() if base.device.type == "cpu" else _BLOCK
    height = max(1, step // base.shape[1])
    room = torch.empty(min(height, len(base)), base.shape[1], device=base.device)  # float32
    for start in range(0, len(base), height):
        block = base[start : start + height]
        made[start : start + height] = room[: len(block)].copy_(block).addmm_(left[start : start + height], right)
    return made


def agreed_config(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the `config.json` of all tuned models says alike and otherwise than the base's, by dotted key.

    One that tells of added rows is enough: all models have them.
    """
    return {
        key: value
        for config in told
        for key, value in config.items()
        if key.endswith("vocab_size") or all(key in other and other[key] == value for other in told)
    }


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
