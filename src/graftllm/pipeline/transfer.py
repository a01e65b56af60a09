"""From a source's answers to a tuned target: sample, score, train."""

import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from graftllm.packing_options import DEFAULT_SHARE, budget_bytes
from graftllm.pipeline.asked import keep_answers
from graftllm.pipeline.own import judge_identity, own_pairs
from graftllm.pipeline.preparing import digest_of, prepare, prompts_of
from graftllm.pipeline.work import Work, check_target, source_identity
from graftllm.records import read_pairs, read_prompts, read_responses, write_rows
from graftllm.sampling.card import build_card, write_card
from graftllm.sampling.pairs import preference_pairs, sft_rows
from graftllm.sampling.responses import sample_responses
from graftllm.sampling.scoring import RIGHT, score_responses
from graftllm.sampling.sources import open_source
from graftllm.stages import Stamp
from graftllm.storage import whole_directory
from graftllm.training.lora import lora_parameters_per_rank, merge_adapter
from graftllm.training.tuning import Training, train_dpo, train_sft
from graftllm.transfer_options import SourceOptions


def sample(work: Work, skill: str) -> Stamp:
    """Ask a skill's sources its prompts; each answer is a row of `responses.jsonl`."""
    home, sources = work.skill(skill), work.recipe.skills[skill].sources
    asked = [ask_source(work, skill, source) for source in sources]

    def action() -> dict[str, int]:
        rows = (row for source in sources for row in read_responses(_answers(work, skill, source)))
        write_rows(home / "responses.jsonl", rows)
        return {source.name: cast(int, stamp.result) for source, stamp in zip(sources, asked, strict=True)}

    return work.stages.run(f"sample.{skill}", asked, [home / "responses.jsonl"], action)


def ask_source(work: Work, skill: str, source: SourceOptions) -> Stamp:
    """Ask one source a skill's prompts; the result is how many responses could not be had.

    A source that is added, or other tests beside the same prompts, leave what was asked before as it is. Of other
    prompts, or more samples, those are asked that are not answered yet.
    """
    recipe, path, prompts = work.recipe, _answers(work, skill, source), prompts_of(work, skill)
    options = source.sampling or recipe.sampling

    way = [options.model_copy(update={"samples": 0}), recipe.seed, *source_identity(source)]

    def action() -> int:
        asked, opening = read_prompts(prompts), partial(open_source, source, device=work.device)
        keep_answers(path, asked, work.stages.key_of(way))
        return sample_responses(asked, opening, options, path, source_name=source.name, seed=recipe.seed)

    inputs = [digest_of(prompts), options, recipe.seed, *source_identity(source)]
    return work.stages.run(f"sample.{skill}.{source.name}", inputs, [path], action)


def _answers(work: Work, skill: str, source: SourceOptions) -> Path:
    return work.skill(skill) / "responses" / f"{source.name}.jsonl"


def judge(work: Work, skill: str) -> Stamp:
    """Judge the responses; write `scored.jsonl`. The result says what each judge took."""
    home, wanted = work.skill(skill), work.recipe.skills[skill]
    sampled, file = sample(work, skill), prompts_of(work, skill)

    def action() -> dict[str, Any]:
        prompts, responses = read_prompts(file), read_responses(home / "responses.jsonl")
        scored = score_responses(prompts, responses, wanted.judge, directory=home, device=work.device)
        write_rows(home / "scored.jsonl", scored.responses)
        return {"judges": list(map(asdict, scored.costs)), "agreement": scored.agreement and asdict(scored.agreement)}

    inputs, spool = [sampled, digest_of(file), *judge_identity(work, skill)], home / "judged.jsonl"
    return work.stages.run(f"judge.{skill}", inputs, [home / "scored.jsonl"], action, unfinished=[spool])


def score(work: Work, skill: str) -> Stamp:
    """Choose rows and pairs from the judged responses; write `sft.jsonl`, `pairs.jsonl` and the data card.

    With on-policy pairs, `pairs.jsonl` is written after SFT instead.
    """
    home, options, sources = work.skill(skill), work.pairs(skill), work.recipe.skills[skill].sources
    prepared, sampled, judged = prepare(work, skill), sample(work, skill), judge(work, skill)
    on_policy = options.preference == "on_policy"
    makes = [home / name for name in ("sft.jsonl", "data-card.json", "data-card.md")]
    makes += [] if on_policy else [home / "pairs.jsonl"]

    def action() -> dict[str, Any]:
        prompts, responses = read_prompts(prompts_of(work, skill)), read_responses(home / "scored.jsonl")
        rows = sft_rows(prompts, responses, options, skill=skill)
        found = preference_pairs([] if on_policy else prompts, responses, options)
        about = {"prompts": prepared.result, "failed": sampled.result, **cast(dict[str, Any], judged.result)}
        card = build_card(skill, responses, rows, found, options, sources, about)
        write_rows(home / "sft.jsonl", rows)
        if not on_policy:
            write_rows(home / "pairs.jsonl", found.pairs)
        write_card(card, home)
        right = sum((row.score or 0) >= RIGHT for row in responses)
        counts = {"responses": len(responses), "right": right}
        return counts | {"sft_rows": len(rows), "preference_pairs": len(found.pairs)}

    return work.stages.run(f"score.{skill}", [prepared, judged, options], makes, action)


