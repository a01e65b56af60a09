"""The comparison as tables in Markdown and as a plot of KL against file bytes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from codec_methods import OWN
from codec_results import LEVELS, REFERENCE, Point, Ratio, curves_of, kl_at, mean_curve, ratios
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_RATES = (0.5, 1.0, 2.0)  # bits per parameter at which tables read the curves
# Okabe and Ito's colours, told apart by everyone; dashes and markers tell the rest apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
_DASHES = ("-", "--", ":")
_BOUND = "limit of its transforms"


def tables(points: Sequence[Point], facts: Mapping[str, Any]) -> str:
    """Return all tables.

    Args:
        points: everything that was measured.
        facts: by subject, the ends of its scale and the size of its exact pack.
    """
    parts = []
    for target in dict.fromkeys(point.target for point in points):
        some = [point for point in points if point.target == target]
        seeds = sorted({point.seed for point in some})
        skills = list(dict.fromkeys(point.skill for point in some))
        parts += [
            f"## {target}: {some[0].parameters:,} parameters, skills {', '.join(skills)}, seeds {seeds}",
            _table_of_ratios(points, target),
            _table_at_rates(some),
            _table_of_scores(some, facts),
            _beaten(some),
            _table_of_bounds(some),
        ]
    parts += [_table_of_ends(facts), _table_of_exact(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table_of_ratios(points: Sequence[Point], target: str) -> str:
    head = [f"bytes at equal KL / bytes of {REFERENCE}", *(f"at its {level} b/p" for level in LEVELS)]
    rows = [
        [method, *(_shown(found[level]) for level in LEVELS)] for method, found in ratios(points, target).items()
    ]  # fmt: skip
    return _markdown(head, rows)


def _shown(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    error = "" if math.isnan(ratio.stderr) else f" ± {ratio.stderr:.2f}"
    return f"{ratio.sign}{' ' if ratio.sign else ''}{ratio.value:.2f}{error}"


def _table_at_rates(points: Sequence[Point]) -> str:
    """Return KL at equal bytes (log-log between measured files), and what the largest file below has."""
    head = ["method", *(f"KL at {rate} b/p" for rate in _RATES)]
    head += [f"{name} at {_RATES[1]} b/p" for name in ("score, %", "relative error", "calibrated error")]
    rows = []
    for method in dict.fromkeys(point.method for point in points):
        curves = [found for (name, _, _), found in curves_of(points).items() if name == method]
        row = [method]
        for rate in _RATES:
            values = [kl_at(found, rate * found[0].parameters / 8) for found in curves]
            known = [value for value in values if value is not None]
            row.append(f"{math.exp(np.mean(np.log(known))):.2g}" if len(known) == len(values) else "–")
        below = [[point for point in found if point.rate <= _RATES[1] * 1.03] for found in curves]
        if all(below):
            last = [found[-1].found for found in below]
            row.append(f"{100 * np.mean([found['score'] for found in last]):.1f}")
            row += [f"{np.mean([found[key] for found in last]):.3f}" for key in ("relative_error", "calibrated_error")]
        rows.append(row + ["–"] * (len(head) - len(row)))
    note = "Geometric mean KL, nats per token; score and errors of the best file of at most that size.\n\n"
    return note + _markdown(head, rows)


def _table_of_scores(points: Sequence[Point], facts: Mapping[str, Any]) -> str:
    """Return what our files lose of the tuned model's score: the mean, and its standard error over seeds."""
    head = ["file", "b/p", "% of a 16-bit model", "score less the tuned model's", "seconds"]
    rows = []
    for method, setting in dict.fromkeys((point.method, point.setting) for point in points if point.method in OWN):
        some = [point for point in points if (point.method, point.setting) == (method, setting)]
        by_seed: dict[int, list[float]] = {}
        for point in some:
            tuned = facts[f"{point.target}.{point.skill}.{point.seed}"]["tuned"]
            by_seed.setdefault(point.seed, []).append(100 * (point.found["score"] - tuned))
        means = [float(np.mean(found)) for found in by_seed.values()]
        error = f" ± {np.std(means, ddof=1) / len(means) ** 0.5:.1f}" if len(means) > 1 else ""
        rate, seconds = (np.mean(found) for found in zip(*((p.rate, p.found["seconds"]) for p in some), strict=True))
        rows.append([method, f"{rate:.2f}", f"{100 * rate / 16:.1f}", f"{np.mean(means):.1f}{error}", f"{seconds:.0f}"])
    return _markdown(head, rows) if rows else ""


def _beaten(points: Sequence[Point]) -> str:
    """Return how many files of rivals are below the curve of `auto`, where that goes."""
    curves = curves_of(points)
    rivals = [point for point in points if point.method not in OWN]
    found = [(point, kl_at(curves.get((OWN[0], point.skill, point.seed), []), point.nbytes)) for point in rivals]
    below = [point for point, kl in found if kl is not None and point.kl < kl]
    told = "".join(f"; {point.method} {point.skill}.{point.seed} at {point.rate:.2f} b/p" for point in below)
    return f"Files of rivals below the curve of {OWN[0]}, from its least file to its largest: {len(below)}{told}."


