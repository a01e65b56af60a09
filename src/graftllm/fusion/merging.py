"""Several tuned models -> one set of weights, or one each: checkpoints or packs, one parameter in memory at a time.

theta = theta_base + merged delta, by a row of `methods.table`; vocabulary rows that the base lacks have no delta and
are averaged, whatever the method. The plain sum of packs is in `applying`.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from graftllm.checkpoint import Checkpoint, check_vacant, write_checkpoint
from graftllm.compression.calibration import collect_moments
from graftllm.compression.prices import Calibration
from graftllm.delta import Delta
from graftllm.errors import FusionError
from graftllm.fusion.applying import apply_packs, in_range
from graftllm.fusion.inputs import Stacks, Tuned, stacked
from graftllm.fusion.methods.table import Method
from graftllm.fusion.methods.tasks import Knobs, Merge, Tasks
from graftllm.fusion.names import check_names
from graftllm.fusion.search import answer_loss, search_weights
from graftllm.header import Card
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress_to
from graftllm.packfile import check_place
from graftllm.packing_options import PackOptions
from graftllm.progress import progress
from graftllm.records import Prompt
from graftllm.storage import check_apart, only_writer


@dataclass(frozen=True)
class Merged:
    """What a merge wrote.

    Attributes:
        outputs: checkpoint directories or pack files; by the task's name where there is one for each, else by "".
        weights: of the tasks, by name; those found where they were searched.
        stored_bytes: what the method's own form takes, with the base where it is needed; the outputs may take more.
        agree: whether each output has its models' tokenizer, chat template and generation config; else the base's.
    """

    outputs: Mapping[str, Path]
    weights: Mapping[str, float]
    stored_bytes: int
    agree: bool


def merge(
    base: Checkpoint,
    tuned: Sequence[Tuned],
    method: Method,
    out: str | Path,
    *,
    knobs: Knobs | None = None,
    rows: Mapping[str, Sequence[Prompt]] | None = None,
    pack: PackOptions | None = None,
    device: str = "auto",
) -> Merged:
    """Merge tuned models of one base by a row of the table; their order does not matter.

    A model of weight 0 is as if it were not given, but for methods that give it a model of its own.

    Args:
        base: what they were tuned from.
        tuned: packs and checkpoints under different names.
        method: a row of `METHODS`.
        out: a checkpoint directory; a name that ends in .safetensors is a pack of the merged delta instead. A method
            that gives one model a task writes OUT/NAME, or STEM-NAME.safetensors beside OUT. Each appears whole.
        knobs: the method's defaults if None.
        rows: answered prompts by task, where the method needs them; a search looks at further tasks' too.
        pack: how an output that is a pack is compressed; its defaults if None.
        device: for layer inputs and searches; `auto` takes a GPU when there is one.

    Raises:
        FusionError: names are doubled, or cannot name an output; the models differ in vocabulary or dtype; rows are
            missing; a checkpoint is to be compressed; or weights lead beyond what the dtype holds.
        PackError: a pack is damaged or was made for another base.
        CheckpointError: a delta holds NaN, infinity or values above 2 ** 48.
        StorageError: there is no room, or the place cannot be written, or what would be replaced is read.
    """
    out, knobs = Path(out).absolute(), knobs or method.knobs({})
    stacks = stacked(base, tuned, idle=method.per_task or not method.weighted)
    names = tuple(one.name for one in stacks.tuned)
    if pack is not None and out.suffix != ".safetensors":
        raise FusionError(
            f"--budget: is of a SkillPack, and {out.name} would be a checkpoint; end --out in .safetensors, or leave "
            "the budget out."
        )
    places = _places(out, names if method.per_task else ("",))
    for place in places.values():
        check_apart(place, [base.path, *(file for one in tuned for file in one.files)])
        if place.suffix == ".safetensors":
            check_place(place)
        else:
            check_vacant(base, place)
    if method.rows is not None and (missing := next((name for name in names if not (rows or {}).get(name)), None)):
        raise FusionError(
            f"merge: {method.name} needs answered prompts of every model; give rows of {missing!r} (--rows)."
        )
    weights = torch.tensor([one.weight for one in stacks.tuned])
    calibrations: tuple[Calibration, ...] = ()
    with _beside(out) as scratch:
        if method.rows == "calibration":
            calibrations = tuple(_seen(stacks, one, (rows or {})[one.name], scratch, device) for one in stacks.tuned)
        if method.rows == "search":
            few = [row for _, some in sorted((rows or {}).items()) for row in some]
            weights = _searched(stacks, method, knobs, few, scratch, device)
        merging = method.prepare(Tasks(names, weights, stacks, calibrations), knobs) if names else None
        for task, place in enumerate(places.values()):
            settings = replace(stacks, tuned=stacks.tuned[task : task + 1]) if method.per_task else stacks
            model = partial(_write_checkpoint, stacks, merging, task, _shares(method, weights, task), settings)
            _write(base, model, place, pack or PackOptions(), scratch, device)
    known = stacks.known_specs
    added_bytes = sum(spec.nbytes - known[name].nbytes for name, spec in stacks.specs.items())
    stored = method.stored_bytes(known.values(), len(names), knobs.rank, added_bytes)
    given = dict.fromkeys(sorted(one.name for one in tuned), 0.0)
    agree = method.per_task or stacks.companions is not None
    return Merged(places, given | dict(zip(names, weights.tolist(), strict=True)), stored, agree)


def _write(
    base: Checkpoint, model: Callable[[Path], None], place: Path, pack: PackOptions, scratch: Path, device: str
) -> None:
    """Write a merged model by what writes its checkpoint: a checkpoint, or a pack of what it adds to the base."""
    if place.suffix != ".safetensors":
        model(place)
        return
    model(scratch / "merged")
    delta = Delta(base, Checkpoint.open(scratch / "merged"))
    compress_to(place, delta, pack, card=Card(name=place.stem), device=device)


def _shares(method: Method, weights: Tensor, task: int) -> Tensor:
    """Return how much each task counts in added rows: the task alone, or all by the size of their weights."""
    if method.per_task:
        return torch.eye(len(weights))[task]
    sizes = weights.abs()
    return sizes / sizes.sum() if sizes.any() else torch.ones_like(sizes) / len(sizes)


def _write_checkpoint(
    stacks: Stacks, merging: Merge | None, task: int, shares: Tensor, settings: Stacks, out: Path
) -> None:
    """Write the model of one task; the base where nothing is merged.

    Args:
        stacks: what is merged.
        merging: by which method.
        task: the one whose model it is, where each has its own.
        shares: how much each task counts in added rows.
        settings: the models whose config and companions it has, where they agree.
        out: checkpoint directory.
    """
    floating = set(stacks)
    with progress("merging") as show:
        done = 0

        def tensor(name: str) -> Tensor:
            nonlocal done
            show(done := done + 1, len(stacks.specs))
            if merging is None or name not in floating:
                return stacks.agreed(name)
            stack = stacks[name]
            merged = stacks.merged(name, merging(name, stack, task), stack, shares)
            return in_range(name, merged, lambda: stacks.base.tensor(name))

        told = {"config": settings.config, "companions": settings.companions}
        write_checkpoint(stacks.base, out, tensor, specs=stacks.specs, **told)


def _seen(stacks: Stacks, one: Tuned, rows: Sequence[Prompt], scratch: Path, device: str) -> Calibration:
    """Return the second moments of one tuned model's layer inputs on its own rows."""
    if isinstance(one.origin, Delta):
        return collect_moments(one.origin.tuned.path, rows, device=device, spool=scratch)
    apply_packs(stacks.base, [one.origin], scratch / "tuned")
    return collect_moments(scratch / "tuned", rows, device=device, spool=scratch)


