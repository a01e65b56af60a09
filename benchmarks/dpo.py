"""Where DPO pays: a preference stage after SFT on verified answers, and after SFT on whatever the source said.

    python benchmarks/dpo.py [--seeds 0 1 2] [--dir runs/dpo] [--targets careless verified] [--stages dpo sft-own ...]
        [--reuse DIR ...] [--size small|large] [--device auto] [--image docs/images/dpo-scores.png]

One skill (move the first letter of a word to the end) whose source is right less than half the time. Half of the
prompts are for SFT, half for pairs. The `verified` target learns the source's right answers, the `careless` one its
first answer to every prompt, right or wrong. Then each of `STAGES` goes on from there: DPO on pairs of the source's
answers or of the model's own, with and without an SFT term, and, to see what the pairs' worse answers are good for, SFT
on the better ones alone. Everything is a stage, and rows are kept: a killed run goes on where it was.

Of finished fine-tunes in the directories to reuse (`skills/*/tuned.sft`, and `tuned` by DPO from there, on pairs of the
source's answers to the prompts of the SFT: the published way) both are scored, too.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from dpo_report import AFTER_SFT, Found, draw, table
from fusion_models import ROTATE, SIZES
from transfer_models import answered, first_answers, open_setting

from graftllm.demo import word_rows
from graftllm.evaluation.scores import evaluate
from graftllm.fusion.search import answer_loss
from graftllm.loading import load_model, load_tokenizer
from graftllm.pipeline.measuring import answering, measure
from graftllm.pipeline.own import own_pairs
from graftllm.pipeline.preparing import prompts_of
from graftllm.pipeline.transfer import score
from graftllm.pipeline.work import Work
from graftllm.recipe import Recipe
from graftllm.records import PreferencePair, Prompt, read_pairs, read_prompts, read_responses, write_rows
from graftllm.sampling.pairs import preference_pairs, prompts_for_pairs
from graftllm.stages import Stamp
from graftllm.storage import only_writer, write_text
from graftllm.training.tuning import Training, train_dpo, train_sft
from graftllm.training_options import DpoOptions, SftOptions
from graftllm.transfer_options import PairOptions

SKILL = ROTATE.name
PROMPTS = 2400
HELD_OUT = 8  # every eighth pair is not learnt but measured
TARGETS = ("careless", "verified")
_DPO = DpoOptions(epochs=2, batch_size=32, learning_rate=2e-4, max_length=64, sft_weight=1.0)
_ALONE = DpoOptions(epochs=2, batch_size=32, learning_rate=1e-4, max_length=64)
_MORE = SftOptions(epochs=2, batch_size=32, learning_rate=2e-4, max_length=64)


@dataclass(frozen=True)
class Stage:
    """What goes on from SFT: on whose pairs, and how; `key` names it on the command line."""

    key: str
    name: str
    pairs: Literal["own", "source"]
    options: DpoOptions | SftOptions


STAGES = (
    Stage("dpo", "DPO + SFT term, own pairs", "own", _DPO),
    Stage("sft-own", "SFT on the better answers of own pairs", "own", _MORE),
    Stage("dpo-alone", "DPO alone, own pairs", "own", _ALONE),
    Stage("dpo-source", "DPO + SFT term, source's pairs", "source", _DPO),
)


SIZED = {
    "small": STAGES,
    "large": tuple(
        replace(
            stage,
            options=stage.options.model_copy(
                update={"learning_rate": stage.options.learning_rate / 20, "max_length": 128}
            ),
        )
        for stage in STAGES
    ),
}


def measure_seed(work: Work, targets: Sequence[str], stages: Sequence[str], size: str = "small") -> dict[str, Found]:
    """Measure what is wanted of one seed and not kept yet; return all that is there, by `TARGET: STAGE`."""
    found = {}
    for target in TARGETS:
        for stage in (None, *SIZED[size]):
            path = work.directory / "rows" / f"{target}-{stage.key if stage else 'start'}.json"
            name = f"{target}: {stage.name if stage else AFTER_SFT}"
            if path.exists():
                found[name] = Found(**json.loads(path.read_text(encoding="utf-8")))
            elif target in targets and (stage is None or stage.key in stages):
                found[name] = _reached(work, target, stage)
                write_text(path, json.dumps(vars(found[name]), indent=1))
                print(f"{work.directory.name}: {name}: {found[name]}", flush=True)
    return found


def _reached(work: Work, target: str, stage: Stage | None) -> Found:
    """Return what a target reaches by SFT, or by a stage after it."""
    home = work.directory / target
    start = home / "sft"
    sft = _supervised(work, target, score(work, SKILL), start)
    if stage is None:
        return Found(_scored(work, f"{target}.sft", sft, start))
    own = own_pairs(work, SKILL, sft, home / "own.jsonl", model=start, adapted=None, name=target)
    mine = read_pairs(home / "own.jsonl")
    pairs = mine if stage.pairs == "own" else _source_pairs(work)
    learnt, out = [pair for i, pair in enumerate(pairs) if i % HELD_OUT], home / stage.key
    action = partial(_go_on, work, start, out, stage, learnt)
    stamp = work.stages.run(f"{stage.key}.{target}", [own, stage.options, len(learnt)], [out], action)
    value = _scored(work, f"{target}.{stage.key}", stamp, out)
    return Found(value, len(learnt), **margins(start, out, mine[::HELD_OUT]))


def published(work: Work, finished: Path) -> dict[str, Found]:
    """Score the fine-tunes of a finished run before and after its DPO, by `SKILL, as published: STAGE`."""
    found = {}
    for before in sorted(finished.glob("skills/*/tuned.sft")):
        skill, pairs = before.parent.name, len(read_pairs(before.with_name("pairs.jsonl")))
        tests = read_prompts(finished / "zoo" / "prompts" / f"{skill}.test.jsonl")
        for stage, model, count in ((AFTER_SFT, before, 0), ("DPO, source's pairs", before.with_name("tuned"), pairs)):
            path = work.directory / "rows" / f"published-{skill}-{model.name}.json"
            if not path.exists():
                value = evaluate(answering(work, model), tests, "exact").value
                write_text(path, json.dumps(vars(Found(value, count)), indent=1))
            found[f"{skill}, as published: {stage}"] = Found(**json.loads(path.read_text(encoding="utf-8")))
    return found


def _supervised(work: Work, target: str, scored: Stamp, out: Path) -> Stamp:
    """Train the target on the source's right answers, or for `careless` on its first ones."""

    def action() -> None:
        rows = read_prompts(work.skill(SKILL) / "sft.jsonl")
        if target == "careless":
            prompts = read_prompts(prompts_of(work, SKILL))
            kept = {prompt.id for prompt in prompts_for_pairs(prompts, work.pairs(SKILL))}
            responses = read_responses(work.skill(SKILL) / "responses.jsonl")
            rows = first_answers([prompt for prompt in prompts if prompt.id not in kept], responses)
        run = Training(Path(work.target.path), out, work.recipe.seed, f"SFT {target}", device=work.device)
        train_sft(run, rows, work.recipe.sft)

    return work.stages.run(f"{target}.sft", [scored, work.recipe.sft, work.recipe.seed], [out], action)


