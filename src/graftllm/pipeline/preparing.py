"""Prompt sets of a recipe -> JSONL files of the run: each question once, compared with what the run is tested on."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graftllm.checkpoint import Checkpoint
from graftllm.downloads import repository
from graftllm.errors import SamplingError
from graftllm.pipeline.work import GENERAL, Work, check_target
from graftllm.recipe import check_target_made
from graftllm.records import read_prompts, write_rows
from graftllm.sampling.prompts import contamination, load_prompts, without_duplicates
from graftllm.sampling.scoring import check_judgeable
from graftllm.stages import Stamp
from graftllm.transfer_options import General, PromptSet, Skill


def prompts_of(work: Work, name: str) -> Path:
    """Return the file of the prompts of a skill or of `general`; it is made when it is not there."""
    prepare(work, name)
    return _home(work, name) / "prompts.jsonl"


def test_of(work: Work, name: str) -> Path:
    """Return the file of the test prompts of a skill or of `general`; it is made when it is not there."""
    path, sets = _home(work, name) / "test.jsonl", _section(work, name).test
    work.stages.run(f"prepare.{name}.test", _identity(sets), [path], lambda: write_rows(path, load_prompts(sets)))
    return path


def digest_of(file: Path) -> str:
    """Return a hash of a file's content, for stages that do not care when it was written."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_inputs(work: Work) -> None:
    """Prepare all prompts and tests, so that what is wrong with a later skill is found before the first is sampled.

    A target or source that is on the Hub alone is not downloaded for a look.

    Raises:
        CheckpointError: the target or a source on this machine is no whole checkpoint, or the target as for
            `check_target`.
        RecipeError: the target is to lie in the run's directory, and does not.
        SamplingError: a row lacks what a judge compares with; or as for `prepare`.
    """
    recipe = work.recipe
    check_target_made(recipe, work.directory)
    if _is_here(recipe.target):
        check_target(work)
    for name, skill in recipe.skills.items():
        for judge in skill.judge:
            check_judgeable(read_prompts(prompts_of(work, name)), judge)
        check_judgeable(read_prompts(test_of(work, name)), skill.tested_by)
        for source in skill.sources:
            if source.url is None and _is_here(source.model):
                Checkpoint.open(source.model)
    prepare(work, GENERAL)
    check_judgeable(read_prompts(test_of(work, GENERAL)), recipe.general.judge)


def _is_here(model: str) -> bool:
    return Path(model).exists() or repository(model) is None


def prepare(work: Work, name: str) -> Stamp:
    """Write a skill's prompts (or the general ones) without duplicates; the result counts what was found.

    Raises:
        SamplingError: prompts share words with tests and the recipe calls that an error, or none is left.
    """
    options, sets = work.recipe.contamination, _section(work, name).prompts
    path = _home(work, name) / "prompts.jsonl"
    tests = [test_of(work, other) for other in (*work.recipe.skills, GENERAL)]

    def action() -> dict[str, Any]:
        loaded = load_prompts(sets)
        prompts = without_duplicates(loaded)
        tested = [prompt for test in tests for prompt in read_prompts(test)]
        tested += load_prompts(options.against) if options.against else []
        shared = contamination(prompts, tested, ngram=options.ngram)
        if shared:
            example = f"{shared[0].prompt_id!r} shares {shared[0].shared!r} with test prompt {shared[0].test_id!r}"
            told = f"{name}: {len(shared)} of {len(prompts)} prompts occur in the tests; {example}."
            if options.action == "error":
                raise SamplingError(f"{told} Leave them out, or set contamination.action to drop.")
            print(f"graftllm: {told} contamination.action: {options.action}", file=sys.stderr)
        if options.action == "drop":
            ids = {one.prompt_id for one in shared}
            prompts = [prompt for prompt in prompts if prompt.id not in ids]
        if not prompts:
            raise SamplingError(f"{name}: no prompt is left when those that occur in the tests are dropped.")
        write_rows(path, prompts)
        return {
            "read": len(loaded),
            "duplicates": len(loaded) - len(without_duplicates(loaded)),
            "prompts": len(prompts),
            "contaminated": len(shared),
            "action": options.action,
            "ngram": options.ngram,
            "compared_with": len(tested),
            "examples": [asdict(one) for one in shared[:5]],
        }

    inputs = [*_identity(sets), *_identity(options.against), options.model_copy(update={"against": ()}), *tests]
    return work.stages.run(f"prepare.{name}.prompts", inputs, [path], action)


def _home(work: Work, name: str) -> Path:
    return work.directory / GENERAL if name == GENERAL else work.skill(name)


def _section(work: Work, name: str) -> Skill | General:
    return work.recipe.general if name == GENERAL else work.recipe.skills[name]


def _identity(sets: Sequence[PromptSet]) -> list[Any]:
    """Return what a stage depends on when it depends on prompt sets: their options, and files on this machine."""
    told = [one.model_copy(update={"files": tuple(Path(file).name for file in one.files)}) for one in sets]
    return [*told, *(Path(file) for one in sets for file in one.files)]
