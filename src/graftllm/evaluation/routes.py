"""Where a grafted model sends prompts: accuracy, confusion matrix, coverage and risk, and kinds never seen."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from graftllm.evaluation.scores import Score
from graftllm.evaluation.tables import Grid
from graftllm.evaluation.tasks import read_tasks
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.routes import BASE
from graftllm.fusion.routing import Router
from graftllm.storage import check_picture, whole_file

COVERAGES = (1.0, 0.99, 0.95, 0.9, 0.8, 0.5)
_MOST_UNKNOWN = 4


@dataclass(frozen=True)
class Choice:
    """Where one prompt went.

    Attributes:
        confidence: probability of the class that it went to; 1 for a rule.
        right: whether it belongs there.
        likely: whether the probabilities decided; not where a rule did, or the prompt was unlike the pack's own.
    """

    confidence: float
    right: bool
    likely: bool = True


@dataclass(frozen=True)
class RouterResult:
    """What a router did with prompts whose right packs are known.

    Attributes:
        classes: `base`, then the packs.
        confusion: by the right class, how many prompts went to each class.
        reasons: how many prompts were decided by the router, a rule, or left to the base as unsure or unknown.
        choices: for each prompt, most confident first.
        tasks: of the prompts that are taken to belong to the base, how many are of each task.
        unknown: share of a pack's examples that a router without this pack still sends to another, for some packs.
        stated: what the router's file says of it; empty without a router.
    """

    classes: Sequence[str]
    confusion: Mapping[str, Mapping[str, int]]
    reasons: Mapping[str, int]
    choices: Sequence[Choice]
    tasks: Mapping[str, int]
    unknown: Mapping[str, float]
    stated: Mapping[str, Any]

    @property
    def accuracy(self) -> Score:
        """Share of prompts that went where they belong."""
        return Score(sum(choice.right for choice in self.choices) / len(self.choices), len(self.choices))

    @property
    def calibration_error(self) -> float:
        """Mean distance of confidence and accuracy over ten bins of confidence (expected calibration error).

        Of the prompts that probabilities decided about; 0 where they did of none.
        """
        likely = [choice for choice in self.choices if choice.likely]
        bins: dict[int, list[Choice]] = {}
        for choice in likely:
            bins.setdefault(min(9, int(10 * choice.confidence)), []).append(choice)
        off = (abs(sum(one.confidence - one.right for one in part)) for part in bins.values())
        return sum(off) / max(1, len(likely))

    def risk(self, coverage: float) -> tuple[float, float]:
        """Return the confidence that this share of the prompts reaches, and the share of wrong choices among them.

        Of prompts with that very confidence any may be among them, so the share is what to expect.
        """
        count = max(1, math.ceil(coverage * len(self.choices)))
        return self.choices[count - 1].confidence, float(self.risks()[count - 1])

    def risks(self) -> np.ndarray:
        """Return the share of wrong choices among the most confident one, two, three and so on."""
        wrong: list[float] = []
        for _, group in groupby(self.choices, key=lambda choice: choice.confidence):
            tied = [not choice.right for choice in group]
            wrong += [sum(tied) / len(tied)] * len(tied)
        return np.cumsum(wrong) / np.arange(1, len(wrong) + 1)

    def figures(self) -> dict[str, Any]:
        """Return what `graftllm eval --router --json` prints."""
        accuracy = self.accuracy
        return {
            "accuracy": accuracy.value,
            "n": accuracy.n,
            "stderr": accuracy.stderr,
            "calibration_error": self.calibration_error,
            "confusion": {name: dict(row) for name, row in self.confusion.items()},
            "reasons": dict(self.reasons),
            "base_tasks": dict(self.tasks),
            "coverage_risk": [[coverage, *self.risk(coverage)] for coverage in COVERAGES],
            "unknown_accepted": dict(self.unknown),
            "router": dict(self.stated),
        }

    def grids(self) -> list[Grid]:
        """Return the confusion matrix, and coverage against risk."""
        rows = [[name, *(str(row.get(chosen, 0)) for chosen in self.classes)] for name, row in self.confusion.items()]
        levels = [(coverage, *self.risk(coverage)) for coverage in COVERAGES]
        return [
            Grid("Confusion matrix", ["belongs to \\ went to", *self.classes], rows),
            Grid(
                "Coverage and risk",
                ["most confident", "confidence from", "wrong"],
                [[f"{coverage:.0%}", f"{least:.3f}", f"{risk:.2%}"] for coverage, least, risk in levels],
            ),
        ]

    def sentences(self) -> list[str]:
        """Return what the tables do not say, a line each."""
        accuracy = self.accuracy
        lines = [
            f"{accuracy.value:.2%} ± {accuracy.stderr:.2%} of {accuracy.n} prompts went where they belong; "
            f"calibration error {self.calibration_error:.3f}.",
            "decided by " + ", ".join(f"{reason} {count}" for reason, count in self.reasons.items()),
        ]
        if self.tasks:
            told = ", ".join(f"{task or 'no task'} {count}" for task, count in self.tasks.items())
            lines.append(f"taken to belong to the base, since no pack has the name of their task: {told}")
        if self.stated:
            lines.append(
                f"stated: {self.stated['accuracy']:.2%} of the {self.stated['examples']} examples right when held out, "
                f"at most {self.stated['false_accept']:.2%} of fresh general prompts expected to go to a pack "
                f"({self.stated['false_accept_limit']:.2%} asked for); threshold "
                f"{self.stated['threshold']:.3f}, temperature {self.stated['temperature']:.2f}"
            )
        if self.unknown:
            told = ", ".join(f"{name} {share:.1%}" for name, share in self.unknown.items())
            lines.append(f"a pack's examples that other packs take when the router does not know it: {told}")
        return lines


def evaluate_router(directory: Path, tasks: Sequence[Path], *, device: str = "auto") -> RouterResult:
    """Compare where a grafted model sends prompts with where they belong.

    Args:
        directory: a grafted model.
        tasks: JSONL of prompt rows; a row whose `task` is a pack's name belongs to that pack, others to the base.
        device: `auto` takes a GPU when there is one.

    Raises:
        GraftError: the directory or a file cannot be used, or there is neither router nor rule for a prompt.
    """
    rows = read_tasks(tasks)
    grafted = GraftedModel.load(directory, device=device)
    labels = [row.task if row.task in grafted.packs else BASE for row in rows]
    routes = grafted.route([row.question for row in rows])
    classes = [BASE, *grafted.packs]
    confusion = {name: Counter[str]() for name in classes if name in labels}
    for label, route in zip(labels, routes, strict=True):
        confusion[label][route.name] += 1
    choices = [
        Choice(route.probabilities.get(route.name, 1.0), route.name == label, route.reason in ("router", "unsure"))
        for label, route in zip(labels, routes, strict=True)
    ]
    return RouterResult(
        classes,
        confusion,
        Counter(route.reason for route in routes),
        sorted(choices, key=lambda choice: -choice.confidence),
        Counter(row.task for row, label in zip(rows, labels, strict=True) if label == BASE and row.task != BASE),
        {} if grafted.router is None else unknown_accepted(grafted.router),
        {} if grafted.router is None else _stated(grafted.router),
    )


def unknown_accepted(router: Router) -> dict[str, float]:
    """Return which share of a pack's examples goes to other packs when the router was never trained for it.

    Of many packs, four stand for the others. A router of one pack has nothing to leave out.
    """
    if len(router.packs) < 2:
        return {}
    some = router.packs[:: math.ceil(len(router.packs) / _MOST_UNKNOWN)]
    found = {name: router.without(name).route(router.examples[name].features) for name in some}
    return {name: sum(route.name != BASE for route in routes) / len(routes) for name, routes in found.items()}


def draw_router(result: RouterResult, path: Path) -> None:
    """Draw the confusion matrix, and risk against coverage, into a .png, .svg or .pdf file.

    Raises:
        StorageError: as for `check_picture`, or the file cannot be written.
    """
    form = check_picture(path)
    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    counts = np.array([[row.get(name, 0) for name in result.classes] for row in result.confusion.values()])
    left.imshow(counts / counts.sum(axis=1, keepdims=True), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    left.set_xticks(range(len(result.classes)), result.classes, rotation=45 if len(result.classes) > 6 else 0)
    left.set_yticks(range(len(result.confusion)), list(result.confusion))
    left.set(xlabel="went to", ylabel="belongs to")
    if counts.size <= 400:
        for (i, j), count in np.ndenumerate(counts):
            left.text(j, i, str(count), ha="center", va="center", color="white" if 2 * count > counts[i].sum() else "k")
    risks = result.risks()
    right.plot(np.arange(1, len(risks) + 1) / len(risks), 100 * risks)
    right.set(xlabel="coverage: share of prompts, most confident first", ylabel="wrong choices, %", xlim=(0, 1.01))
    right.set_ylim(bottom=0)
    figure.tight_layout()
    with whole_file(path) as out:
        figure.savefig(out, format=form, dpi=110)


def _stated(router: Router) -> dict[str, Any]:
    return {
        **asdict(router.calibration),
        "false_accept": router.false_accept,
        "false_accept_limit": router.options.false_accept,
        "accuracy": router.accuracy,
        "examples": sum(map(len, router.examples.values())),
        "layer": router.options.layer,
        "packs": list(router.packs),
    }