def _searched(
    stacks: Stacks, method: Method, knobs: Knobs, rows: Sequence[Prompt], scratch: Path, device: str
) -> Tensor:
    """Return the weights with which the merged model answers some rows best."""
    names, trial = tuple(one.name for one in stacks.tuned), scratch / "trial"
    tokenizer = cache(lambda: load_tokenizer(trial if stacks.companions else stacks.base.path))

    def loss(weights: Tensor) -> float:
        merging = method.prepare(Tasks(names, weights, stacks), knobs)
        _write_checkpoint(stacks, merging, 0, _shares(method, weights, 0), stacks, trial)
        return answer_loss(load_model(trial, device=device), tokenizer(), rows)

    return search_weights(loss, len(names), seed=knobs.seed)


def _places(out: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return where the model of each task goes; the one name is empty where one model serves all.

    Raises:
        FusionError: a name cannot be that of a file.
    """
    if list(names) == [""]:
        return {"": out}
    check_names(names)
    if out.suffix == ".safetensors":
        return {name: out.with_name(f"{out.stem}-{name}.safetensors") for name in names}
    return {name: out / name for name in names}


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Yield a directory beside `out` for what is only needed on the way; nobody else merges into `out` meanwhile."""
    scratch = out.with_name(f".{out.name}.merging")
    with only_writer(scratch):
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
