"""An estimate as tables and lines."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from graftllm.costs.amounts import GENERAL, Amount, Asked, amounts
from graftllm.costs.estimate import (
    PACKING_S,
    READING_SHARE,
    SAMPLING_SHARE,
    TRAINING_SHARE,
    Estimate,
    disk_bytes,
    estimate,
    pack_bytes,
)
from graftllm.costs.hardware import USABLE, Hardware
from graftllm.costs.launching import Launch
from graftllm.evaluation.tables import Grid

_STAGES = ("sample", "judge", "sft", "own", "dpo", "pack", "evaluate", "baselines")


def estimates(asked: Asked, on: Hardware, launch: Launch | None = None) -> list[Estimate]:
    """Return what each part of a run takes; several devices share a training out unless a launch says otherwise."""
    sharded, processes = (launch.sharded, launch.processes) if launch else (on.count > 1, on.count)
    return [estimate(amount, on, sharded=sharded, processes=processes) for amount in amounts(asked)]


def amount_grid(found: Sequence[Amount]) -> Grid:
    """Return what is asked for: rows, tokens, operations, dollars."""
    rows = [
        [
            one.stage,
            one.about,
            f"{one.rows:,.0f}",
            f"{one.tokens_in / 1e6:,.2f}",
            f"{one.tokens_out / 1e6:,.2f}",
            f"{one.flops / 1e15:,.3g}" if one.model else "",
            "" if one.dollars is None else f"{one.dollars:,.2f}",
        ]
        for one in found
    ]
    columns = ["stage", "of", "rows", "M tokens in", "M tokens out", "PFLOP", "$"]
    return Grid("What is asked for (at most)", columns, rows)


def hardware_grid(found: Sequence[Estimate], on: Hardware) -> Grid:
    """Return what each part takes here: hours, devices, memory."""
    rows = [
        [
            one.amount.stage,
            one.amount.about,
            _hours(one.hours or 0),
            str(one.devices),
            f"{one.memory_bytes / 1e9:,.1f}",
            "yes" if one.fits else "NO",
            one.how,
        ]
        for one in found
        if one.hours is not None
    ]
    columns = ["stage", "of", "hours", "devices", "GB each", "fits", "how"]
    return Grid(f"On {on.name}: {on}", columns, rows)


def rows_grid(asked: Asked, rows: Sequence[Hardware]) -> Grid:
    """Return hours by stage, device hours, the most memory and whether it fits, for several kinds of hardware."""
    found = {on: estimates(asked, on) for on in rows}
    stages = [stage for stage in _STAGES if any(one.amount.stage == stage for one in next(iter(found.values())))]
    lines = []
    for on, parts in found.items():
        hours = {stage: sum(one.hours or 0 for one in parts if one.amount.stage == stage) for stage in stages}
        short = sorted({one.amount.stage for one in parts if not one.fits}, key=_STAGES.index)
        lines.append(
            [
                on.name,
                *(_hours(hours[stage]) for stage in stages),
                _hours(sum(hours.values())),
                _hours(sum(one.device_hours for one in parts)),
                f"{max(one.memory_bytes for one in parts) / 1e9:,.1f}",
                f"{on.chip.memory_bytes / 1e9:,.0f}",
                "NO: " + ", ".join(short) if short else "yes",
            ]
        )
    columns = ["hardware", *stages, "all", "device hours", "most GB", "of", "fits"]
    return Grid("Hours by the clock", columns, lines)


def closing_lines(asked: Asked, launch: Launch | None = None) -> list[str]:
    """Return disk, packs, endpoints, and everything that is assumed, a line each."""
    found, recipe = amounts(asked), asked.recipe
    tuned = 2 * asked.target.shape.parameters
    size = pack_bytes(recipe.pack, tuned)
    endpoints = [one for one in found if one.model is None]
    known = [one.dollars for one in endpoints if one.dollars is not None]
    lines = [
        f"Disk: at most {disk_bytes(asked, found) / 1e9:,.1f} GB, beside models that are downloaded.",
        f"Packs: {'as small as is faithful' if size is None else f'{size / 1e6:,.1f} MB'} each, "
        f"{len(recipe.skills)} of them.",
    ]
    if endpoints:
        tokens = sum(one.tokens_in for one in endpoints), sum(one.tokens_out for one in endpoints)
        priced = f"${sum(known):,.2f} for {len(known)} of {len(endpoints)} parts" if known else "no price is given"
        lines.append(f"Endpoints: {tokens[0] / 1e6:,.1f} M tokens in, {tokens[1] / 1e6:,.1f} M out; {priced}.")
    if launch:
        lines.append(_plan(asked, launch))
    return [*lines, "", "Assumed:", *(f"- {line}" for line in assumptions(asked))]


def warnings(found: Sequence[Estimate], on: Hardware) -> list[str]:
    """Return what does not fit, a line each, and what to do."""
    lines = []
    for one in found:
        what = f"Does not fit: {one.amount.stage} of {one.amount.about}"
        if one.rows_left:
            lines.append(f"{what}: {one.how}; choose another.")
        elif not one.fits:
            mend = "a larger device"
            if one.amount.way == "train":
                whole = one.amount.model is not None and one.amount.trained == one.amount.model.shape.parameters
                mend = "more devices, or method: lora" if whole else "more devices"
            needed, there = one.memory_bytes / 1e9, on.chip.memory_bytes / 1e9
            lines.append(
                f"{what}: {needed:,.1f} GB on each device, more than is to be had of {there:,.0f} GB; take {mend}."
            )
    return lines


def assumptions(asked: Asked) -> list[str]:
    """Return everything that the estimate takes for granted."""
    assumed = asked.assumed
    models = [
        f"{one.name}: {one.shape.parameters / 1e9:.3g} B parameters, {one.shape.layers} layers, width "
        f"{one.shape.width:,}, {one.shape.vocabulary:,} tokens (by {one.known_by})"
        for one in asked.models.values()
    ]
    counted = [
        f"{name}: {asked.prompts[name].count:,} prompts of {asked.prompts[name].tokens:.0f} tokens, "
        f"{asked.tests[name].count:,} tests"
        for name in (*asked.recipe.skills, GENERAL)
    ]
    notes = [note for one in (*asked.prompts.values(), *asked.tests.values()) for note in one.notes]
    long = "half of the most allowed" if assumed.answer_tokens is None else f"{assumed.answer_tokens} tokens"
    return [
        *models,
        *counted,
        *dict.fromkeys(notes),
        f"prompts that are not here have {assumed.prompt_tokens} tokens; an answer has {long}",
        "every prompt gives a row and every group of answers a pair; no prompt is a duplicate",
        "6 operations a parameter and token trained, 2 read or generated; weights, gradients and moments in float32",
        f"of the peak, training reaches {TRAINING_SHARE:.0%}, reading {READING_SHARE:.0%}, sampling with transformers "
        f"{SAMPLING_SHARE:.0%}; no device has more than {USABLE:.0%} of its memory to give (half, on a computer)",
        f"packing takes {PACKING_S * 1e9:.0f} core seconds a billion parameters on one core, and one device",
        "only training uses several devices; programs and rules that judge take no time",
    ]


def figures(asked: Asked, rows: Sequence[Hardware], launch: Launch | None = None) -> dict[str, Any]:
    """Return what `graftllm cost --json` prints."""
    found = amounts(asked)

    def part(one: Amount) -> dict[str, Any]:
        kept = ("stage", "about", "rows", "tokens_in", "tokens_out", "flops", "dollars")
        return {name: value for name, value in one.__dict__.items() if name in kept}

    def taken(one: Estimate) -> dict[str, Any]:
        told = {name: value for name, value in one.__dict__.items() if name != "amount"}
        return {"stage": one.amount.stage, "about": one.amount.about} | told

    return {
        "amounts": [part(one) for one in found],
        "hardware": {on.name: [taken(one) for one in estimates(asked, on, launch)] for on in rows},
        "disk_bytes": disk_bytes(asked, found),
        "pack_bytes": pack_bytes(asked.recipe.pack, 2 * asked.target.shape.parameters),
        "launch": launch and asdict(launch),
        "assumed": assumptions(asked),
    }


def _plan(asked: Asked, launch: Launch) -> str:
    """Return how a launch shares the target out."""
    parameters = asked.target.shape.parameters
    each = parameters / launch.processes if launch.sharded else parameters
    return (
        f"Launch: {launch.kind}, {launch.processes} processes on {launch.machines} machine(s), "
        f"precision {launch.precision}; each holds {each / 1e9:,.3g} B of {parameters / 1e9:,.3g} B parameters, "
        "their gradients and moments."
    )


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}" if hours < 10 else f"{hours:.1f}"
