"""Tuned models of one base, each a SkillPack or a checkpoint, as the stacks of deltas that are merged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftllm.checkpoint import Checkpoint
from graftllm.companions import Companions, agreed_companions
from graftllm.delta import Delta
from graftllm.downloads import repository
from graftllm.errors import FusionError
from graftllm.fusion.applying import agreed_config
from graftllm.skillpack import SkillPack
from graftllm.tensors import DTYPES, TensorSpec


@dataclass(frozen=True)
class Tuned:
    """A tuned model to merge: its name among the others, where its delta is, and its weight."""

    name: str
    origin: SkillPack | Delta
    weight: float = 1.0

    @property
    def source(self) -> str:
        """What errors call it."""
        return self.origin.source if isinstance(self.origin, SkillPack) else str(self.origin.tuned.path)

    @property
    def files(self) -> list[Path]:
        """What it is read from; nothing, if it is a pack in memory."""
        return [place for place in [Path(self.source)] if place.exists()]

    @property
    def config(self) -> Mapping[str, Any]:
        """What its `config.json` says otherwise than the base's, by dotted key."""
        return self.origin.header.config if isinstance(self.origin, SkillPack) else self.origin.config_changes()

    def companions(self) -> Companions:
        """Return what stands beside its weights and is not the base's.

        Raises:
            PackError: the pack is damaged.
        """
        return self.origin.companions()

    def spec(self, name: str) -> TensorSpec:
        """Return the shape and dtype that it has of a parameter."""
        if isinstance(self.origin, SkillPack):
            return self.origin.header.tensors[name].tuned_spec
        return self.origin.tuned.specs[name]

    def delta(self, name: str, base: Tensor) -> Tensor:
        """Return its delta of a parameter in float32.

        Raises:
            PackError: the pack is damaged, or was made for another base.
            CheckpointError: the delta holds NaN, infinity or values above 2 ** 48.
        """
        if isinstance(self.origin, SkillPack):
            self.origin.check_tensor(name, base)
            return self.origin.delta(name, base)
        return self.origin[name]

    def value(self, name: str, base: Tensor) -> Tensor:
        """Return its own value of a parameter."""
        if isinstance(self.origin, SkillPack):
            return self.origin.restore(name, base)
        return self.origin.tuned.tensor(name)


@dataclass(frozen=True)
class Stacks(Mapping[str, Tensor]):
    """A lazy mapping from the name of each floating-point parameter to its deltas, shape (n, *shape), float32.

    The shape is the base's: vocabulary rows that the base lacks have no delta. Parameters that hold nothing are left
    out.
    """

    base: Checkpoint
    tuned: Sequence[Tuned]
    specs: Mapping[str, TensorSpec]

    def __getitem__(self, name: str) -> Tensor:
        """Decode the deltas of one parameter."""
        base = self.base.tensor(name)
        return torch.stack([_known(one.delta(name, base), base) for one in self.tuned])

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        specs = self.specs.items()
        return (name for name, spec in specs if DTYPES[spec.dtype].is_floating_point and 0 not in spec.shape)

    def __len__(self) -> int:
        """Return how many there are."""
        return sum(1 for _ in self)

    @property
    def known_specs(self) -> dict[str, TensorSpec]:
        """The specs without the rows that the base lacks."""
        return {name: TensorSpec(spec.dtype, self.base.specs[name].shape) for name, spec in self.specs.items()}

    @property
    def config(self) -> dict[str, Any]:
        """What all tuned models' `config.json` say alike and otherwise than the base's, by dotted key."""
        return agreed_config([one.config for one in self.tuned])

    @cached_property
    def companions(self) -> Companions | None:
        """What stands beside all tuned models' weights alike and is not the base's; None where they differ in it."""
        return agreed_companions([one.companions() for one in self.tuned])

    def merged(self, name: str, delta: Tensor, stack: Tensor, shares: Tensor) -> Tensor:
        """Return base + merged delta in the tuned dtype, and under it the rows that the base lacks.

        Args:
            name: of the parameter.
            delta: the merged one, of the base's shape; where it is a task's, the task's own bits are returned.
            stack: what was merged.
            shares: how much each task counts in added rows, shape (n,); where one alone does, they are its own bits.
        """
        base, spec = self.base.tensor(name), self.specs[name]
        dtype = DTYPES[spec.dtype]
        alike = next((one for one, own in zip(self.tuned, stack, strict=True) if torch.equal(delta, own)), None)
        value = (base.to(dtype).float() + delta).to(dtype) if alike is None else _known(alike.value(name, base), base)
        return value if base.shape == spec.shape else torch.cat([value, self._added(name, base, shares)])

    def agreed(self, name: str) -> Tensor:
        """Return the tuned models' value of a parameter that has no delta here; the base's if they differ."""
        base = self.base.tensor(name)
        values = [one.value(name, base) for one in self.tuned]
        return values[0] if values and all(torch.equal(values[0], value) for value in values) else base

    def _added(self, name: str, base: Tensor, shares: Tensor) -> Tensor:
        """Return the mean of the rows that the base lacks."""
        counted = [(one, share) for one, share in zip(self.tuned, shares.tolist(), strict=True) if share != 0]
        rows = ((one.value(name, base)[len(base) :], share) for one, share in counted)
        if len(counted) == 1:
            return next(rows)[0]
        return torch.stack([share * value.float() for value, share in rows]).sum(0).to(DTYPES[self.specs[name].dtype])


