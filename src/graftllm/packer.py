"""Deltas into SkillPacks: measured, packed to a budget, resumed after a kill.

What runs a model is imported where it is needed: transformers takes seconds, and without calibration nothing needs it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np

from graftllm.companions import Companion, compressed
from graftllm.compression.crew import Crew, Engine, default_workers, open_crew
from graftllm.compression.encoded import payload_digest
from graftllm.compression.filling import Budget
from graftllm.compression.jobs import Compressed, Job
from graftllm.compression.measures import Measures, save_measures
from graftllm.compression.prices import SEQUENCES, Calibration
from graftllm.compression.roles import role_of
from graftllm.compression.strategy import encode_job, refine_job
from graftllm.compression.workspace import Workspace, open_workspace, packing_key
from graftllm.delta import Delta
from graftllm.devices import resolve_device
from graftllm.errors import BudgetError, CheckpointError, CompressionError, RecordError, StorageError, WorkerError
from graftllm.header import BaseInfo, Card, Header, StoredCompanion, TensorEntry
from graftllm.packfile import Run, check_place, file_bytes, opening
from graftllm.packing_options import PackOptions, budget_bytes
from graftllm.progress import say
from graftllm.records import Prompt, check_rows
from graftllm.skillpack import SkillPack
from graftllm.storage import check_apart
from graftllm.tensors import fingerprint

_SPARE = 2  # bytes of a parameter's entry that may be longer in the compressed header when its codes are trained
_TRIES = 8  # packs that are built to meet a target divergence
_CLOSE = 0.8  # of the target: near enough
_AIM = 0.9  # of the target
_FEW = 4  # tokens of calibration for each input of a layer; by half a token, packs are as good as by none
_FINE = 1.005  # sizes that differ by less are the same


def compress(
    delta: Delta,
    options: PackOptions = PackOptions(),
    *,
    calibration: Sequence[Prompt] = (),
    card: Card = Card(),
    measure: Callable[[SkillPack], float] | None = None,
    device: str = "auto",
    spool: Path | None = None,
    workers: int | None = None,
    engine: Engine = "local",
) -> SkillPack:
    """Compress a delta into a SkillPack, one parameter at a time.

    The same inputs give the same bytes, whoever does the work.

    Args:
        delta: tuned - base.
        options: the strategy and its knobs; a budget counts the bytes of the whole file, without the exact layer.
        calibration: rows that the tuned model reads, so that rounding errors fall where they matter least;
            the skill's own SFT rows are best. The first 512 are read, and where codes are distilled, all. Without
            them, and where nothing is lossy, there is no calibration.
        card: name, description, provenance and scores for the header.
        measure: gives the KL divergence of a pack; for a budget such as `kl=0.01`.
        device: where matrices are decomposed; `auto` takes a GPU when there is one.
        spool: directory for finished work; the pack's payloads stay there, so delete it when the pack is saved.
            Work that was stopped goes on from what it holds. By default one that goes with the pack.
        workers: threads; by default one for a small model, one a core for a large one.
        engine: `ray` does the work on a Ray cluster, that of RAY_ADDRESS or one that is started here.

    Raises:
        CompressionError: the budget cannot be met, or the calibration rows are of no use.
        CheckpointError: the delta holds NaN, infinity or values above 2 ** 48.
        RecordError: the model cannot read a calibration row.
        StorageError: the spool is in use, or holds something else.
    """
    device, rows = str(resolve_device(device)), _read(calibration, options)
    with ExitStack() as stack:
        workspace = Workspace.temporary()
        if spool is not None:
            workspace = stack.enter_context(open_workspace(spool, packing_key(delta, options, rows, device)))
        return _compressed(Job(delta, options, device, workspace), rows, card, measure, workers, engine)


def compress_to(
    out: Path,
    delta: Delta,
    options: PackOptions = PackOptions(),
    *,
    calibration: Sequence[Prompt] = (),
    card: Card = Card(),
    measure: Callable[[SkillPack], float] | None = None,
    device: str = "auto",
    workers: int | None = None,
    engine: Engine = "local",
) -> SkillPack:
    """Compress a delta into a SkillPack file; return the pack that is in it.

    Finished work is kept in `.NAME.packing` beside the file until that is there: after a kill the same call goes
    on with it, and gives the same bytes. Where the delta or the options are at fault, nothing is kept. Arguments and
    errors are those of `compress`, and StorageError where `out` is one of the checkpoints' files, or no pack.
    """
    out, device, rows = out.absolute(), str(resolve_device(device)), _read(calibration, options)
    check_apart(out, sorted({*delta.base.sources, *delta.tuned.sources}))
    check_place(out)
    with open_workspace(out.with_name(f".{out.name}.packing"), packing_key(delta, options, rows, device)) as workspace:
        try:
            made = _compressed(Job(delta, options, device, workspace), rows, card, measure, workers, engine)
            made.save(out)
        except (CheckpointError, CompressionError, RecordError) as error:
            if not isinstance(error, WorkerError):
                workspace.remove()
            raise
        except StorageError as error:
            waiting = f"What is packed already waits in {workspace.directory}; delete it to give up."
            raise StorageError(f"{error} {waiting}") from error
        found = SkillPack.load(out)
        workspace.remove()
    return found


def _read(calibration: Sequence[Prompt], options: PackOptions) -> Sequence[Prompt]:
    """Return the rows that are read with these options."""
    check_rows("calibration", calibration)
    rows = calibration if options.distill else calibration[:SEQUENCES]
    return rows if options.strategy != "exact" or options.layered else ()


def _compressed(
    job: Job,
    rows: Sequence[Prompt],
    card: Card,
    measure: Callable[[SkillPack], float] | None,
    workers: int | None,
    engine: Engine,
) -> SkillPack:
    if job.options.distill:
        from graftllm.compression.distillation import check_distillable

        check_distillable(job, rows)
    if rows and not job.measures_file.exists():
        save_measures(_measured(job, rows[:SEQUENCES]), job.measures_file)
    with open_crew(job, workers or default_workers(job.delta, job.device), engine) as crew:
        return _within_budget(job, crew, card, measure, rows)


def _measured(job: Job, calibration: Sequence[Prompt]) -> Measures:
    """Run the tuned model over calibration rows; errors are priced by what it says where it is a language model."""
    from graftllm.compression.calibration import collect_moments
    from graftllm.compression.sensitivity import fits_in_memory, measure_sensitivity
    from graftllm.streaming import is_language_model

    tuned, sensitivity, weights = job.delta.tuned, None, None
    fits = fits_in_memory(tuned, resolve_device(job.device))
    if job.options.strategy != "paper" and fits and is_language_model(tuned):
        sensitivity, weights = measure_sensitivity(tuned.path, calibration, device=job.device)
    moments = collect_moments(
        tuned.path, calibration, weights=weights, device=job.device, spool=job.workspace.directory
    )
    width = max((len(one) for one in islice(moments.moments.values(), 1)), default=0)
    if moments.tokens < _FEW * width:
        say(
            f"calibration: {moments.tokens:,} tokens are few for layers of {width:,} inputs, and tell little of what "
            "errors cost; give a few hundred rows, best the skill's own."
        )
    return Measures(moments, sensitivity)


def _within_budget(
    job: Job, crew: Crew, card: Card, measure: Callable[[SkillPack], float] | None, rows: Sequence[Prompt]
) -> SkillPack:
    """Return a pack of the size or the divergence that the options ask for."""
    delta, options = job.delta, job.options
    calibration, own = job.measures().calibration, delta.companions()
    companions: dict[Companion, bytes] = {name: compressed(one) for name, one in own.items() if one is not None}
    header = Header(
        card=card,
        base=BaseInfo(
            name=delta.base.name,
            architecture=delta.base.architecture,
            fingerprint="0" * 64,
            parameters=delta.base.parameters,
        ),
        tuned_bytes=delta.tuned.nbytes,
        options=options,
        calibration_tokens=calibration.tokens if calibration else 0,
        config=delta.config_changes(),
        companions={
            name: None
            if one is None
            else StoredCompanion(size=len(one), nbytes=len(companions[name]), digest=payload_digest(one))
            for name, one in own.items()
        },
        tensors={},
    )

    def build(budget: int | None, refined: bool = False) -> SkillPack:
        return _build(job, crew, budget, header, companions, calibration=calibration, rows=rows, refined=refined)

    size, target = None, options.divergence
    if target is not None:
        if measure is None:
            raise CompressionError(
                f"budget: {options.budget} is met by measuring, but there is nothing to measure on; "
                "give prompts (--calibration) or a size such as 5%."
            )
        size = _smallest_within(target, measure, build, delta.tuned.nbytes)
    elif options.budget is not None:
        size = budget_bytes(options.budget, delta.tuned.nbytes)
    return build(size, options.layered)


def _smallest_within(
    target: float, measure: Callable[[SkillPack], float], build: Callable[[int], SkillPack], tuned_bytes: int
) -> int:
    """Return the least budget found whose pack's KL divergence is within a target: log-log interpolation over sizes."""
    below, above = _Tried(0, math.inf), None  # the largest that is too small, the smallest that is large enough
    refused: BudgetError | None = None  # at the size tried last
    size: int | None = tuned_bytes // 20
    for _ in range(_TRIES):
        if size is None:
            break
        try:
            found, refused = measure(build(size)), None
            say(f"budget kl={target:g}: a pack within {size:,} bytes has {found:.2g}")
        except BudgetError as error:
            found, refused = math.inf, error
        if found <= target:
            above = _Tried(size, found)
            if found >= _CLOSE * target:
                break
        else:
            below = _Tried(size, math.inf if math.isnan(found) else found)
        size = _next_size(below, above, target, tuned_bytes)
    if above is None and refused is not None:
        raise refused
    if above is None:
        raise CompressionError(
            f"budget: expected a KL divergence of at most {target:g}, but a pack of {below.size:,} bytes is not "
            "that faithful. Allow more, or take --strategy exact."
        )
    say(f"budget kl={target:g}: taking {above.size:,} bytes, whose pack has {above.divergence:.2g}")
    return above.size


