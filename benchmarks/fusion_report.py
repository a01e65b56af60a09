"""The comparison as a Markdown table, and as a plot of the average score against bytes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_rows import Measurement, average
from matplotlib.figure import Figure

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
    labels: dict[tuple[int, int], list[str]] = {}  # of points at nearly the same place, in one line
    places: dict[tuple[int, int], tuple[float, float, str]] = {}
    for name in _names(results):
        if name.startswith("tuned on"):
            continue
        found = [seed[name] for seed in results.values() if name in seed]
        values = [100 * average(row.scores, skills) for row in found]
        size, mean = sum(row.stored_bytes for row in found) / len(found) / 1e6, sum(values) / len(values)
        color = "#D55E00" if name in _OURS else "#666666" if name in _BOUNDS else "#0072B2"
        axes.errorbar(size, mean, _stderr(values) or 0, fmt="o", color=color, capsize=2)
        labels.setdefault((round(size / 0.9), round(mean / 2.5)), []).append(name)
        places.setdefault((round(size / 0.9), round(mean / 2.5)), (size, mean, color))
    for place, names in labels.items():
        size, mean, color = places[place]
        text = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        axes.annotate(text, (size, mean), xytext=(6, 4), textcoords="offset points", fontsize=8, color=color)
    axes.set(xlabel="MB kept, the base included where it is needed", ylabel="% right, mean of skills and general tasks")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:])


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
