"""The strategies: which operator compresses which parameter, and how hard.

`auto` takes for every matrix the operator that is cheapest at one step for the whole model. `exact` keeps every
bit; with a budget it does so in two layers, of which the lower is what `auto` makes. `paper` is in `published`. What
is done to a tensor is a unit of `units`, and a `crew` does them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from graftllm.compression.allocation import falls_short, step_for
from graftllm.compression.automatic import AIM, next_step
from graftllm.compression.crew import Crew
from graftllm.compression.lowrank import rank_for_energy
from graftllm.compression.matrix import matrix_shape
from graftllm.compression.outlook import Outlook, directions_for, twice_as_many
from graftllm.compression.units import Compressed, Job, Unit, found_code, found_outlook, found_sizes
from graftllm.errors import BudgetError
from graftllm.packing_options import DEFAULT_SHARE

_PASSES = 4  # codings of everything, to fill a budget
_MOST = 12  # codings, where none of the first fits
_COARSER = 1 / 64  # octaves, by which the step of the next coding grows; twice as many each time
_MANY = 64  # matrices; more are coded in parts, each of which corrects the foresight for those after it
_PARTS = 8


def encode_job(job: Job, crew: Crew, *, payload_budget: int | None) -> list[Compressed]:
    """Return every parameter of a delta in compressed form. Payloads stay in the job's workspace.

    Args:
        job: what to compress, and how.
        crew: who does it.
        payload_budget: bytes that all payloads together may take.

    Raises:
        BudgetError: it cannot be met.
        CheckpointError: the delta holds NaN, infinity or values above 2 ** 48.
    """
    if job.options.strategy == "auto" or job.options.layered:
        return _automatic(job, crew, payload_budget)
    ranks = {} if payload_budget is None else _ranks_for_budget(job, crew, payload_budget)
    return _coded(job, crew, [Unit(name, "publish", ranks.get(name)) for name in job.delta])


def refine_job(job: Job, crew: Crew, parts: Sequence[Compressed]) -> list[Compressed]:
    """Return parts that `encode_job` gave, with an exact layer on all that are not exact yet."""
    lossy = [part for part in parts if part.unit.kind == "code" and part.facts.operator.operator != "exact"]
    units = {part.name: replace(part.unit, kind="refine") for part in lossy}
    crew(list(units.values()), "refining")
    return [found_code(job, units[part.name]) if part.name in units else part for part in parts]


def _automatic(job: Job, crew: Crew, payload_budget: int | None) -> list[Compressed]:
    """Return every parameter in compressed form at the step that fills the budget."""
    looks = _first_looks(job, payload_budget)
    crew(list(looks.values()), "looking")
    found = {name: found_outlook(job, look) for name, look in looks.items()}
    outlooks = {name: one for name, one in found.items() if one is not None}
    parts = {name: found_code(job, looks[name]) for name, one in found.items() if one is None}
    fixed = sum(part.facts.nbytes for part in parts.values())
    if payload_budget is None:
        room = round(DEFAULT_SHARE * sum(job.delta.tuned.specs[name].nbytes for name in outlooks))
    else:
        room = payload_budget - fixed
    step = _first_step(job, crew, looks, outlooks, room)
    codes = {name: replace(looks[name], kind="code") for name in outlooks}
    fullest, least, smallest = -1, 0, None
    for number in range(_MOST):
        if step is None or (number >= _PASSES and fullest >= 0):
            break
        if number >= _PASSES:
            step *= 2 ** (_COARSER * 2.0 ** (number - _PASSES))  # what is foreseen corrects too little here
        if number == 0 and len(outlooks) > _MANY:
            tried = _in_parts(job, crew, codes, outlooks, room, step)
        else:
            tried = _coded(job, crew, [replace(unit, at=step) for unit in codes.values()])
        sizes = _sizes(tried)
        total = sum(sizes.values())
        if smallest is None or total < least:
            smallest, least = tried, total
        elif number > _PASSES:
            break  # there is nothing left to take away
        if fullest < total <= room:
            parts, fullest = parts | {part.name: part for part in tried}, total
        step = next_step(outlooks, sizes, room, _steps(tried))
    if outlooks and fullest < 0:
        if payload_budget is not None:
            raise BudgetError(
                f"budget: expected at least {fixed + least:,} bytes beside the header for this delta, {fixed:,} of "
                f"them for norms and biases, which are kept exactly; found room for {max(payload_budget, 0):,}. "
                "Raise the budget."
            )
        parts |= {part.name: part for part in smallest or ()}  # a few small matrices can hardly take so little
    return [parts[name] for name in job.delta]


def _first_looks(job: Job, payload_budget: int | None) -> dict[str, Unit]:
    """Return looks that take as many directions as the budget is likely to pay."""
    specs = job.delta.tuned.specs
    nbytes = DEFAULT_SHARE * job.delta.tuned.nbytes if payload_budget is None else max(payload_budget, 0)
    rate = 8 * nbytes / max(1, job.delta.tuned.parameters)
    return {
        name: Unit(name, "look", directions=directions_for(matrix_shape(specs[name].shape), rate)) for name in job.delta
    }


def _first_step(job: Job, crew: Crew, looks: dict[str, Unit], outlooks: dict[str, Outlook], room: int) -> float | None:
    """Return the step that is foreseen to fill the room.

    Matrices of which all directions that were found are worth their bytes are looked at again, for twice as many.
    """
    while outlooks:
        step = step_for(outlooks.values(), 8 * max(room, 0) * AIM)
        short = [name for name, one in outlooks.items() if falls_short(one, step)]
        if not short:
            return step
        for name in short:
            looks[name] = replace(looks[name], directions=twice_as_many(looks[name].directions, outlooks[name].shape))
        crew([looks[name] for name in short], "looking closer")
        outlooks |= {name: one for name in short if (one := found_outlook(job, looks[name])) is not None}
    return None


def _in_parts(
    job: Job, crew: Crew, codes: Mapping[str, Unit], outlooks: Mapping[str, Outlook], room: int, step: float
) -> list[Compressed]:
    """Return all matrices, coded a part at a time: each at the step that is to fill what the others leave of the room.

    The largest come first, and are spread over the parts, so the last part has little left to miss. If it does miss,
    parts are coded again.
    """
    ordered = sorted(outlooks, key=lambda name: -math.prod(outlooks[name].shape))
    coded: dict[str, Compressed] = {}
    for number in range(2 * _PARTS):
        part, found = ordered[number % _PARTS :: _PARTS], list(coded.values())
        if len(found) == len(ordered) and next_step(outlooks, _sizes(found), room, _steps(found)) is None:
            break
        if others := [one for one in found if one.name not in part]:
            step = next_step(outlooks, _sizes(others), room, _steps(others)) or step
        units = [replace(codes[name], at=step) for name in part]
        coded |= {one.name: one for one in _coded(job, crew, units, f"packing {number % _PARTS + 1}/{_PARTS}")}
    return list(coded.values())


def _steps(coded: Sequence[Compressed]) -> dict[str, float]:
    return {one.name: cast(float, one.unit.at) for one in coded}


def _coded(job: Job, crew: Crew, units: Sequence[Unit], label: str = "packing") -> list[Compressed]:
    crew(units, label)
    return [found_code(job, unit) for unit in units]


def _sizes(parts: Sequence[Compressed]) -> dict[str, int]:
    return {part.name: part.facts.nbytes for part in parts}


def _ranks_for_budget(job: Job, crew: Crew, budget: int) -> dict[str, int]:
    """Return the ranks at the largest energy that fits the budget, by bisection over known spectra."""
    options = job.options
    crew([Unit(name, "spectrum") for name in job.delta], "reading spectra")
    sizes = {name: found_sizes(job, name) for name in job.delta}

    def total(energy: float) -> int:
        return sum(size.nbytes(energy, options) for size in sizes.values())

    low, high = 1e-6, 1.0
    if total(low) > budget:
        raise BudgetError(
            f"budget: expected at least {total(low):,} bytes of payload for this delta, found {max(budget, 0):,} "
            f"left of the budget after the header. Raise the budget or lower the density (now {options.density})."
        )
    if total(high) <= budget:
        low = high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= budget else (low, middle)
    return {name: rank_for_energy(size.spectrum, low) for name, size in sizes.items() if size.spectrum is not None}
