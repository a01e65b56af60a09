"""Rivals that learn skill after skill in one model: experience replay, and model grafting.

Both are variants of sequential fine-tuning: one mixes old rows in, the other keeps few of the changes.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from graftllm.checkpoint import Checkpoint, write_checkpoint
from graftllm.delta import Delta
from graftllm.evaluation.scores import Measured
from graftllm.pipeline.measuring import answering, measure
from graftllm.pipeline.preparing import digest_of, prompts_of
from graftllm.pipeline.transfer import tune
from graftllm.pipeline.work import GENERAL, Work
from graftllm.records import Prompt, read_pairs, read_prompts, write_rows
from graftllm.stages import Stages, Stamp

REPLAYED = 0.5  # share of the rows of a step that are old
GRAFTED = 0.1  # share of the parameters that a step may change

Row = TypeVar("Row")


def replay(work: Work, trained: Mapping[str, Stamp], packed: Mapping[str, Stamp]) -> dict[str, Measured]:
    """Fine-tune one model on skill after skill; half of each step's rows are of old skills and general tasks.

    Each step has as many rows and pairs as the skill has itself, so that as much is trained as without replay. The
    general rows are the recipe's general prompts that have references.
    """
    names = list(work.recipe.skills)
    here = work.directory / "baselines" / "replay"
    mixed = Work(work.recipe, here, Stages(here / "stages"), work.device)
    model, measured = Path(work.target.path), {}
    for step, name in enumerate(names):
        files = [mixed.skill(name) / file for file in ("sft.jsonl", "pairs.jsonl")]
        inputs = [*(trained[other] for other in names[: step + 1]), digest_of(prompts_of(work, GENERAL))]
        inputs += [work.recipe.seed, REPLAYED]
        mixed.stages.run(f"mix.{name}", inputs, files, partial(_mix_rows, work, names[: step + 1], files))
        stamp = tune(mixed, name, model, mixed.tuned(name), name=f"replay.{name}")
        model = mixed.tuned(name)
        measured[f"replay.{step}"] = _measured(work, f"replay.{name}", stamp, model)
    return measured


def _mix_rows(work: Work, names: Sequence[str], files: Sequence[Path]) -> None:
    """Write the rows and pairs of a step to `files`; the step's skill is the last of `names`."""
    general = [row for row in read_prompts(prompts_of(work, GENERAL)) if row.reference is not None]
    homes = [work.skill(name) for name in names]
    rows = [read_prompts(home / "sft.jsonl") for home in homes]
    # Files without ids number their rows alike.
    *rows, general = [
        [replace(row, id=f"{name}/{row.id}") for row in some]
        for name, some in zip((*names, GENERAL), (*rows, general), strict=True)
    ]
    pairs = [read_pairs(home / "pairs.jsonl") if (home / "pairs.jsonl").exists() else [] for home in homes]
    old = [some for some in (*rows[:-1], general) if some]
    write_rows(files[0], map(_answered, mix(rows[-1], old, seed=work.recipe.seed)))
    write_rows(files[1], mix(pairs[-1], [some for some in pairs[:-1] if some], seed=work.recipe.seed))


def mix(new: Sequence[Row], old: Sequence[Sequence[Row]], *, seed: int) -> list[Row]:
    """Return as many rows as there are new ones, half of them old: equally many of each old set.

    Args:
        new: rows of a step.
        old: rows of what came before, by set; without any, the new rows alone are returned.
        seed: of the draws.
    """
    draw = random.Random(seed)
    share = int(len(new) * REPLAYED) // len(old) if old else 0
    recalled = [row for rows in old for row in draw.sample(list(rows), min(share, len(rows)))]
    return draw.sample(list(new), len(new) - len(recalled)) + recalled


def grafting(work: Work, trained: Mapping[str, Stamp], packed: Mapping[str, Stamp]) -> dict[str, Measured]:
    """Fine-tune one model on skill after skill; of each step only the tenth of the changes that is largest is kept.

    The choice is that of magnitude pruning over the whole model; model grafting (arXiv 2302.06600) learns which.
    """
    names = list(work.recipe.skills)
    here = work.directory / "baselines" / "grafting"
    model, measured = Path(work.target.path), {}
    for step, name in enumerate(names):
        if step == 0:
            tuned, stamp = work.tuned(name), trained[name]
        else:
            tuned = here / f"{step}-{name}"
            stamp = tune(work, name, model, tuned, name=f"grafting.{name}")
        out = here / f"{step}-{name}.grafted"
        action = partial(keep_most_changed, model, tuned, out, GRAFTED)
        stamp = work.stages.run(f"graft.{name}", [stamp, GRAFTED], [out], action)
        model = out
        measured[f"grafting.{step}"] = _measured(work, f"grafting.{name}", stamp, model)
    return measured


def keep_most_changed(before: Path, after: Path, out: Path, density: float) -> None:
    """Write a checkpoint that has the new value where a parameter changed most, and the old one elsewhere.

    Args:
        before: checkpoint directory.
        after: checkpoint directory of the same shapes.
        out: checkpoint directory to write.
        density: share of the parameters, over the whole model, that are taken from `after`.
    """
    old, new = Checkpoint.open(before), Checkpoint.open(after)
    delta = Delta(old, new)
    sizes = torch.cat([delta[name].abs().flatten() for name in old.names()])
    count = round(density * len(sizes))
    bound = float(sizes.kthvalue(len(sizes) - count).values) if 0 < count < len(sizes) else -1.0 if count else torch.inf

    def tensor(name: str) -> Tensor:
        return torch.where(delta[name].abs() > bound, new.tensor(name), old.tensor(name))

    write_checkpoint(old, out, tensor)


def _measured(work: Work, name: str, stamp: Stamp, model: Path) -> Measured:
    sets = [*work.recipe.skills, GENERAL]
    return measure(work, name, [stamp], sets, partial(answering, work, model))


def _answered(row: Prompt) -> Prompt:
    """Return a row to train on: its reference becomes the assistant's answer if it has none."""
    if row.messages[-1]["role"] == "assistant":
        return row
    answer: Any = {"role": "assistant", "content": row.answer}
    return Prompt(row.id, (*row.messages, answer), row.task, row.reference)
