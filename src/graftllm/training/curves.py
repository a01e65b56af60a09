"""What a training's figures were, step by step: as rows of JSON and as a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from graftllm.storage import whole_file, write_text

NAMES = {
    "step": "step",
    "epoch": "epoch",
    "loss": "loss",
    "eval_loss": "held_out_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "rewards/margins": "reward_margin",
    "eval_rewards/margins": "held_out_reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "eval_rewards/accuracies": "held_out_reward_accuracy",
}
_PANELS = ("loss", "reward_margin", "reward_accuracy", "learning_rate")


def curves_beside(out: Path) -> tuple[Path, Path]:
    """Return where the figures of the training that writes `out` are kept, and their picture."""
    return out.with_name(f"{out.name}.curves.jsonl"), out.with_name(f"{out.name}.curves.png")


def write_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write what a trainer logged as JSON, a row for each time; only what `NAMES` has, under its names there."""
    rows = [{ours: entry[theirs] for theirs, ours in NAMES.items() if theirs in entry} for entry in history]
    told = [row for row in rows if row.keys() & {"loss", "held_out_loss"}]
    write_text(path, "".join(json.dumps(row) + "\n" for row in told))


def draw_curves(rows: Path, picture: Path, title: str) -> None:
    """Draw the rows that `write_curves` wrote: loss and learning rate, and of DPO margins and accuracy of rewards."""
    entries = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    panels = [name for name in _PANELS if any(name in entry for entry in entries)]
    figure = Figure(figsize=(3.4 * max(1, len(panels)), 2.8))
    for axes, name in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        for key, label in ((name, "learnt"), (f"held_out_{name}", "held out")):
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 12 else None)
        axes.set(title=name.replace("_", " "), xlabel="step")
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    with whole_file(picture) as out:
        figure.savefig(out, format="png", dpi=120)
