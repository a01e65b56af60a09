"""A pack as one picture: rates and errors by layer and role, bytes by role, and strengths of directions."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from graftllm.evaluation.anatomy import (
    OTHER,
    Portion,
    by_layer,
    by_role,
    factor_values,
    out_of_proportion,
    portion,
    strengths,
)
from graftllm.evaluation.tables import printable
from graftllm.header import Header
from graftllm.progress import track
from graftllm.skillpack import SkillPack
from graftllm.storage import check_picture, whole_file

# Okabe and Ito's colors, which every common kind of color vision tells apart.
COLORS: Mapping[str, str] = {
    "embedding": "#E69F00",
    "head": "#CC79A7",
    "attention": "#0072B2",
    "mlp": "#D55E00",
    "expert": "#009E73",
    "norm": "#56B4E9",
    "bias": "#F0E442",
    "other": "#000000",
}
_LABELED = 12  # columns of a heat map up to which each has a label and numbers
_LINES = 8  # tensors of a role whose directions are drawn
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))

Cells = Mapping[str, Mapping[str, Portion]]


def draw_portrait(pack: SkillPack, path: Path) -> None:
    """Draw a pack's anatomy into a file.

    Raises:
        PackError: a payload is damaged.
        StorageError: as for `check_picture`, or the file cannot be written.
    """
    form = check_picture(path, read=[Path(pack.source)])
    header = pack.header
    layers = {layer: by_role(entries) for layer, entries in by_layer(header).items()}
    cells = {layer: {role: portion(some) for role, some in roles.items()} for layer, roles in layers.items()}
    roles = list(by_role(header.tensors.values()))
    figure = Figure(figsize=(13, 8), layout="constrained")
    (rates, errors), (sizes, directions) = figure.subplots(2, 2, height_ratios=(1, 1.2))
    _draw_rates(rates, cells, roles)
    _draw_errors(errors, cells, roles)
    _draw_sizes(sizes, header)
    _draw_directions(directions, pack)
    whole = portion(header.tensors.values())
    name = printable(header.card.name) or "unnamed"
    figure.suptitle(f"{name}: {whole.nbytes:,} payload bytes, {whole.rate:.2f} bits per parameter", parse_math=False)
    with whole_file(path) as out:
        figure.savefig(out, format=form, dpi=120)


def _draw_rates(axes: Axes, cells: Cells, roles: Sequence[str]) -> None:
    """Draw bits per parameter as a heat map; colors go by the logarithm, as norms take many times a matrix's bits."""
    grid = _grid(cells, roles, lambda one: one.rate)
    rates = grid[grid > 0]
    low, high = (rates.min(), rates.max()) if rates.size else (1, 1)
    bar = _draw_grid(axes, grid, cells, roles, LogNorm(low, max(high, 2 * low), clip=True), _short)
    bar.ax.yaxis.set_major_locator(LogLocator(2, subs=(1, 1.5)))
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    axes.set_title("Rate, bits per parameter")


def _draw_errors(axes: Axes, cells: Cells, roles: Sequence[str]) -> None:
    """Draw the median relative error of each role in each layer as a heat map."""
    grid = _grid(cells, roles, lambda one: one.median_error)
    bar = _draw_grid(axes, grid, cells, roles, Normalize(0, max(0.1, np.nanmax(grid, initial=0))), "{:.0%}".format)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("Relative error of the delta, median")


def _short(rate: float) -> str:
    return f"{rate:.1f}" if rate >= 1 else f"{rate:.2f}"


def _grid(cells: Cells, roles: Sequence[str], figure: Callable[[Portion], float]) -> np.ndarray:
    """Return one figure of each cell, shape (roles, layers); NaN where a layer has no such role."""
    return np.array([[figure(found[role]) if role in found else np.nan for found in cells.values()] for role in roles])


