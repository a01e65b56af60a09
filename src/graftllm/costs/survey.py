"""A recipe, surveyed: what is known of its models and prompts, and what is assumed."""

from pathlib import Path

from graftllm.costs.amounts import GENERAL, Asked
from graftllm.costs.models import Sized, sized
from graftllm.costs.prompts import Assumed, count_prompts
from graftllm.loading import load_tokenizer
from graftllm.packing_options import DEFAULT_SHARE, budget_bytes, kl_target
from graftllm.recipe import Recipe
from graftllm.training.memory import Shape
from graftllm.transfer_options import RewardJudge


def survey(recipe: Recipe, assumed: Assumed) -> Asked:
    """Look at a recipe's models and prompts; nothing but configurations is downloaded.

    Raises:
        RecipeError: the size of a model cannot be told.
        RecordError: a file that is here is no set of prompts.
    """
    judges = [judge for skill in recipe.skills.values() for judge in (*skill.judge, skill.tested_by)]
    names = [recipe.target]
    names += [source.model for skill in recipe.skills.values() for source in skill.sources if source.url is None]
    names += [judge.model for judge in judges if isinstance(judge, RewardJudge)]
    models = {name: sized(name) for name in dict.fromkeys(names)}
    tokenizer = load_tokenizer(recipe.target) if Path(recipe.target).is_dir() else None
    sections = {**recipe.skills, GENERAL: recipe.general}
    return Asked(
        recipe,
        models,
        {name: count_prompts(section.prompts, assumed, tokenizer) for name, section in sections.items()},
        {name: count_prompts(section.test, assumed, tokenizer, tests=True) for name, section in sections.items()},
        assumed,
        lora_parameters(recipe, models[recipe.target]),
    )


def lora_parameters(recipe: Recipe, target: Sized) -> int:
    """Return how many numbers a LoRA on every linear layer has, of the recipe's rank or its pack's bytes.

    Where only packing tells these, they are those of a pack without a budget.
    """
    each = numbers_per_rank(target.shape)
    if recipe.lora.rank is not None:
        return each * recipe.lora.rank
    budget = recipe.pack.budget or f"{DEFAULT_SHARE:.0%}"
    room = budget_bytes(budget if kl_target(budget) is None else f"{DEFAULT_SHARE:.0%}", 2 * target.shape.parameters)
    return each * max(1, room // (2 * each))


def numbers_per_rank(shape: Shape) -> int:
    """Return the sides of all matrices of a decoder's layers, added up: queries, keys, values, outputs and the MLP."""
    attention = 2 * shape.width + 2 * (shape.width + shape.keys) + 2 * shape.width
    return shape.layers * (attention + 3 * (shape.width + shape.inner))
