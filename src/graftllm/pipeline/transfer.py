"""From a source's answers to a tuned target: sample, score, train."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from graftllm.pipeline.work import Work, model_identity, short_name
from graftllm.records import read_pairs, read_prompts, read_responses, write_rows
from graftllm.sampling.pairs import preference_pairs, sft_rows
from graftllm.sampling.responses import sample_responses
from graftllm.sampling.scoring import score_responses
from graftllm.sampling.sources import open_source
from graftllm.stages import Stamp
from graftllm.training import Training, train_dpo, train_sft


def sample(work: Work, skill: str) -> Stamp:
    """Ask a skill's sources its prompts; each answer is a row of `responses.jsonl`."""
    recipe, path = work.recipe, work.skill(skill) / "responses.jsonl"
    wanted = recipe.skills[skill]

    def action() -> None:
        prompts = read_prompts(Path(wanted.prompts))
        for source in wanted.sources:
            opening = partial(open_source, source, device=work.device)
            sample_responses(prompts, opening, recipe.sampling, path, source_name=short_name(source), seed=recipe.seed)

    inputs = [recipe.sampling, recipe.seed, Path(wanted.prompts), *map(model_identity, wanted.sources)]
    return work.stages.run(f"sample.{skill}", inputs, [path], action, unfinished=[path])


def score(work: Work, skill: str) -> Stamp:
    """Judge the responses; write `scored.jsonl`, `sft.jsonl` and `pairs.jsonl`."""
    home, wanted = work.skill(skill), work.recipe.skills[skill]
    sampled = sample(work, skill)

    def action() -> dict[str, Any]:
        prompts = read_prompts(Path(wanted.prompts))
        responses = score_responses(prompts, read_responses(home / "responses.jsonl"), wanted.judge)
        rows, pairs = sft_rows(prompts, responses, skill=skill), preference_pairs(prompts, responses)
        write_rows(home / "scored.jsonl", responses)
        write_rows(home / "sft.jsonl", rows)
        write_rows(home / "pairs.jsonl", pairs)
        right = sum(response.score == 1 for response in responses)
        return {"responses": len(responses), "right": right, "sft_rows": len(rows), "preference_pairs": len(pairs)}

    makes = [home / "scored.jsonl", home / "sft.jsonl", home / "pairs.jsonl"]
    return work.stages.run(f"score.{skill}", [sampled, wanted.judge], makes, action)


def train(work: Work, skill: str) -> Stamp:
    """Tune the target on a skill: SFT, then DPO where the recipe has it and there are pairs."""
    scored = score(work, skill)
    return tune(work, skill, [scored], Path(work.target.path), work.tuned(skill), name=skill)


def tune(
    work: Work, skill: str, inputs: Sequence[Any], start: Path, out: Path, *, name: str, lora_rank: int | None = None
) -> Stamp:
    """Train a checkpoint, or a LoRA on it, by SFT and then DPO on a skill's rows and pairs.

    Args:
        work: whose rows and options.
        skill: whose rows and pairs.
        inputs: what those depend on, for the stages.
        start: checkpoint directory to start from.
        out: the result; the checkpoint after SFT is left beside it as `OUT.sft`.
        name: of the stages, behind `sft.` and `dpo.`
        lora_rank: train a LoRA of this rank instead of all parameters.
    """
    recipe, home = work.recipe, work.skill(skill)
    pairs = read_pairs(home / "pairs.jsonl") if recipe.dpo else []
    after_sft = out.with_name(f"{out.name}.sft") if pairs else out
    sft, dpo = recipe.sft, recipe.dpo
    if lora_rank is not None:
        sft = sft.model_copy(update={"learning_rate": recipe.lora.learning_rate})
        dpo = dpo and dpo.model_copy(update={"learning_rate": recipe.lora.dpo_learning_rate})

    def supervise() -> None:
        rows = read_prompts(home / "sft.jsonl")
        train_sft(Training(start, after_sft, recipe.seed, f"SFT {name}", lora_rank, device=work.device), rows, sft)

    tuned = work.stages.run(f"sft.{name}", [*inputs, start, sft, recipe.seed, lora_rank], [after_sft], supervise)
    if not pairs or dpo is None:
        return tuned

    def prefer() -> None:
        if lora_rank is None:
            training = Training(after_sft, out, recipe.seed, f"DPO {name}", device=work.device)
        else:
            training = Training(start, out, recipe.seed, f"DPO {name}", adapter=after_sft, device=work.device)
        train_dpo(training, pairs, dpo)

    return work.stages.run(f"dpo.{name}", [tuned, dpo, recipe.seed], [out], prefer)
