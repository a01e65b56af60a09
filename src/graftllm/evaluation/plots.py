"""A report as plots: scores, forgetting, bytes by role, and the spectra of the deltas."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from graftllm.compression.lowrank import singular_values
from graftllm.compression.matrix import is_matrix, matrix_shape
from graftllm.compression.roles import role_of
from graftllm.delta import Delta
from graftllm.evaluation.report import Report
from graftllm.evaluation.scores import Score
from graftllm.storage import whole_file

PLOTS = {
    "scores.png": "Score of each skill: base, source, tuned, pack, routed",
    "forgetting.png": "Scores after each step of learning in one model, and of the grafted model",
    "bytes.png": "Bytes of each pack by role",
    "spectra.png": "Energy of each delta over its singular directions, by role",
}


def spectra(delta: Delta) -> dict[str, list[float]]:
    """Return, for each role, the share of energy that the leading share of singular directions holds.

    Of each role the middle parameter stands for the others; 65 points from no direction to all.
    """
    names: dict[str, list[str]] = {}
    for name, spec in delta.base.specs.items():
        if is_matrix(spec.shape, role := role_of(name, spec.shape)):
            names.setdefault(role, []).append(name)
    curves: dict[str, list[float]] = {}
    for role, members in names.items():
        change = delta[members[len(members) // 2]]
        energy = singular_values(change.reshape(matrix_shape(tuple(change.shape)))).double().square()
        kept = np.concatenate([[0.0], (energy.cumsum(0) / energy.sum().clamp(min=1e-300)).numpy()])
        curves[role] = np.interp(np.linspace(0, 1, 65), np.linspace(0, 1, len(kept)), kept).round(5).tolist()
    return curves


def draw_plots(report: Report, curves: Mapping[str, Mapping[str, Sequence[float]]], directory: Path) -> None:
    """Draw the plots named in `PLOTS` into a directory."""
    drawn = {
        "scores.png": _draw_scores(report),
        "forgetting.png": _draw_forgetting(report),
        "bytes.png": _draw_bytes(report),
        "spectra.png": _draw_spectra(curves),
    }
    for file, figure in drawn.items():
        with whole_file(directory / file) as out:
            figure.savefig(out, format="png", dpi=120, bbox_inches="tight")


def _draw_scores(report: Report) -> Figure:
    figure = Figure(figsize=(8, 3.2))
    axes = figure.subplots()
    series = ("base", "source", "tuned", "pack", "routed")
    for i, key in enumerate(series):
        values = [getattr(found, key) for found in report.skills.values()]
        errors = [Score(value, found.n).stderr for value, found in zip(values, report.skills.values(), strict=True)]
        places = np.arange(len(values)) + (i - 2) * 0.16
        axes.bar(places, values, 0.15, yerr=errors, label=key, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(report.skills)), list(report.skills))
    axes.set(ylabel="share of right answers", ylim=(0, 1.05))
    axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return figure


def _draw_forgetting(report: Report) -> Figure:
    found = report.forgetting
    figure = Figure(figsize=(1.2 * len(found.columns) + 2.5, 0.5 * len(found.rows) + 0.8))
    axes = figure.subplots()
    axes.imshow(found.scores, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(found.columns)), found.columns)
    axes.set_yticks(range(len(found.rows)), found.rows)
    axes.xaxis.tick_top()
    for i, row in enumerate(found.scores):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    return figure


def _draw_bytes(report: Report) -> Figure:
    figure = Figure(figsize=(8, 0.5 * len(report.packs) + 1))
    axes = figure.subplots()
    left = np.zeros(len(report.packs))
    for role in sorted({role for found in report.packs.values() for role in found.bytes_by_role}):
        widths = np.array([found.bytes_by_role.get(role, 0) / 1e3 for found in report.packs.values()])
        axes.barh(list(report.packs), widths, left=left, label=role)
        left += widths
    whole = np.array([found.file_bytes / 1e3 for found in report.packs.values()])
    axes.barh(list(report.packs), whole - left, left=left, label="headers", color="lightgray")
    axes.set(xlabel="kB")
    axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return figure


def _draw_spectra(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    figure = Figure(figsize=(3.2 * len(curves), 2.8))
    all_axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (skill, roles) in zip(all_axes, curves.items(), strict=True):
        for role, curve in roles.items():
            axes.plot(np.linspace(0, 1, len(curve)), curve, label=role)
        axes.set(title=skill, xlabel="share of directions", xlim=(0, 1), ylim=(0, 1.02))
    all_axes[0].set_ylabel("share of energy")
    all_axes[-1].legend(loc="lower right", frameon=False)
    return figure