def train(work: Work, skill: str) -> Stamp:
    """Tune the target on a skill: SFT, then DPO where the recipe has it and there are pairs.

    With `method: lora`, the tuned target is the one that the LoRA is merged into.
    """
    check_target(work)
    score(work, skill)
    start, out = Path(work.target.path), work.tuned(skill)
    if work.recipe.method == "full":
        return tune(work, skill, start, out, name=skill)
    adapter = out.with_name(f"{out.name}.lora")
    adapted = tune(work, skill, start, adapter, name=skill, lora_rank=_lora_rank(work))
    return work.stages.run(f"merge.{skill}", [adapted, start], [out], lambda: merge_adapter(start, adapter, out))


def _lora_rank(work: Work) -> int:
    """Return the rank that the recipe names, or the largest whose bytes the packs may have."""
    recipe, target = work.recipe, work.target
    if recipe.lora.rank is not None:
        return recipe.lora.rank
    room = budget_bytes(recipe.pack.budget or f"{DEFAULT_SHARE:.0%}", target.nbytes)
    return max(1, room // (2 * lora_parameters_per_rank(target.path)))  # bfloat16


def tune(work: Work, skill: str, start: Path, out: Path, *, name: str, lora_rank: int | None = None) -> Stamp:
    """Train a checkpoint, or a LoRA on it, by SFT and then DPO on a skill's rows and pairs.

    What was trained holds while the words of its rows are the same, however often they are written again.

    Args:
        work: whose rows and options.
        skill: whose rows and pairs, which are there.
        start: checkpoint directory to start from.
        out: the result; the checkpoint after SFT is left beside it as `OUT.sft`.
        name: of the stages, behind `sft.` and `dpo.`
        lora_rank: train a LoRA of this rank instead of all parameters.
    """
    recipe, home = work.recipe, work.skill(skill)
    on_policy, file = recipe.dpo is not None and work.pairs(skill).preference == "on_policy", home / "pairs.jsonl"
    pairs = read_pairs(file) if recipe.dpo and not on_policy else []
    after_sft = out.with_name(f"{out.name}.sft") if pairs or on_policy else out  # DPO leaves its own at `out`
    sft, dpo = work.training(lora=lora_rank is not None)
    added = recipe.skills[skill].added_tokens if lora_rank is None else ()
    told = Training(start, after_sft, recipe.seed, f"SFT {name}", device=work.device, report_to=recipe.report_to)

    def supervise() -> None:
        run = replace(told, lora_rank=lora_rank, added_tokens=added)
        train_sft(run, read_prompts(home / "sft.jsonl"), sft)

    tuned = work.stages.run(
        f"sft.{name}",
        [digest_of(home / "sft.jsonl"), start, sft, recipe.seed, lora_rank, *added, after_sft.name],
        [after_sft],
        supervise,
        together=True,
    )
    if on_policy:
        file = file if name == skill else after_sft.with_name(f"{out.name}.pairs.jsonl")
        tuned = own_pairs(work, skill, tuned, file, model=after_sft, adapted=start if lora_rank else None, name=name)
        pairs = read_pairs(file)
        if not pairs:  # nothing to prefer: all of its answers are right, or all wrong
            return work.stages.run(f"dpo.{name}", [tuned], [out], lambda: _copy(after_sft, out))
    if not pairs or dpo is None:
        return tuned

    def prefer() -> None:
        training = replace(told, out=out, label=f"DPO {name}")
        onward = {"model": after_sft} if lora_rank is None else {"adapter": after_sft}
        train_dpo(replace(training, **onward), pairs, dpo)

    return work.stages.run(f"dpo.{name}", [tuned, digest_of(file), dpo, recipe.seed], [out], prefer, together=True)


def _copy(checkpoint: Path, out: Path) -> None:
    with whole_directory(out) as partial:
        shutil.copytree(checkpoint, partial, dirs_exist_ok=True)
