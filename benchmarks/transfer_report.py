"""The comparison of transfers as Markdown tables, what each stage took, and a picture of score against bytes."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transfer_rows import Row

from graftllm.metering import Spent
from graftllm.pipeline.work import GENERAL
from graftllm.stages import Stamp
from graftllm.storage import whole_file

Results = Mapping[int, Mapping[str, Row]]  # seed -> row -> what was measured
_NOT_WORK = ("evaluate", "prepare", "zoo", "choose", "full")  # kinds of stages that are no part of a transfer
_OURS = "SkillPack"
_NEAR = 0.3  # in the logarithm of bytes: points of one column
_LINE = 4.0  # points of the score that a label takes


def table(results: Results) -> str:
    """Return every row: mean and standard error over the seeds that have it, in percent, and bytes."""
    skills = [name for name in next(iter(next(iter(results.values())).values())).scores if name != GENERAL]
    lines = [_line(["% right", "mean", *skills, GENERAL, "bytes", "seeds", "chosen"])]
    lines.append(_line(["---"] * (len(skills) + 6)))
    for name in names(results):
        found = [seed[name] for seed in results.values() if name in seed]
        cells = [percent([mean_score(row) for row in found])]
        cells += [percent([row.scores[skill] for row in found]) for skill in skills]
        cells.append(percent([row.scores[GENERAL] for row in found if GENERAL in row.scores]))
        sizes = [row.stored_bytes for row in found if row.stored_bytes is not None]
        notes = "; ".join(dict.fromkeys(row.note for row in found if row.note))
        size = f"{round(statistics.mean(sizes)):,}" if sizes else ""
        lines.append(_line([name, *cells, size, str(len(found)), notes]))
    return "\n".join(lines) + "\n"


def mean_score(row: Row) -> float:
    """Return the mean over the skills; the general tasks do not count."""
    return statistics.mean(value for name, value in row.scores.items() if name != GENERAL)


def names(results: Results) -> list[str]:
    """Return the names of the rows, in the order of the seed that has most."""
    fullest = max(results.values(), key=len)
    return list(dict.fromkeys([*fullest, *(name for found in results.values() for name in found)]))


def percent(values: Sequence[float]) -> str:
    """Return mean ± standard error of the mean in percent; without the error for one value, empty for none.

    >>> percent([0.5, 0.6]), percent([0.5]), percent([])
    ('55.0 ± 5.0', '50.0', '')
    """
    if len(values) < 2:
        return f"{100 * values[0]:.1f}" if values else ""
    return f"{100 * statistics.mean(values):.1f} ± {100 * stderr(values):.1f}"


def stderr(values: Sequence[float]) -> float:
    """Return the standard error of a mean of two values or more."""
    return statistics.stdev(values) / math.sqrt(len(values))


def costs(stamps: Sequence[Stamp]) -> dict[str, Spent]:
    """Return what the stages of each kind took together; one that was killed and went on counts whole."""
    spent: dict[str, Spent] = {}
    for stamp in stamps:
        kind, *rest = stamp.name.split(".")
        if kind not in _NOT_WORK:
            key = f"{kind} {rest[0]}" if kind in ("sft", "dpo") and len(rest) > 1 else kind
            spent[key] = spent.get(key, Spent()) + stamp.spent
    return spent


def cost_table(spent: Mapping[int, Mapping[str, Spent]], tokens: Mapping[int, Mapping[str, int]]) -> str:
    """Return what each kind of stage took for all skills: means over the seeds that have it."""
    lines = [_line(["stage", "CPU seconds", "seconds", "tokens", "peak memory, MB", "share of SFT + DPO"])]
    lines.append(_line(["---"] * 6))
    for kind in dict.fromkeys(kind for found in spent.values() for kind in found):
        having = [seed for seed, found in spent.items() if kind in found]
        found = [spent[seed][kind] for seed in having]
        training = [sum(spent[seed][kind].cpu_seconds for kind in ("sft", "dpo") if kind in spent[seed])
                    for seed in having]  # fmt: skip
        share = [one.cpu_seconds / whole for one, whole in zip(found, training, strict=True) if whole]
        read = [tokens[seed][kind] for seed in having if kind in tokens.get(seed, {})]
        lines.append(
            _line([
                kind,
                f"{statistics.mean(one.cpu_seconds for one in found):,.1f}",
                f"{statistics.mean(one.seconds for one in found):,.1f}",
                f"{round(statistics.mean(read)):,}" if read else "",
                f"{max(one.peak_memory_bytes for one in found) / 1e6:,.0f}",
                percent(share) + " %" if share else "",
            ])
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(results: Results, path: Path) -> None:
    """Draw the mean score of each row that keeps bytes against them; bars are standard errors over seeds."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    labels: dict[float, list[tuple[float, float, str, str]]] = {}  # by column: value, megabytes, name, color
    for name in names(results):
        found = [seed[name] for seed in results.values() if name in seed]
        values, size = [100 * mean_score(row) for row in found], found[0].stored_bytes
        value = statistics.mean(values)
        if size is None:
            axes.axhline(value, color="#999999", linewidth=0.8, linestyle="--")
            axes.annotate(name, (0.01, value), xycoords=("axes fraction", "data"), va="bottom")
            continue
        ours, one = name.startswith(_OURS), GENERAL in found[0].scores
        color = "#D55E00" if ours else "#009E73" if one else "#0072B2"
        bar = stderr(values) if len(values) > 1 else 0
        axes.errorbar(size / 1e6, value, bar, fmt="s" if one else "o", color=color, capsize=2)
        column = next((other for other in labels if abs(math.log(other * 1e6 / size)) < _NEAR), size / 1e6)
        labels.setdefault(column, []).append((value, size / 1e6, name, color))
    for texts in map(sorted, labels.values()):
        left = 1.2 * max(size for _, size, _, _ in texts)
        for (value, size, name, color), height in zip(texts, spread([one[0] for one in texts]), strict=True):
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.5}
            axes.annotate(
                name, (size, value), xytext=(left, height), fontsize=8, va="center", color=color, arrowprops=line
            )
    axes.set_xlim(right=3 * max(labels, default=1))
    axes.set(xlabel="MB kept beside the base for all six skills", ylabel="% right, mean of the skills")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:])


def spread(values: Sequence[float]) -> list[float]:
    """Return heights of labels near values that ascend, none closer to the next than a line.

    >>> spread([1.0, 50.0, 51.0])
    [1.0, 48.5, 52.5]
    """
    groups: list[list[float]] = []  # labels that stand together around the middle of their values
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _stacked(groups[-1])[0] - _stacked(groups[-2])[-1] < _LINE:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [height for group in groups for height in _stacked(group)]


def _stacked(values: Sequence[float]) -> list[float]:
    low = statistics.mean(values) - _LINE * (len(values) - 1) / 2
    return [low + _LINE * i for i in range(len(values))]


def as_json(spent: Mapping[int, Mapping[str, Spent]]) -> dict[str, Any]:
    """Return what stages took, for `results.json`."""
    return {str(seed): {kind: vars(one) for kind, one in found.items()} for seed, found in spent.items()}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
