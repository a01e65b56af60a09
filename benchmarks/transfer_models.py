"""What `transfer.py` trains: the zoo of `fusion_models.py`, and the pipeline's stages on it, each metered.

One seed's directory holds `zoo/` (six sources, a target, prompts), `skills/` (rows and fine-tunes, as in any run) and
what the rivals make. Every training is a stage: a killed run goes on where it was, and each stage's stamp says what it
took.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from distribution_fusion import Taught, teach
from fusion_models import RECIPES, SIZES, source_of

from graftllm.demo import GENERAL as GENERAL_TASKS
from graftllm.demo import RECIPE, WordTask, Zoo, build_zoo, word_rows
from graftllm.evaluation.scores import evaluate
from graftllm.generation import generate
from graftllm.loading import load_model, load_tokenizer
from graftllm.pipeline.measuring import measure
from graftllm.pipeline.preparing import prompts_of
from graftllm.pipeline.transfer import train
from graftllm.pipeline.work import GENERAL, Work
from graftllm.recipe import Recipe, load_recipe
from graftllm.records import Message, Prompt, Response, read_pairs, read_prompts, read_responses
from graftllm.rendering import render_answered
from graftllm.stages import Stages, Stamp
from graftllm.storage import whole_directory
from graftllm.training.tuning import Training, train_sft

PROMPTS = 1200  # of each skill
_VALIDATIONS = 32  # prompts of each skill, and of the general tasks together
_VALIDATION_SEED = 1000  # far from the seeds of the rows that models learn from


@dataclass(frozen=True)
class Setting:
    """One seed's recipe at work on a zoo."""

    work: Work
    zoo: Zoo

    @property
    def skills(self) -> list[str]:
        """The names of the skills."""
        return list(self.work.recipe.skills)

    @cached_property
    def trained(self) -> dict[str, Stamp]:
        """By skill, the stamp of the published way: sample, judge, SFT, DPO."""
        return {name: train(self.work, name) for name in self.skills}

    @cached_property
    def validation(self) -> dict[str, list[Prompt]]:
        """Prompts to choose by, drawn apart from training and test sets: of each skill, and of the general tasks."""
        seed = _VALIDATION_SEED + self.work.recipe.seed
        found = {task.name: word_rows(task, _VALIDATIONS, seed=seed) for task, _ in self.zoo.skills}
        each = _VALIDATIONS // len(GENERAL_TASKS) + 1
        return found | {GENERAL: [row for task in GENERAL_TASKS for row in word_rows(task, each, seed=seed)]}

    @cached_property
    def taught(self) -> list[Taught]:
        """The verified rows of all skills and the general prompts' references, each with its best teacher."""
        rows = [replace(row, id=f"{name}/{row.id}") for name in self.skills for row in self.rows(name)]
        rows += [answered(row, row.reference or "") for row in read_prompts(prompts_of(self.work, GENERAL))]
        sources = [self.source(name) for name in self.skills]
        return teach(Path(self.work.target.path), sources, rows, device=self.work.device)

    def after_sft(self, skill: str) -> Path:
        """Where a skill's fine-tune before DPO is."""
        tuned = self.work.tuned(skill)
        before = tuned.with_name(f"{tuned.name}.sft")
        return before if before.exists() else tuned  # without pairs there is no DPO

    def rows(self, skill: str) -> list[Prompt]:
        """The verified rows of a skill."""
        return read_prompts(self.work.skill(skill) / "sft.jsonl")

    def source(self, skill: str) -> Path:
        """A skill's source."""
        return Path(self.work.recipe.skills[skill].sources[0].model)

    def score(self, name: str, inputs: Sequence[Any], sets: Sequence[str], opening: Any) -> dict[str, float]:
        """Return the scores of what `opening` opens, by test set."""
        return {test: found.value for test, found in measure(self.work, name, inputs, sets, opening).items()}

    def validated(self, model: Path) -> float:
        """Return a checkpoint's mean score on the validation prompts; each skill and the general tasks count once."""
        live, tokenizer = load_model(model, device=self.work.device), load_tokenizer(model)

        def answer(prompts: Sequence[Prompt]) -> list[str]:
            found = generate(live, tokenizer, [prompt.question for prompt in prompts], self.work.greedy)
            return [texts[0] for texts in found]

        scores = [evaluate(answer, prompts, "exact").value for prompts in self.validation.values()]
        return sum(scores) / len(scores)

    def tokens(self) -> dict[str, int]:
        """Return the tokens sampled, and those that SFT and DPO read: all epochs, both answers of a pair."""
        words, recipe = load_tokenizer(self.work.target.path), self.work.recipe
        found = {"sample": 0, "sft": 0, "dpo": 0}
        for name in self.skills:
            foreign = load_tokenizer(self.source(name))
            texts = [row.text for row in read_responses(self.work.skill(name) / "responses.jsonl")]
            found["sample"] += sum(map(len, cast(Any, foreign(texts))["input_ids"])) + len(texts)
            read = sum(len(render_answered(words, row)[0]) for row in self.rows(name))
            found["sft"] += round(read * recipe.sft.epochs)
            if recipe.dpo is not None:
                pairs = read_pairs(self.work.skill(name) / "pairs.jsonl")
                answers = [(pair, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
                rows = [answered(Prompt(pair.prompt_id, pair.messages), text) for pair, text in answers]
                found["dpo"] += round(sum(len(render_answered(words, row)[0]) for row in rows) * recipe.dpo.epochs)
        return found


def answered(prompt: Prompt, text: str) -> Prompt:
    """Return a prompt's question with an answer to learn."""
    return Prompt(prompt.id, (*prompt.question, Message(role="assistant", content=text)), prompt.task)


def first_answers(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Prompt]:
    """Return each prompt with the first answer that it got, right or wrong; empty ones teach nothing."""
    asked = {prompt.id: prompt for prompt in prompts}
    first = [row for row in responses if row.sample == 0 and row.prompt_id in asked and row.text.strip()]
    return [answered(asked[row.prompt_id], row.text) for row in first]


def open_setting(directory: Path, seed: int, *, size: str, reuse: Path | None = None, device: str = "auto") -> Setting:
    """Build a seed's zoo unless it is there, and open its recipe.

    Args:
        directory: of this seed.
        seed: of the zoo, the sampling and the training.
        size: a row of `SIZES`.
        reuse: a directory of this seed made by `fusion.py`, whose zoo is copied.
        device: `auto` takes a GPU when there is one.
    """
    directory = directory.absolute()  # as the paths of a recipe that was read are
    zoo, stages = SIZES[size], Stages(directory / "stages")
    if reuse is not None and not (directory / "zoo").exists():
        with whole_directory(directory / "zoo") as partial:
            shutil.copytree(reuse / "zoo", partial, dirs_exist_ok=True)
    elif reuse is None:
        build_zoo(directory / "zoo", stages, zoo, seed=seed, device=device)
    return Setting(Work(_recipe(directory, zoo, seed, size), directory, stages, device), zoo)


def _recipe(directory: Path, zoo: Zoo, seed: int, size: str) -> Recipe:
    """Return the demo's recipe for the skills of a zoo of a size."""
    demo, _ = load_recipe(RECIPE, directory)
    prompts = directory / "zoo" / "prompts"

    def skill(task: WordTask, source: str) -> dict[str, Any]:
        return {
            "sources": [str(directory / "zoo" / source)],
            "prompts": {"files": [str(prompts / f"{task.name}.jsonl")], "limit": PROMPTS},
            "test": str(prompts / f"{task.name}.test.jsonl"),
        }

    skills = {task.name: skill(task, source_of(zoo, task).name) for task, _ in zoo.skills}
    wanted: dict[str, Any] = {"name": "transfer", "seed": seed, "skills": skills, "compare": []}
    wanted |= RECIPES[size]
    return Recipe.model_validate(demo.model_dump(mode="json") | wanted)


def train_unverified(setting: Setting, skill: str) -> tuple[Path, Stamp]:
    """Tune the target on the source's first answer to every prompt, right or wrong."""
    work, out = setting.work, setting.work.directory / "unverified" / skill

    def action() -> None:
        prompts = read_prompts(prompts_of(work, skill))
        rows = first_answers(prompts, read_responses(work.skill(skill) / "responses.jsonl"))
        run = Training(Path(work.target.path), out, work.recipe.seed, f"unverified {skill}", device=work.device)
        train_sft(run, rows, work.recipe.sft)

    inputs = [setting.trained[skill], work.recipe.sft, work.recipe.seed]
    return out, work.stages.run(f"unverified.{skill}", inputs, [out], action)