def _known(value: Tensor, base: Tensor) -> Tensor:
    """Return a value without the rows that the base lacks."""
    return value if value.shape == base.shape else value[: len(base)]


def open_tuned(base: Checkpoint, place: str | Path, *, name: str, weight: float = 1.0, is_pack: bool = False) -> Tuned:
    """Open a SkillPack file, or a checkpoint directory, as a tuned model of `base`.

    A Hub id is a checkpoint's, or a pack's where `is_pack` says so.

    Raises:
        PackError: the pack is damaged or was made for another model.
        CheckpointError: the checkpoint is damaged or of another architecture.
        HubError: the repository cannot be had, or holds no pack.
    """
    is_shared = is_pack and repository(str(place)) is not None
    if is_shared or Path(place).is_file() or str(place).endswith(".safetensors"):
        pack = SkillPack.load(place)
        pack.check_base(base)
        return Tuned(name, pack, weight)
    return Tuned(name, Delta(base, Checkpoint.open(place)), weight)


def stacked(base: Checkpoint, tuned: Sequence[Tuned], *, idle: bool = True) -> Stacks:
    """Return the deltas of tuned models, whose order does not matter.

    Args:
        base: what they were tuned from.
        tuned: the models.
        idle: whether those of weight 0 are among them; where all are, no model is left.

    Raises:
        FusionError: there are none, two have one name, or they differ in vocabulary or dtype.
    """
    if not tuned:
        raise FusionError("merge: expected at least one pack or tuned model, found none.")
    names = [one.name for one in tuned]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise FusionError(f"merge: two models are called {doubled!r}; a skill counts once, so give each its own name.")
    ordered = sorted((one for one in tuned if idle or one.weight), key=lambda one: one.name)  # one order of summing
    specs = {name: ordered[0].spec(name) if ordered else spec for name, spec in base.specs.items()}
    for one in ordered[1:]:
        for name, spec in specs.items():
            if (found := one.spec(name)) != spec:
                raise FusionError(
                    f"{one.source}: makes {name!r} {found.dtype} of shape {list(found.shape)}, but {ordered[0].source} "
                    f"makes it {spec.dtype} of shape {list(spec.shape)}. "
                    "Only tuned models with the same vocabulary and dtype merge."
                )
    return Stacks(base, ordered, specs)
