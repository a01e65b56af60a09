"""That a zoo starts: a few steps of every training, on few rows, without waiting for what comes of it."""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from large_zoo import ADDED_TOKENS

from graftllm.checkpoint import Checkpoint
from graftllm.demo import Member, WordTask, Zoo, build_zoo, word_rows
from graftllm.stages import Stages
from graftllm.training.curves import curves_beside
from graftllm.training.tuning import Training, train_sft
from graftllm.training_options import SftOptions

_ROWS = 2  # in a step


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a rehearsal to a benchmark's command line."""
    parser.add_argument("--steps", type=int, help="only take so many steps of every training, to see that it starts")
    parser.add_argument("--members", nargs="+", metavar="NAME", help="models that take them  [default: all]")


def rehearse(
    directory: Path,
    zoo: Zoo,
    steps: int,
    *,
    members: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Iterator[str]:
    """Train models of a zoo, then the target on a skill that adds tokens if one does; yield a line about each.

    Lines are kept, so a killed rehearsal goes on where it was; models are not.

    Args:
        directory: gets `rehearsal/`, where the lines are.
        zoo: whose models.
        steps: of each training, with 2 rows each.
        members: names of the models to train; all by default. The target is tuned when it is among them.
        seed: of weights, words and data order.
        device: `auto` takes a GPU when there is one.
    """
    home, models = directory / "rehearsal", directory / "rehearsal" / "models"
    stages, target = Stages(home / "stages"), zoo.members[0]
    wanted = [member for member in zoo.members if members is None or member.name in members]

    def start(member: Member) -> str:
        alone = replace(zoo, members=(_short(member, steps),), skills=(), general=(), test_prompts=0)
        started = time.monotonic()
        build_zoo(models, Stages(models / "stages" / member.name), alone, seed=seed, device=device)
        return _line(models / member.name, started)

    def tune(task: WordTask, added: tuple[str, ...]) -> str:
        if not (models / target.name).exists():  # a kept line has no model
            start(target)
        out, started = models / f"{task.name}-tuned", time.monotonic()
        rows = word_rows(task, steps * _ROWS, seed=seed, answered=True)
        run = Training(models / target.name, out, seed, f"tuning on {task.name}", added_tokens=added, device=device)
        options = SftOptions(epochs=1, batch_size=_ROWS, learning_rate=1e-4, max_length=target.training.max_length)
        train_sft(run, rows, options)
        return f"{_line(out, started)}, {len(added)} tokens added"

    try:
        for member in wanted:
            inputs = [steps, seed, _ROWS, member.config(400, 0, 1).to_dict(), [task.name for task, _ in member.lessons]]
            yield str(stages.run(f"start.{member.name}", inputs, [], lambda member=member: start(member)).result)
            if member is not target:
                shutil.rmtree(models / member.name, ignore_errors=True)
        if target in wanted:
            task = next((task for task, _ in zoo.skills if task.name in ADDED_TOKENS), zoo.skills[0][0])
            added = ADDED_TOKENS.get(task.name, ())
            inputs = [steps, seed, _ROWS, target.config(400, 0, 1).to_dict(), task.name, *added]
            yield str(stages.run(f"tune.{task.name}", inputs, [], lambda: tune(task, added)).result)
    finally:
        shutil.rmtree(models, ignore_errors=True)


def _short(member: Member, steps: int) -> Member:
    """Return a member that learns from a few rows of each lesson, for so many steps."""
    training = member.training.model_copy(update={"epochs": 1, "batch_size": _ROWS})
    each, more = divmod(steps * _ROWS, len(member.lessons))
    lessons = tuple((task, each + (i < more)) for i, (task, _) in enumerate(member.lessons))
    return replace(member, lessons=lessons, training=training)


def _line(model: Path, started: float) -> str:
    rows = [json.loads(line) for line in curves_beside(model)[0].read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return (
        f"{model.name}: {Checkpoint.open(model).parameters / 1e6:.0f} M parameters, {rows[-1]['step']} steps of "
        f"{_ROWS} rows, loss {losses[0]:.2f} to {losses[-1]:.2f}, {time.monotonic() - started:.0f} s with loading and "
        "saving"
    )