@dataclass(frozen=True)
class _Tried:
    """A budget and the divergence of its pack."""

    size: int
    divergence: float


def _next_size(below: _Tried, above: _Tried | None, target: float, most: int) -> int | None:
    """Return the budget to try next; None where there is none left that would make a difference.

    Args:
        below: the largest that is too small.
        above: the smallest that is large enough; None where none was yet.
        target: the divergence to meet.
        most: the largest budget that there may be.
    """
    if above is None:  # divergence falls with about the cube of the size, but a pack that is too large tells more
        size = math.ceil(below.size * min(max(below.divergence / target, 1.5), 64) ** 0.5)
        return min(size, most) if below.size < most else None
    if not below.size:
        return max(1, int(above.size * max(above.divergence / target, 1e-6) ** (1 / 3)))
    if above.size <= below.size * _FINE:
        return None
    low, high = math.log(below.size), math.log(above.size)
    share = 0.5
    if above.divergence and math.isfinite(below.divergence):
        worse, better = math.log(below.divergence), math.log(above.divergence)
        share = min(max((worse - math.log(_AIM * target)) / (worse - better), 0.1), 0.9)
    return min(max(round(math.exp(low + share * (high - low))), below.size + 1), above.size - 1)


def _build(
    job: Job,
    crew: Crew,
    budget: int | None,
    header: Header,
    companions: Mapping[Companion, bytes],
    *,
    calibration: Calibration | None,
    rows: Sequence[Prompt],
    refined: bool,
) -> SkillPack:
    """Return a pack whose file takes at most `budget` bytes, and `refined` an exact layer more.

    `header` is that of a pack without tensors, and `companions` what the file stores of those.
    """
    delta, options = job.delta, job.options

    def entry(name: str, part: Compressed) -> TensorEntry:
        tuned = delta.tuned.specs[part.name]
        return TensorEntry(
            role=role_of(name, tuned.shape),
            dtype=part.spec.dtype,
            shape=part.spec.shape,
            base_digest=part.facts.base_digest,
            how=part.facts.operator,
            nbytes=part.facts.nbytes,
            payload_digest=part.facts.payload_digest,
            error=round(part.facts.error, 5),
            tuned_shape=tuned.shape if tuned.shape != part.spec.shape else None,
            tuned_dtype=tuned.dtype if tuned.dtype != part.spec.dtype else None,
            unseen=calibration is not None and part.name in calibration.unseen,
            refinement=part.facts.refinement,
            tuned_digest=part.facts.tuned_digest,
            same_as=delta.tied.get(name),
        )

    def described(coded: Sequence[Compressed]) -> Header:
        by_name = {part.name: part for part in coded}
        found_in = {name: delta.tied.get(name, name) for name in delta}
        entries = {name: entry(name, by_name[stored]) for name, stored in found_in.items() if stored in by_name}
        found = fingerprint((name, entry.spec, entry.base_digest) for name, entry in entries.items())
        base = header.base.model_copy(update={"fingerprint": found})
        return header.model_copy(update={"base": base, "tensors": entries})

    def beside(coded: Sequence[Compressed]) -> int:
        return len(opening(described(coded))) + header.companion_bytes

    room = budget
    if room is not None and options.distill:
        room -= _SPARE * len(delta.distinct)
    while True:
        coded = encode_job(job, crew, None if room is None else Budget(room, beside))
        if options.distill:
            from graftllm.compression.distillation import distill_job

            coded = distill_job(job, coded, rows)
        whole = described(coded)
        if budget is None or room is None or file_bytes(whole) <= budget:
            break
        room -= file_bytes(whole) - budget  # `paper` does not know how long its header will be
    if refined:
        coded = refine_job(job, crew, coded)
        whole = described(coded)
    parts = {part.name: part for part in coded}

    def payload(run: Run, name: str) -> np.ndarray:
        if run == "companions":
            return np.frombuffer(companions[cast(Companion, name)], np.uint8)
        return parts[name].payload if run == "payloads" else parts[name].refinement

    return SkillPack(whole, "an unsaved pack", payload)
