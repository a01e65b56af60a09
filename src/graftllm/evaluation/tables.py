"""A report and a pack as tables, in Markdown and at a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from graftllm.evaluation.plots import PLOTS, draw_plots
from graftllm.evaluation.report import Report
from graftllm.evaluation.scores import Score
from graftllm.header import TensorEntry
from graftllm.skillpack import SkillPack
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
    return [skills, *_instead(report), general, packs]


def _instead(report: Report) -> list[Grid]:
    """Return the table of the baselines that were asked for, if any."""
    baselines = {"sequential": report.sequential, "summed": report.summed, "LoRA": report.lora}
    asked = {title: scores for title, scores in baselines.items() if scores}
    rows = [
        [name, _percent(found.routed, found.n), *(_percent(scores[name], found.n) for scores in asked.values())]
        for name, found in report.skills.items()
    ]
    return [Grid("Instead of packs, % right", ["skill", "grafted, routed", *asked], rows)] if asked else []


def pack_grid(pack: SkillPack) -> Grid:
    """Return how many bytes each role of a pack takes, and how large its errors are."""
    rows = []
    by_role: dict[tuple[str, str], list[TensorEntry]] = {}
    for entry in pack.header.tensors.values():
        by_role.setdefault((entry.role, entry.how.operator), []).append(entry)
    for (role, operator), entries in by_role.items():
        size = sum(entry.nbytes for entry in entries)
        parameters = sum(entry.spec.parameters for entry in entries)
        worst = max(entry.error for entry in entries)
        rows.append(
            [
                role,
                operator,
                str(len(entries)),
                f"{parameters:,}",
                f"{size:,}",
                f"{8 * size / parameters:.2f}",
                f"{worst:.1%}",
            ]
        )
    return Grid("Payloads", ["role", "operator", "tensors", "parameters", "bytes", "bits/param", "max error"], rows)


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
    drawn = Table(*grid.columns, title=grid.title, title_justify="left")
    for row in grid.rows:
        drawn.add_row(*row)
    return drawn


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