def _draw_grid(
    axes: Axes, grid: np.ndarray, cells: Cells, roles: Sequence[str], norm: Normalize, written: Callable[[float], str]
) -> Colorbar:
    """Draw a heat map, a column a layer and a row a role; with numbers in it when layers are few."""
    widths = [max(1, len(cells) // _LABELED) if layer == OTHER else 1 for layer in cells]
    edges = np.concatenate([[0], np.cumsum(widths)])
    middles = (edges[1:] + edges[:-1]) / 2
    drawn = axes.pcolormesh(edges, np.arange(len(roles) + 1), grid, norm=norm, cmap="cividis")
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(roles)) + 0.5, roles)
    stacked = any(" " in layer for layer in cells)  # names of stacks are long
    every = -(-len(cells) // (_LABELED // 2 if stacked else _LABELED))
    labels = {place: layer for place, layer in enumerate(cells) if place % every == 0 or layer == OTHER}
    axes.set_xticks(middles[list(labels)], [printable(layer) for layer in labels.values()])
    for label in axes.get_xticklabels():
        label.set_parse_math(False)
        label.set(rotation=20 if stacked else 0, ha="right" if stacked else "center")
    axes.set_xlabel("layer")
    if len(cells) <= _LABELED:
        for (row, column), found in np.ndenumerate(grid):
            if not np.isnan(found):
                color = "black" if norm(max(found, norm.vmin)) > 0.55 else "white"
                x, y = float(middles[column]), row + 0.5
                axes.text(x, y, written(found), ha="center", va="center", color=color, fontsize=9)
    return axes.figure.colorbar(drawn, ax=axes)


def _draw_sizes(axes: Axes, header: Header) -> None:
    """Draw the bytes of each role as bars, with the operators that hold them."""
    found = {role: portion(entries) for role, entries in by_role(header.tensors.values()).items()}
    whole = max(1, sum(one.nbytes for one in found.values()))
    unit, name = next(((size, name) for size, name in _UNITS if whole >= size), _UNITS[-1])
    widths = [one.nbytes / unit for one in found.values()]
    axes.barh(list(found), widths, color=[COLORS[role] for role in found])
    for place, one in enumerate(found.values()):
        operators = ", ".join(f"{count} {operator}" for operator, count in one.operators.items())
        label = f"{one.nbytes / whole:.1%}\n{operators}"
        axes.annotate(label, (one.nbytes / unit, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(
        title="Bytes by role and operator", xlabel=f"{name} of payloads", xlim=(0, 1.7 * max(widths, default=0) or 1)
    )


def _draw_directions(axes: Axes, pack: SkillPack) -> None:
    """Draw how strong the stored directions of some tensors of each role are, relative to the strongest."""
    names: dict[str, list[str]] = {}
    large = 0
    for name, entry in pack.header.tensors.items():
        if out_of_proportion(entry):
            large += 1
        elif factor_values(entry):
            names.setdefault(entry.role, []).append(name)
    some = {name: role for role, members in names.items() for name in _evenly(members)}
    title = "Directions of the factors" + (f"; {large} left out, far larger than their bytes" if large else "")
    axes.set(title=title, xlabel="direction, strongest first", ylabel="strength / strongest")
    if not some:
        axes.text(
            0.5,
            0.5,
            f"no{' other' if large else ''} tensor is stored as factors",
            ha="center",
            transform=axes.transAxes,
        )
        axes.set(xticks=[], yticks=[])
        return
    for name in track(list(some), label="reading directions"):
        found = strengths(pack, name)
        if found is not None and float(found[0]) > 0:
            axes.plot(np.arange(1, len(found) + 1), found / found[0], color=COLORS[some[name]], alpha=0.6, linewidth=1)
    axes.set(yscale="log", xlim=(0, None))
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    handles = [
        Line2D([], [], color=COLORS[role], label=f"{role} ({len(_evenly(members))} of {len(members)})")
        for role, members in names.items()
    ]
    axes.legend(handles=handles, frameon=False)


def _evenly(names: list[str]) -> list[str]:
    """Return at most `_LINES` names from first to last."""
    places = np.linspace(0, len(names) - 1, min(_LINES, len(names))).round().astype(int)
    return [names[place] for place in places]
