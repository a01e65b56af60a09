"""What making a pack took, stage by stage, for its header: from a run's stamps and the rows that were learnt from."""

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import reduce
from operator import add
from pathlib import Path

from graftllm.header import Card, Overhead
from graftllm.loading import load_tokenizer
from graftllm.metering import Spent
from graftllm.pipeline.work import Work
from graftllm.records import Message, Prompt, read_pairs, read_prompts, read_responses
from graftllm.rendering import render_answered
from graftllm.skillpack import SkillPack
from graftllm.training_options import TrainingOptions


def with_room(work: Work, skill: str, card: Card) -> Card:
    """Return a card with overheads that take as many bytes as any: what is packed with it fits a budget when signed."""
    draw = random.Random(0)  # digits that do not compress

    def longest() -> Overhead:
        seconds, cpu, gpu = (round(draw.uniform(1e7, 1e8), 2) for _ in range(3))
        memory, gpu_memory, tokens = (draw.randrange(10**13, 10**14) for _ in range(3))
        return _told(Spent(seconds, cpu, gpu, memory, gpu_memory), tokens)

    return card.model_copy(update={"overheads": {kind: longest() for kind in (*_stages(work, skill), "pack")}})


def sign(work: Work, skill: str, pack: SkillPack, path: Path) -> SkillPack:
    """Write into a pack's header what its stages took, the one under way (`pack.SKILL`) up to now; return the pack."""
    found = {
        kind: _rounded(reduce(add, (work.stages.used[name].spent for name in names)), _tokens(work, skill, kind))
        for kind, names in _stages(work, skill).items()
    }
    found["pack"] = _rounded(work.stages.spent_on(f"pack.{skill}"), 0)
    card = pack.header.card.model_copy(update={"overheads": found})
    replace(pack, header=pack.header.model_copy(update={"card": card})).save(path)
    return SkillPack.load(path)


def _rounded(spent: Spent, tokens: int) -> Overhead:
    """Return what was spent in three digits each, and the tokens in four: a header says it in a few bytes."""
    figures = {name: type(value)(float(f"{value:.3g}")) for name, value in asdict(spent).items()}
    return _told(Spent(**figures), int(float(f"{tokens:.4g}")))


def _told(spent: Spent, tokens: int) -> Overhead:
    return Overhead(**asdict(spent), tokens=tokens)


def _stages(work: Work, skill: str) -> dict[str, list[str]]:
    """Return by kind the stages that made a skill's tuned checkpoint, those that the run has needed."""
    sources = [f"sample.{skill}.{source.name}" for source in work.recipe.skills[skill].sources]
    kinds = {
        "sample": [f"prepare.{skill}.prompts", *sources, f"sample.{skill}"],
        "score": [f"judge.{skill}", f"score.{skill}"],
        **{kind: [f"{kind}.{skill}"] for kind in ("sft", "own", "dpo", "merge")},
    }
    used = {kind: [name for name in names if name in work.stages.used] for kind, names in kinds.items()}
    return {kind: names for kind, names in used.items() if names}


def _tokens(work: Work, skill: str, kind: str) -> int:
    home, recipe = work.skill(skill), work.recipe
    if kind == "sample":
        return sum(row.output_tokens for row in read_responses(home / "responses.jsonl"))
    if kind == "own":
        return sum(row.output_tokens for row in read_responses(home / "pairs.responses.jsonl"))
    if kind == "sft":
        return tokens_trained(work.target.path, read_prompts(home / "sft.jsonl"), recipe.sft)
    if kind == "dpo" and recipe.dpo is not None:
        pairs = read_pairs(home / "pairs.jsonl")
        answers = [(pair.messages, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
        rows = [Prompt("", (*asked, Message(role="assistant", content=text))) for asked, text in answers]
        return tokens_trained(work.target.path, rows, recipe.dpo)
    return 0


def tokens_trained(model: Path, rows: Sequence[Prompt], options: TrainingOptions) -> int:
    """Return how many tokens training on rows reads, over all epochs; longer rows are cut.

    Args:
        model: checkpoint directory whose tokenizer counts.
        rows: answered ones; of a preference pair, one with each answer.
        options: how long and how often.
    """
    tokenizer = load_tokenizer(model)
    lengths = (len(render_answered(tokenizer, row)[0]) for row in rows)
    return round(options.epochs * sum(min(length, options.max_length) for length in lengths))
