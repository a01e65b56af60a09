"""A report and a pack as tables, in Markdown and at a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from graftllm.evaluation.anatomy import OTHER, by_layer, by_role, layered, portion
from graftllm.evaluation.plots import PLOTS, draw_plots
from graftllm.evaluation.report import Report
from graftllm.evaluation.scores import Score
from graftllm.header import Header, Overhead, TensorEntry
from graftllm.packing_options import PackOptions
from graftllm.storage import write_text


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn: as Markdown or at a terminal."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def grids(report: Report) -> list[Grid]:
    """Return the report's tables; scores are percentages of right answers with their standard errors."""
    stages = ("base", "source", "tuned", "pack", "routed")
    skills = Grid(
        "Skills, % right",
        ["skill", *stages],
        [
            [name, *(_percent(getattr(found, stage), found.n) for stage in stages)]
            for name, found in report.skills.items()
        ],
    )
    general = Grid(
        "General tasks, % right",
        ["task", "base", "tuned (mean)", "routed"],
        [
            [task, *(_percent(value, found.n) for value in (found.base, found.tuned_mean, found.routed))]
            for task, found in report.general.items()
        ],
    )
    packs = Grid(
        "SkillPacks",
        ["pack", "bytes", "tuned bytes", "share", "bits/param", "KL", "top-1"],
        [
            [
                name,
                f"{found.file_bytes:,}",
                f"{found.tuned_bytes:,}",
                f"{found.file_bytes / found.tuned_bytes:.1%}",
                f"{found.bits_per_parameter:.2f}",
                f"{found.kl_to_tuned:.4f}",
                f"{found.top1_agreement:.1%}",
            ]
            for name, found in report.packs.items()
        ],
    )
    return [skills, *_instead(report), general, packs, *_overheads(report)]


def _instead(report: Report) -> list[Grid]:
    """Return the table of the baselines that were asked for, if any."""
    baselines = {"sequential": report.sequential, "summed": report.summed, "LoRA": report.lora}
    asked = {title: scores for title, scores in baselines.items() if scores}
    rows = [
        [name, _percent(found.routed, found.n), *(_percent(scores[name], found.n) for scores in asked.values())]
        for name, found in report.skills.items()
    ]
    return [Grid("Instead of packs, % right", ["skill", "grafted, routed", *asked], rows)] if asked else []


def _overheads(report: Report) -> list[Grid]:
    """Return the table of what making the packs took, if that is known."""
    found = {name: overhead_rows(pack.overheads) for name, pack in report.packs.items()}
    rows = [[name, *row] for name, stages in found.items() for row in stages]
    return [Grid("What the packs took", ["pack", *OVERHEADS], rows)] if rows else []


OVERHEADS = ("stage", "seconds", "CPU s", "GPU s", "peak MB", "peak GPU MB", "tokens")


def overhead_rows(overheads: Mapping[str, Overhead]) -> list[list[str]]:
    """Return a row of `OVERHEADS` for each stage."""
    return [
        [
            stage,
            f"{took.seconds:,g}",
            f"{took.cpu_seconds:,g}",
            f"{took.gpu_seconds:,g}",
            f"{took.peak_memory_bytes / 1e6:,.0f}",
            f"{took.peak_gpu_bytes / 1e6:,.0f}",
            f"{took.tokens:,}",
        ]
        for stage, took in overheads.items()
    ]


def overhead_grids(header: Header) -> list[Grid]:
    """Return the table of what making a pack took, if its header says so."""
    rows = overhead_rows(header.card.overheads)
    return [Grid("What it took", OVERHEADS, rows)] if rows else []


def pack_lines(header: Header, file_bytes: int) -> list[str]:
    """Return what a pack says of itself, a line each: card, base, size, options and provenance."""
    card, base, made = header.card, header.base, header.card.provenance
    parameters = portion(header.tensors.values()).parameters
    unseen = sum(entry.unseen for entry in header.tensors.values())
    facts = {
        "base": f"{base.name} ({base.architecture}, {base.parameters:,} parameters)",
        "fingerprint": base.fingerprint,
        "file": f"{file_bytes:,} bytes, {file_bytes / max(1, header.tuned_bytes):.1%} of the tuned checkpoint, "
        f"{8 * file_bytes / max(1, parameters):.2f} bits per parameter",
        "strategy": f"{_pack_options(header.options)}, "
        + (f"calibrated on {header.calibration_tokens:,} tokens" if header.calibration_tokens else "not calibrated"),
        "operators": _operator_counts(header),
        **_layers(header),
        "sources": ", ".join(made.sources) or "not recorded",
        "trained on": f"{made.sft_rows:,} rows, {made.preference_pairs:,} preference pairs" if made.sft_rows else "",
        "SFT": _knobs(made.sft),
        "DPO": _knobs(made.dpo),
        "scores": ", ".join(f"{key} {value:.3f}" for key, value in card.scores.items()) or "not recorded",
        "license": card.license or "not recorded",
        "config": ", ".join(f"{key} {value}" for key, value in header.config.items()),
        "own files": _own_files(header),
        "unseen": f"{unseen:,} matrices or stacks of experts that not all saw a calibration token" if unseen else "",
    }
    lines = [f"{card.name or 'unnamed'}: {card.description or 'no description'}"]
    return [printable(line) for line in lines + [f"{key:<12} {fact}" for key, fact in facts.items() if fact]]


def _own_files(header: Header) -> str:
    """Return which files beside the tuned weights come along, and what they take."""
    if header.own_files is None:
        return ""
    return f"{', '.join(header.own_files) or 'none'}, {header.companion_bytes:,} bytes"


