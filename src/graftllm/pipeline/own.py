"""On-policy pairs: the answers of the model itself after SFT, judged as the sources' were."""

from collections import Counter
from pathlib import Path
from typing import Any

from graftllm.loading import load_model, load_tokenizer
from graftllm.pipeline.preparing import digest_of, prompts_of
from graftllm.pipeline.work import Work, endpoint_identity, model_identity, without_place
from graftllm.records import read_prompts, read_responses, write_rows
from graftllm.sampling.pairs import preference_pairs, prompts_for_pairs
from graftllm.sampling.responses import Source, sample_responses
from graftllm.sampling.scoring import RIGHT, score_responses
from graftllm.sampling.sources import LocalSource
from graftllm.stages import Stamp
from graftllm.training.lora import with_adapter
from graftllm.transfer_options import LlmJudge, RewardJudge

NAME = "own"  # what the model's answers are filed under


def own_pairs(
    work: Work, skill: str, tuned: Stamp, file: Path, *, model: Path, adapted: Path | None, name: str
) -> Stamp:
    """Sample a model's answers to a skill's prompts, judge them and write the preference pairs among them.

    Args:
        work: whose prompts, judges and options.
        skill: whose.
        tuned: the stamp of the model's SFT.
        file: where the pairs go; the responses and what a judge says go beside it.
        model: the checkpoint, or the adapter on `adapted`.
        adapted: the checkpoint that `model` is an adapter of.
        name: of the stage, behind `own.`
    """
    recipe, options = work.recipe, work.pairs(skill)
    responses = file.with_name(f"{file.stem}.responses.jsonl")
    spool = file.with_name(f"{file.stem}.judged")

    def opening() -> Source:
        base = model if adapted is None else adapted
        loaded = load_model(base, device=work.device)
        return LocalSource(NAME, loaded if adapted is None else with_adapter(loaded, model), load_tokenizer(base))

    def action() -> dict[str, Any]:
        asked = read_prompts(prompts_of(work, skill))
        prompts = prompts_for_pairs(asked, options)
        sample_responses(prompts, opening, recipe.sampling, responses, source_name=NAME, seed=recipe.seed)
        judges = recipe.skills[skill].judge
        scored = score_responses(prompts, read_responses(responses), judges, directory=spool, device=work.device)
        found = preference_pairs(asked, scored.responses, options)
        write_rows(file, found.pairs)
        right = Counter((row.score or 0) >= RIGHT for row in scored.responses)[True]
        counts = {"responses": len(scored.responses), "right": right, "preference_pairs": len(found.pairs)}
        return counts | {"left_out": dict(found.left_out)}

    asked_as = [digest_of(prompts_of(work, skill)), recipe.sampling, recipe.seed, *judge_identity(work, skill)]
    unfinished = [responses, spool / "judged.jsonl"]
    return work.stages.run(f"own.{name}", [tuned, options, *asked_as], [file], action, unfinished=unfinished)


def judge_identity(work: Work, skill: str) -> list[Any]:
    """Return what a stage depends on when it depends on a skill's judges."""
    found: list[Any] = []
    for judge in work.recipe.skills[skill].judge:
        if isinstance(judge, RewardJudge):
            found += [judge.model_copy(update={"model": without_place(judge.model)}), model_identity(judge.model)]
        else:
            found.append(endpoint_identity(judge) if isinstance(judge, LlmJudge) else judge)
    return found
