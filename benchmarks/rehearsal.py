"""That a zoo starts: a few steps of every training, on few rows, without waiting for what comes of it."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from graftllm.checkpoint import Checkpoint
from graftllm.demo import Member, Zoo, build_zoo, word_rows
from graftllm.stages import Stages
from graftllm.training.curves import curves_beside
from graftllm.training.tuning import Training, train_sft
from graftllm.training_options import SftOptions

_ROWS = 8  # in a step


def rehearse(directory: Path, zoo: Zoo, steps: int, *, seed: int = 0, device: str = "auto") -> Iterator[str]:
    """Train every model of a zoo, then the first of them on the first skill, for some steps; yield a line about each.

    Args:
        directory: gets nothing that stays.
        zoo: whose models.
        steps: of each training, with 8 rows each.
        seed: of weights, words and data order.
        device: `auto` takes a GPU when there is one.
    """
    home = directory / "rehearsal"
    try:
        for member in zoo.members:
            alone = replace(zoo, members=(_short(member, steps),), skills=(), general=(), test_prompts=0)
            started = time.monotonic()
            build_zoo(home, Stages(home / "stages" / member.name), alone, seed=seed, device=device)
            yield _line(home / member.name, started)
            if member is not zoo.members[0]:
                shutil.rmtree(home / member.name)
        task, _ = zoo.skills[0]
        out, started = home / f"{task.name}-tuned", time.monotonic()
        rows = word_rows(task, steps * _ROWS, seed=seed, answered=True)
        run = Training(home / zoo.members[0].name, out, seed, f"tuning on {task.name}", device=device)
        train_sft(run, rows, SftOptions(epochs=1, batch_size=_ROWS, learning_rate=1e-4, max_length=64))
        yield _line(out, started)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _short(member: Member, steps: int) -> Member:
    training = member.training.model_copy(update={"epochs": 1, "batch_size": _ROWS})
    return replace(member, lessons=((member.lessons[0][0], steps * _ROWS),), training=training)


def _line(model: Path, started: float) -> str:
    rows = [json.loads(line) for line in curves_beside(model)[0].read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return (
        f"{model.name}: {Checkpoint.open(model).parameters / 1e6:.0f} M parameters, {rows[-1]['step']} steps, "
        f"loss {losses[0]:.2f} to {losses[-1]:.2f}, {time.monotonic() - started:.0f} s with loading and saving"
    )