def role_grid(header: Header) -> Grid:
    """Return how many bytes each role of a pack takes under each operator, and how large its errors are."""
    groups: dict[tuple[str, str], list[TensorEntry]] = {}
    for entry in header.tensors.values():
        groups.setdefault((entry.role, entry.operator), []).append(entry)
    whole = portion(header.tensors.values())
    found = {key: portion(entries) for key, entries in groups.items()} | {("all", ""): whole}
    rows = [
        [
            *key,
            f"{one.tensors:,}",
            f"{one.parameters:,}",
            f"{one.nbytes:,}",
            f"{one.nbytes / max(1, whole.nbytes):.1%}",
            f"{one.rate:.2f}",
            f"{one.median_error:.1%}",
            f"{one.max_error:.1%}",
        ]
        for key, one in found.items()
    ]
    columns = ["role", "operator", "count", "parameters", "bytes", "share", "rate", "error", "worst"]
    return Grid("By role (rate: bits per parameter; error of the delta: median, worst)", columns, rows)


def layer_grid(header: Header) -> Grid:
    """Return bytes, rate and errors of each layer by role; of many layers, neighbors share a row."""
    layers = by_layer(header, at_most=_MOST_LAYERS)
    roles = list(by_role(entry for layer, entries in layers.items() if layer != OTHER for entry in entries))
    whole = portion(header.tensors.values())
    rows = []
    for layer, entries in layers.items():
        one, parts = portion(entries), by_role(entries)
        cells = [portion(parts[role]) if role in parts else None for role in roles]
        rows.append(
            [
                layer,
                f"{one.nbytes:,}",
                f"{one.nbytes / max(1, whole.nbytes):.1%}",
                f"{one.rate:.2f}",
                *("" if cell is None else f"{cell.rate:.2f}, {cell.median_error:.1%}" for cell in cells),
            ]
        )
    title = "By layer (of each role: rate, median error)"
    return Grid(title, ["layer", "bytes", "share", "rate", *roles], rows)


_MOST_LAYERS = 16


def _operator_counts(header: Header) -> str:
    """Return how many matrices, and how many vectors, each operator holds."""
    parts = []
    for kind, wanted in (("matrices", True), ("vectors", False)):
        counts = portion(entry for entry in header.tensors.values() if (len(entry.shape) > 1) == wanted).operators
        if counts:
            parts.append(f"{kind}: " + ", ".join(f"{count:,} {operator}" for operator, count in counts.items()))
    return "; ".join(parts)


def _layers(header: Header) -> dict[str, str]:
    """Return what the layers of a pack with two take; nothing for other packs."""
    if (two := layered(header)) is None:
        return {}
    lossy, exact_bytes = two
    errors = f"median error of the delta {lossy.median_error:.1%}, worst {lossy.max_error:.1%}"
    return {"lossy layer": f"{lossy.nbytes:,} bytes, {errors}", "exact layer": f"{exact_bytes:,} bytes more, no error"}


def _pack_options(options: PackOptions) -> str:
    """Return the strategy and the options that are not the defaults."""
    usual = PackOptions()
    changed = {name: value for name, value in options if name != "strategy" and value != getattr(usual, name)}
    if "bit_bands" in changed:
        changed["bit_bands"] = ",".join(f"{bits}:{share:g}" for bits, share in options.bit_bands)
    return ", ".join([options.strategy, *(f"{name} {value}" for name, value in changed.items())])


def _knobs(options: BaseModel | None) -> str:
    return "" if options is None else ", ".join(f"{name} {value}" for name, value in options.model_dump().items())


def closing_lines(report: Report) -> list[str]:
    """Return what the tables do not say, a sentence each."""
    unplugged = "gives the base back bit for bit" if report.unplug_bit_exact else "does NOT give the base back"
    spent = ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in report.seconds.items())
    return [
        f"The router chose right for {report.router.accuracy:.1%} of {report.router.n} test prompts.",
        f"Unplugging {unplugged}.",
        f"Seed {report.seed}; {sum(report.seconds.values()):.0f} s ({spent}); "
        f"peak memory {report.peak_memory_bytes / 1e9:.1f} GB.",
    ]


def markdown(report: Report) -> str:
    """Return the report as Markdown that shows the plots beside it."""
    parts = [f"# {report.name}"]
    for grid in grids(report):
        lines = [grid.columns, ["---"] * len(grid.columns), *grid.rows]
        parts += [f"## {grid.title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    parts += ["\n".join(f"- {line}" for line in closing_lines(report))]
    parts += [f"![{alt}](plots/{file})" for file, alt in PLOTS.items()]
    return "\n\n".join(parts) + "\n"


def table(grid: Grid) -> Table:
    """Return a table for the terminal."""
    drawn = Table(title=grid.title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for i, column in enumerate(grid.columns):
        numeric = all(row[i][0].isdigit() for row in grid.rows if row[i])
        drawn.add_column(column, justify="right" if numeric else "left")
    for row in grid.rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    return drawn


def printable(text: str) -> str:
    """Return a stranger's text without anything that could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def write_report(report: Report, directory: Path, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Write `report.json`, `report.md` and `plots/` to a run's directory.

    Args:
        report: what to write.
        directory: the run's.
        curves: `spectra` of each skill's delta.
    """
    draw_plots(report, curves, directory / "plots")
    write_text(directory / "report.md", markdown(report))
    write_text(directory / "report.json", report.model_dump_json(indent=1))


def _percent(value: float, n: int) -> str:
    return f"{100 * value:.1f} ± {100 * Score(value, n).stderr:.1f}"