def _table_of_bounds(points: Sequence[Point]) -> str:
    head = ["bytes of lossy matrices", "b/p", "/ limit as directions", "/ lower of both limits"]
    rows = []
    for method in OWN:
        found = [point for point in points if point.method == method and point.found.get("bound_nbytes")]
        for setting in dict.fromkeys(point.setting for point in found):
            some = [point for point in found if point.setting == setting]
            row = [method, f"{np.mean([point.rate for point in some]):.2f}"]
            for key in ("directions_nbytes", "bound_nbytes"):
                gaps = [point.found["lossy_nbytes"] / point.found[key] for point in some]
                row.append(f"{np.mean(gaps):.2f} ({min(gaps):.2f} to {max(gaps):.2f})")
            rows.append(row)
    return _markdown(head, rows) if rows else ""


def _table_of_ends(facts: Mapping[str, Any]) -> str:
    head = ["subject", "base, %", "tuned, %", "KL of the base"]
    rows = [
        [name, f"{100 * found['base']:.1f}", f"{100 * found['tuned']:.1f}", f"{found['base_kl']:.2f}"]
        for name, found in facts.items()
    ]
    return _markdown(head, rows)


def _table_of_exact(facts: Mapping[str, Any]) -> str:
    head = ["bit for bit", "exact pack", "zstd -19 of XOR", "ratio"]
    rows = []
    for name, found in facts.items():
        if "exact" in found:
            ours, theirs = found["exact"]["nbytes"], found["exact"]["zstd_nbytes"]
            rows.append([name, f"{ours:,}", f"{theirs:,}", f"{ours / theirs:.3f}"])
    return _markdown(head, rows) if rows else ""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(points: Sequence[Point]) -> Figure:
    """Return KL against file bytes, a panel a target, every method named at its curve's end."""
    targets = list(dict.fromkeys(point.target for point in points))
    figure = Figure(figsize=(9, 7 * max(1, len(targets))))
    names = list(dict.fromkeys(point.method for point in points if point.method not in OWN))
    styles = {name: (_COLORS[i % len(_COLORS)], _DASHES[i // len(_COLORS)]) for i, name in enumerate(names)}
    styles |= {name: ("black", dash) for name, dash in zip(OWN, ("-", (0, (5, 1)), "-.", ":"), strict=True)}
    panels = figure.subplots(max(1, len(targets)), 1, squeeze=False)[:, 0]
    for axes, target in zip(panels, targets, strict=False):
        some = [point for point in points if point.target == target]
        ends = []
        for name in dict.fromkeys(point.method for point in some):
            sizes, kls = mean_curve(some, name)
            if len(sizes):
                color, dash = styles[name]
                strong = name in OWN or name == REFERENCE
                axes.plot(sizes, kls, linestyle=dash, color=color, linewidth=2.6 if strong else 1.3)
                axes.plot(sizes[-1], kls[-1], "o", color=color, markersize=4)
                ends.append((float(sizes[-1]), float(kls[-1]), name, color))
        _draw_bound(axes, some)
        axes.set(xscale="log", yscale="log", title=f"{target}, {some[0].parameters / 1e6:.1f} M parameters")
        axes.set(xlabel="file, bytes", ylabel="KL to the fine-tune, nats per token")
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        _label(axes, ends)
        _mark_rates(axes, some[0].parameters)
    return figure


def _draw_bound(axes: Axes, points: Sequence[Point]) -> None:
    """Draw the limit: the KL of our calibrated files at the bytes that they could have had."""
    own = [point for point in points if point.method == OWN[0] and point.found.get("bound_nbytes")]
    places = []
    for setting in dict.fromkeys(point.setting for point in own):
        some = [point for point in own if point.setting == setting]
        # What is not lossy, headers included, counts as it is.
        sizes = [p.nbytes - p.found["lossy_nbytes"] + p.found["bound_nbytes"] for p in some]
        places.append((np.exp(np.mean(np.log(sizes))), math.exp(np.mean([math.log(point.kl) for point in some]))))
    if places:
        x, y = zip(*sorted(places), strict=True)
        axes.plot(x, y, color="#999999", linewidth=5, alpha=0.5, zorder=0)
        axes.annotate(_BOUND, (x[0], y[0]), xytext=(0, 8), textcoords="offset points", color="#777777", fontsize=9)


def _label(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name the curves in a column at the right, in the order of their ends, with a thin line to each."""
    if not ends:
        return
    low, high = axes.get_xlim()
    bottom, top = (math.log10(limit) for limit in axes.get_ylim())
    step = (top - bottom) / 26
    heights: list[float] = []
    ordered = sorted(ends, key=lambda end: end[1])
    for _, kl, _, _ in ordered:
        heights.append(max(math.log10(kl), heights[-1] + step if heights else -math.inf))
    overflow = max(0.0, heights[-1] - top)
    place = high * (high / low) ** 0.02
    for (nbytes, kl, name, color), height in zip(ordered, heights, strict=True):
        y = 10 ** (height - overflow)
        axes.plot([nbytes, place], [kl, y], color=color, linewidth=0.5, alpha=0.6, clip_on=False)
        axes.text(place, y, f" {name}", color=color, fontsize=9, va="center")
    axes.set(xlim=(low, high), ylim=(10**bottom, 10**top))


def _mark_rates(axes: Axes, parameters: int) -> None:
    """Mark bits per parameter along the upper edge."""
    low, high = axes.get_xlim()
    for rate in (0.125, 0.25, 0.5, 1, 2, 4, 8):
        if low < rate * parameters / 8 < high:
            axes.annotate(
                f"{rate:g} b/p",
                (rate * parameters / 8, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, -10),
                textcoords="offset points",
                fontsize=8,
                color="#888888",
                ha="center",
            )
