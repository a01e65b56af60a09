"""A recipe at work: the directory of a run, and where each artifact lies in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftllm.checkpoint import Checkpoint
from graftllm.errors import CheckpointError, RecipeError
from graftllm.loading import load_tokenizer
from graftllm.recipe import Recipe, SamplingOptions, load_recipe
from graftllm.stages import Stages
from graftllm.training.defaults import dpo_for, sft_for
from graftllm.training_options import DpoOptions, SftOptions
from graftllm.transfer_options import Endpoint, PairOptions, Section, SourceOptions, is_template

GENERAL = "general"  # the name of the test set of general tasks


@dataclass(frozen=True)
class Work:
    """A recipe and the directory that its artifacts go to."""

    recipe: Recipe
    directory: Path
    stages: Stages
    device: str = "auto"
    read_from: Path | None = None  # the recipe's file

    @property
    def target(self) -> Checkpoint:
        """The target model's checkpoint."""
        return Checkpoint.open(self.recipe.target)

    @property
    def greedy(self) -> SamplingOptions:
        """How answers are decoded in evaluations."""
        sampling = self.recipe.sampling
        return sampling.model_copy(update={"samples": 1, "temperature": 0.0, "top_p": 1.0})

    @property
    def grafted(self) -> Path:
        """Where the grafted model is."""
        return self.directory / "grafted"

    def skill(self, name: str) -> Path:
        """Where a skill's rows and checkpoints are."""
        return self.directory / "skills" / name

    def pairs(self, skill: str) -> PairOptions:
        """How a skill's rows and pairs are chosen."""
        return self.recipe.skills[skill].pairs or self.recipe.pairs

    def training(self, *, lora: bool) -> tuple[SftOptions, DpoOptions | None]:
        """How SFT and DPO are done, with what the recipe leaves open chosen for the target."""
        recipe, target = self.recipe, self.target
        sft, dpo = sft_for(recipe.sft, target), recipe.dpo and dpo_for(recipe.dpo, target)
        if lora:
            sft = sft.model_copy(update={"learning_rate": recipe.lora.learning_rate})
            dpo = dpo and dpo.model_copy(update={"learning_rate": recipe.lora.dpo_learning_rate})
        return sft, dpo

    def tuned(self, name: str) -> Path:
        """The target tuned on a skill."""
        return self.skill(name) / "tuned"

    def pack(self, name: str) -> Path:
        """A skill's SkillPack."""
        return self.directory / "packs" / f"{name}.safetensors"


def open_work(recipe: Path, directory: Path | None = None, *, device: str = "auto") -> Work:
    """Read a recipe for a run in `directory`, or in `runs/NAME` of the recipe.

    Raises:
        RecipeError: the recipe is missing or not valid, or the directory is a model's.
    """
    loaded, where = load_recipe(recipe, directory)
    if (where / "config.json").exists():
        raise RecipeError(f"{where}: expected a directory for a run's files, found a model there; choose another one.")
    return Work(loaded, where, Stages(where / "stages"), device, recipe)


def check_target(work: Work) -> None:
    """Stop before sources are asked for rows that the target cannot be trained on.

    Raises:
        CheckpointError: the target or its tokenizer cannot be loaded, or has no chat template.
    """
    target = work.target.path
    if load_tokenizer(target).chat_template is None:
        raise CheckpointError(
            f"{target}: expected a tokenizer with a chat template, which training puts rows into, found none; save one "
            "as chat_template.jinja beside it."
        )


def model_identity(model: str) -> Path | str:
    """Return what a stage depends on when it depends on a model: its directory, or its Hub id."""
    return Path(model) if Path(model).is_dir() else model


def without_place(model: str) -> str:
    """Return how options name a model whose identity is a part of its own: a directory by its last name."""
    return Path(model).name if Path(model).is_dir() else model


def endpoint_identity(section: Endpoint) -> Section:
    """Return a source or judge without what changes none of its answers: keys, patience, prices."""
    without = {name: Endpoint.model_fields[name].default for name in _PATIENCE}
    return section.model_copy(update=without)


def source_identity(source: SourceOptions) -> list[Any]:
    """Return what a stage depends on when it asks a source."""
    told, template = endpoint_identity(source).model_dump(mode="json"), source.chat_template
    if source.url is None:
        told["model"] = without_place(source.model)
    files = [Path(template)] if template is not None and not is_template(template) else []
    if template is None:
        del told["chat_template"]  # so that what was asked before there was this option still holds
    elif files:
        told["chat_template"] = files[0].name
    return [told, *([] if source.url else [model_identity(source.model)]), *files]


_PATIENCE = ("api_key_env", "concurrency", "timeout_s", "retries", "max_failures", "price")
