"""Scores of everything that a run makes, on the test prompts of its recipe."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.evaluation.plots import spectra
from graftllm.evaluation.scores import Answer, Measured, Score, evaluate, merged
from graftllm.fusion.grafted import GraftedModel
from graftllm.generation import generate
from graftllm.loading import load_model, load_tokenizer
from graftllm.pipeline.preparing import test_of
from graftllm.pipeline.work import GENERAL, Work, source_identity
from graftllm.progress import track
from graftllm.records import Prompt, Response, read_prompts
from graftllm.sampling.sources import open_source
from graftllm.stages import Stamp
from graftllm.tensors import digest
from graftllm.training.lora import with_adapter
from graftllm.transfer_options import JudgeOptions, SourceOptions


def measure_base(work: Work) -> Measured:
    """Score the bare target on every skill and on the general tasks."""
    target = work.target.path
    return measure(work, "base", [target], [*work.recipe.skills, GENERAL], partial(answering, work, target))


def measure_source(work: Work, skill: str) -> Measured:
    """Score the best of a skill's sources on the skill."""
    found = [
        measure(work, f"source.{skill}.{source.name}", source_identity(source), [skill], partial(_asking, work, source))
        for source in work.recipe.skills[skill].sources
    ]
    return max(found, key=lambda measured: measured[skill].value)


def measure_tuned(work: Work, skill: str, trained: Stamp) -> Measured:
    """Score a tuned checkpoint on its skill and on the general tasks."""
    return measure(work, f"tuned.{skill}", [trained], [skill, GENERAL], partial(answering, work, work.tuned(skill)))


def measure_grafted(work: Work, name: str, fused: Stamp, pack_name: str, sets: Sequence[str]) -> Measured:
    """Score the grafted model when it answers with the named pack, or with what its router chooses."""

    def opening() -> Answer:
        grafted = GraftedModel.load(work.grafted, device=work.device)
        return lambda prompts: grafted.generate([p.question for p in prompts], pack_name, work.greedy)

    return measure(work, name, [fused], sets, opening)


def measure_routes(work: Work, fused: Stamp) -> Stamp:
    """Count where the router sends the test prompts of each skill and of the general tasks."""

    def action() -> dict[str, dict[str, int]]:
        grafted = GraftedModel.load(work.grafted, device=work.device)
        counts = {}
        for name, (path, _) in _tests(work).items():
            routes = grafted.route([prompt.question for prompt in read_prompts(path)])
            counts[name] = dict(Counter(route.name for route in routes))
        return counts

    return work.stages.run("routes", [fused, *(path for path, _ in _tests(work).values())], [], action)


def check_unplug(work: Work, fused: Stamp) -> Stamp:
    """Plug every pack in and out of the live base; the result is whether each bit is the old one."""

    def action() -> bool:
        grafted = GraftedModel.load(work.grafted, device=work.device)
        before = {name: digest(value) for name, value in grafted.model.state_dict().items()}
        for name in grafted.packs:
            with grafted.using(name) as model:
                changed = any(digest(value) != before[key] for key, value in model.state_dict().items())
            restored = {key: digest(value) for key, value in grafted.model.state_dict().items()}
            if not changed or restored != before:
                return False
        return True

    return work.stages.run("unplug", [fused], [], action)


def measure_spectra(work: Work, trained: Sequence[Stamp]) -> Stamp:
    """Compute how the energy of each skill's delta is spread over singular directions."""

    def action() -> dict[str, Any]:
        return {name: spectra(Delta(work.target, Checkpoint.open(work.tuned(name)))) for name in work.recipe.skills}

    return work.stages.run("spectra", trained, [], action)


def measure(
    work: Work, name: str, inputs: Sequence[Any], sets: Sequence[str], opening: Callable[[], Answer]
) -> Measured:
    """Score whatever `opening` opens on the named test sets.

    Args:
        work: whose test prompts, and where the scores are remembered.
        name: of the stage, behind `evaluate.`
        inputs: what the answers depend on, for the stage.
        sets: names of skills, and `general`.
        opening: loads what answers; called only when the scores are not known.
    """
    tests = {name: test for name, test in _tests(work).items() if name in sets}

    def action() -> dict[str, Any]:
        answer = opening()
        found = {}
        for test, (path, judge) in track(list(tests.items()), label=f"evaluating {name}"):
            scores = evaluate(answer, read_prompts(path), judge, device=work.device).by_task
            found[test] = {task: asdict(score) for task, score in scores.items()}
        return found

    stamp = work.stages.run(f"evaluate.{name}", [*inputs, *chain(*tests.values()), work.greedy], [], action)
    result = cast(dict[str, dict[str, dict[str, Any]]], stamp.result)
    return {test: merged({task: Score(**score) for task, score in tasks.items()}) for test, tasks in result.items()}


def answering(work: Work, model: Path, *, adapter: Path | None = None) -> Answer:
    """Load a checkpoint, with a LoRA on it if one is given; return what answers prompts with it."""
    loaded, tokenizer = load_model(model, device=work.device), load_tokenizer(model)
    if adapter is not None:
        loaded = with_adapter(loaded, adapter)
    return lambda prompts: [
        texts[0] for texts in generate(loaded, tokenizer, [prompt.question for prompt in prompts], work.greedy)
    ]


def _asking(work: Work, source: SourceOptions) -> Answer:
    """Return what answers prompts with a source as it is sampled, but greedily."""
    opened = open_source(source.model_copy(update={"max_failures": 0}), device=work.device)

    def answer(prompts: Sequence[Prompt]) -> list[str]:
        rows: list[Response] = []
        opened.answer(prompts, (), work.greedy, seed=work.recipe.seed, file=rows.extend)
        texts = {row.prompt_id: row.text for row in rows}
        return [texts[prompt.id] for prompt in prompts]

    return answer


def _tests(work: Work) -> dict[str, tuple[Path, JudgeOptions]]:
    """Return the test files and judges: one for each skill, and `general`."""
    recipe = work.recipe
    return {
        **{name: (test_of(work, name), skill.tested_by) for name, skill in recipe.skills.items()},
        GENERAL: (test_of(work, GENERAL), recipe.general.judge),
    }
