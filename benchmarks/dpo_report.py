"""What `dpo.py` found, as a Markdown table and a picture."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from transfer_report import percent, stderr

from graftllm.storage import whole_file

AFTER_SFT = "SFT"
_TITLES = {
    "careless": "after SFT on whatever the source said",
    "verified": "after SFT on verified answers",
    "rotate, as published": "pairs of the prompts of the SFT",
}


@dataclass(frozen=True)
class Found:
    """One target after one stage, of one seed.

    Attributes:
        score: share of the test prompts answered right.
        pairs: that were learnt.
        chosen: mean log-ratio of held-out better answers to before the stage, nats; None where not measured.
        rejected: the same of the worse ones; the difference is the margin.
        preferred: share of the held-out pairs whose better answer gained more.
    """

    score: float
    pairs: int = 0
    chosen: float | None = None
    rejected: float | None = None
    preferred: float | None = None


def table(results: Mapping[int, Mapping[str, Found]]) -> str:
    """Return a row for each target and stage: mean and standard error over the seeds."""
    head = ["% right", "score", "beyond SFT", "pairs", "chosen, nats", "rejected, nats", "% preferred", "seeds"]
    lines = [_line(head), _line(["---"] * len(head))]
    for name in row_names(results):
        found = [seed[name] for seed in results.values() if name in seed]
        cells = [percent([one.score for one in found])]
        if name.endswith(f": {AFTER_SFT}"):
            cells += [""] * 5
        else:
            cells.append(percent(gains(results, name)))
            cells.append(f"{statistics.mean(one.pairs for one in found):.0f}")
            cells += [_nats([one.chosen for one in found]), _nats([one.rejected for one in found])]
            cells.append(percent([one.preferred for one in found if one.preferred is not None]))
        lines.append(_line([name, *cells, str(len(found))]))
    return "\n".join(lines) + "\n"


def row_names(results: Mapping[int, Mapping[str, Found]]) -> list[str]:
    """Return the names of the rows, in the order of the seed that has most."""
    fullest = max(results.values(), key=len)
    return list(dict.fromkeys([*fullest, *(name for found in results.values() for name in found)]))


def gains(results: Mapping[int, Mapping[str, Found]], name: str) -> list[float]:
    """Return by how much each seed's score is above that of its own SFT."""
    target = name.split(":")[0]
    return [seed[name].score - seed[f"{target}: {AFTER_SFT}"].score for seed in results.values() if name in seed]


def draw(results: Mapping[int, Mapping[str, Found]], path: Path) -> None:
    """Draw by how much each stage moves the score; bars are standard errors over the seeds, dots are seeds."""
    every = [name for name in row_names(results) if not name.endswith(f": {AFTER_SFT}")]
    targets = [target for target in _TITLES if any(name.startswith(f"{target}: ") for name in every)]
    figure = Figure(figsize=(13, 2.4), layout="constrained")
    for axes, target in zip(figure.subplots(1, len(targets), sharex=True, squeeze=False)[0], targets, strict=True):
        names = [name for name in every if name.startswith(f"{target}: ")][::-1]
        labels = []
        for place, name in enumerate(names):
            values = [100 * gain for gain in gains(results, name)]
            color = "#D55E00" if "DPO" in name else "#0072B2"
            error = stderr(values) if len(values) > 1 else None
            axes.barh(place, statistics.mean(values), xerr=error, color=color, capsize=2, height=0.7)
            axes.plot(values, [place] * len(values), "k.", markersize=3)
            labels.append(name.split(": ")[1] + (" (one seed)" if len(values) == 1 else ""))
        axes.set_yticks(range(len(names)), labels, fontsize=8)
        axes.set_title(_TITLES[target], fontsize=9)
        axes.set_xlabel("points beyond SFT", fontsize=8)
        axes.set_ylim(-0.6, 3.6)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:])


def _nats(measured: Sequence[float | None]) -> str:
    values = [value for value in measured if value is not None]
    if not values:
        return ""
    mean = f"{statistics.mean(values):+.2f}"
    return f"{mean} ± {stderr(values):.2f}" if len(values) > 1 else mean


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
