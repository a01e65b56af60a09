"""The comparison as a Markdown table, and as a plot of the average score against bytes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_rows import Measurement, average
from matplotlib.figure import Figure

from graftllm.fusion.methods.table import METHODS
from graftllm.storage import whole_file

Results = dict[int, dict[str, Measurement]]  # seed -> row -> what was measured
_OURS = ("packs, by name", "packs, routed", "packs, distilled, routed")
_BOUNDS = ("base", "tuned, by name")


def table(results: Results, skills: Sequence[str], scaling: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return every row: mean and standard error over the seeds that have it, in percent, and bytes."""
    head = ["% right", "average", *skills, "general", "bytes", "seeds", "chosen"]
    lines = [_line(head), _line(["---"] * len(head))]
    for name in _names(results):
        found = [seed[name] for seed in results.values() if name in seed]
        cells = [_percent([average(row.scores, skills) for row in found])]
        cells += [_percent([row.scores[test] for row in found]) for test in (*skills, "general")]
        size = round(sum(row.stored_bytes for row in found) / len(found))
        notes = "; ".join(dict.fromkeys(row.note for row in found if row.note))
        lines.append(_line([name, *cells, f"{size:,}", str(len(found)), notes]))
    if scaling:
        keys = list(scaling[0])
        lines += ["", _line(keys), _line(["---"] * len(keys))]
        lines += [_line([f"{row[key]:,.3g}" if isinstance(row[key], float) else str(row[key]) for key in keys])
                  for row in scaling]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(results: Results, skills: Sequence[str], path: Path) -> None:
    """Draw the average score of each row against the bytes that it keeps; bars are standard errors over seeds."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    points: list[tuple[float, float, str]] = []  # MB, mean, name
    for name in _names(results):
        if name.startswith("tuned on"):
            continue
        found = [seed[name] for seed in results.values() if name in seed]
        values = [100 * average(row.scores, skills) for row in found]
        size, mean = sum(row.stored_bytes for row in found) / len(found) / 1e6, sum(values) / len(values)
        axes.errorbar(size, mean, _stderr(values) or 0, fmt="o", color=_color(name), capsize=2)
        points.append((size, mean, name))
    for near in _clusters(points):
        names = sorted((name for *_, name in sorted(near)), key=lambda name: (name in METHODS, name != "base"))
        text = "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        size, mean, _ = max(near)
        axes.annotate(
            text, (size, mean), xytext=(7, -3), textcoords="offset points", fontsize=8, color=_color(names[0])
        )
    axes.set(xlabel="MB kept, the base included where it is needed", ylabel="% right, mean of skills and general tasks")
    axes.set_xlim(left=0, right=1.15 * max(size for size, *_ in points))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:])


def _color(name: str) -> str:
    return "#D55E00" if name in _OURS else "#666666" if name in _BOUNDS else "#0072B2"


def _clusters(points: Sequence[tuple[float, float, str]]) -> list[list[tuple[float, float, str]]]:
    """Return points so near to each other that their labels would overlap, together."""
    clusters: list[list[tuple[float, float, str]]] = []
    for point in points:
        near = [one for one in clusters if any(_overlap(point, other) for other in one)]
        clusters = [one for one in clusters if one not in near] + [[point, *(other for one in near for other in one)]]
    return clusters


def _overlap(one: tuple[float, float, str], other: tuple[float, float, str]) -> bool:
    return abs(one[0] - other[0]) < 1.2 and abs(one[1] - other[1]) < 2.5


def _names(results: Results) -> list[str]:
    return list(dict.fromkeys(name for found in results.values() for name in found))


def _percent(values: Sequence[float]) -> str:
    mean, error = 100 * sum(values) / len(values), _stderr([100 * value for value in values])
    return f"{mean:.1f}" if error is None else f"{mean:.1f} ± {error:.1f}"


def _stderr(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean over seeds; None for one seed."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