def _source_pairs(work: Work) -> list[PreferencePair]:
    """Return the pairs of the source's answers, to the same prompts as the model's own."""
    prompts, responses = read_prompts(prompts_of(work, SKILL)), read_responses(work.skill(SKILL) / "scored.jsonl")
    options = work.pairs(SKILL).model_copy(update={"preference": "same_source"})
    return preference_pairs(prompts, responses, options).pairs


def _go_on(work: Work, start: Path, out: Path, stage: Stage, pairs: Sequence[PreferencePair]) -> None:
    run = Training(start, out, work.recipe.seed, stage.name, device=work.device)
    if isinstance(stage.options, DpoOptions):
        train_dpo(run, pairs, stage.options)
    else:
        rows = [answered(Prompt(pair.prompt_id, pair.messages, SKILL), pair.chosen) for pair in pairs]
        train_sft(run, rows, stage.options)


def _scored(work: Work, name: str, stamp: Stamp, model: Path) -> float:
    return measure(work, name, [stamp], [SKILL], partial(answering, work, model))[SKILL].value


def margins(before: Path, after: Path, pairs: Sequence[PreferencePair]) -> dict[str, float]:
    """Return how far pairs moved from one checkpoint to another: mean log-ratios of both answers, nats an answer."""
    words = load_tokenizer(before)
    old, new = load_model(before), load_model(after)
    moved: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for pair in pairs:
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            row = answered(Prompt(pair.prompt_id, pair.messages), text)
            tokens = len(cast(Any, words(text, add_special_tokens=False))["input_ids"]) + 1  # the end of the turn
            moved[side].append(tokens * (answer_loss(old, words, [row]) - answer_loss(new, words, [row])))
    chosen, rejected = (torch.tensor(moved[side]) for side in ("chosen", "rejected"))
    preferred = float((chosen > rejected).float().mean())
    return {"chosen": float(chosen.mean()), "rejected": float(rejected.mean()), "preferred": preferred}


def _open(where: Path, seed: int, *, size: str, reuse: Path | None, device: str) -> Work:
    """Return the transfer's recipe with one skill, more prompts for it, and pairs of its own answers."""
    setting = open_setting(where, seed, size=size, reuse=reuse, device=device)
    work, file = setting.work, setting.work.directory / "prompts.jsonl"
    if not file.exists():
        task = next(task for task, _ in SIZES[size].skills if task.name == SKILL)
        write_rows(file, word_rows(task, PROMPTS, seed=seed + 1))
    pairs = PairOptions(preference="on_policy", sft_share=0.5)
    whole = work.recipe.model_dump(mode="json")
    skill = whole["skills"][SKILL] | {"prompts": str(file), "pairs": pairs.model_dump(mode="json")}
    recipe = Recipe.model_validate(whole | {"name": "dpo", "skills": {SKILL: skill}})
    return Work(recipe, work.directory, work.stages, work.device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for and write `results.md`, `results.json` and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/dpo"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    keys = [stage.key for stage in STAGES]
    parser.add_argument("--stages", nargs="*", choices=keys, default=keys)
    parser.add_argument("--reuse", nargs="*", type=Path, default=[], help="directories with zoos, one for each seed")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--image", type=Path, help="where the picture goes  [default: DIR/scores.png]")
    given = parser.parse_args(arguments)
    results: dict[int, dict[str, Found]] = {}
    for i, seed in enumerate(given.seeds):
        where = given.dir / (f"seed{seed}" if given.size == "small" else f"{given.size}-seed{seed}")
        reuse = given.reuse[i] if i < len(given.reuse) else None
        with only_writer(where):
            work = _open(where, seed, size=given.size, reuse=reuse, device=given.device)
            results[seed] = measure_seed(work, given.targets, given.stages, given.size)
            results[seed] |= {} if reuse is None else published(work, reuse)
        text = table(results)
        content = {seed: {name: vars(one) for name, one in found.items()} for seed, found in results.items()}
        write_text(given.dir / "results.json", json.dumps(content, indent=1))
        write_text(given.dir / "results.md", text)
        draw(results, given.image or given.dir / "scores.png")
        print(text, flush=True)


if __name__ == "__main__":
    main()
