"""A router from prompts: they go through the base, and what it makes of them is learnt from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.fusion.features import prompt_features
from graftllm.fusion.routing import Router, check_classes, check_enough, train_router
from graftllm.loading import load_model, load_tokenizer
from graftllm.recipe import RouterOptions
from graftllm.records import Message, Prompt


def fit_router(
    base: Path,
    prompts: Mapping[str, Sequence[Prompt]],
    options: RouterOptions = RouterOptions(),
    *,
    seed: int = 0,
    device: str = "auto",
) -> Router:
    """Train a router from prompts of each pack, and general ones under `base`.

    Args:
        base: checkpoint directory of the base model.
        prompts: by the name of the pack that should answer them, or `base`; answers in them are not looked at.
        options: which layer, how many examples, and when the base answers.
        seed: of the draw of examples and the initial weights.
        device: `auto` takes a GPU when there is one.

    Raises:
        FusionError: there are no general prompts, or no pack's, or too few of one.
        CheckpointError: the base cannot be loaded.
    """
    check_classes(prompts)
    check_prompts(prompts)
    model, tokenizer = load_model(base, device=device), load_tokenizer(base)
    features = {
        name: features_of(model, tokenizer, rows, options, label=f"router: {name}") for name, rows in prompts.items()
    }
    return train_router(features, options, seed=seed)


def check_prompts(prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Refuse what no router can learn from, by the name of the pack or `base`, before a model reads it.

    Raises:
        FusionError: there are too few different questions of one.
    """
    for name, rows in prompts.items():
        check_enough(name, len(_questions(rows)), len(rows))


def features_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: RouterOptions,
    *,
    label: str = "routing",
) -> Tensor:
    """Return `prompt_features` of the different questions among prompts, at the layer that a router reads."""
    return prompt_features(model, tokenizer, _questions(prompts), layer=options.layer, label=label)


def _questions(prompts: Sequence[Prompt]) -> list[tuple[Message, ...]]:
    """Return the different questions among prompts."""
    return list({json.dumps(row.question): row.question for row in prompts}.values())
