"""What a recipe leaves open: hyperparameters by the target's family and size, and what fits into memory.

The published values are those of FuseChat 3.0 (arXiv 2503.04222). Below a billion parameters nothing is published:
there learning rates rise on a straight line in logarithms to what trains the demo's models of a million.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, PreTrainedConfig

from graftllm.checkpoint import Checkpoint
from graftllm.devices import memory_bytes
from graftllm.errors import CheckpointError, TrainingError, first_line
from graftllm.launched import processes, sharded
from graftllm.training.memory import Batching, Shape, fit_batch, held_bytes
from graftllm.training_options import DpoOptions, PreferenceLoss, SftOptions, TrainingOptions

SFT_RATES = {"llama": 5e-6, "qwen2": 2e-6, "gemma2": 2e-6}


@dataclass(frozen=True)
class Preference:
    """Published DPO settings of a family's models below a number of parameters."""

    family: str
    below: float
    learning_rate: float
    loss: PreferenceLoss
    beta: float


PREFERENCES = (
    Preference("llama", 5e9, 1e-6, "length_normalised", 10),
    Preference("llama", math.inf, 8e-7, "length_normalised", 10),
    Preference("qwen2", math.inf, 3e-7, "sigmoid", 0.01),
    Preference("gemma2", math.inf, 5e-7, "sigmoid", 0.01),
    Preference("", math.inf, 8e-7, "sigmoid", 0.1),  # other families; the loss and beta of arXiv 2305.18290
)
SMALL_SFT, SMALL_DPO = 2e-3, 2e-5  # learning rates at a million parameters
SMALL, LARGE = 1e6, 1e9

Options = TypeVar("Options", bound=TrainingOptions)


def sft_for(options: SftOptions, target: Checkpoint) -> SftOptions:
    """Return options with what the recipe left open chosen for a target."""
    published = SFT_RATES.get(_family(target), SftOptions().learning_rate)
    return _filled(options, learning_rate=_scaled(published, SMALL_SFT, target.parameters))


def dpo_for(options: DpoOptions, target: Checkpoint) -> DpoOptions:
    """Return options with what the recipe left open chosen for a target.

    A beta without a loss is one of the ordinary loss, and a loss that is not the family's gets the usual beta for it:
    10 is as usual for the length-normalised loss as 0.1 for the other.
    """
    found = next(row for row in PREFERENCES if row.family in ("", _family(target)) and target.parameters < row.below)
    loss = found.loss if not options.model_fields_set & {"loss", "beta"} else options.loss
    usual = found.beta if loss == found.loss else next(row.beta for row in reversed(PREFERENCES) if row.loss == loss)
    return _filled(
        options, loss=loss, beta=usual, learning_rate=_scaled(found.learning_rate, SMALL_DPO, target.parameters)
    )


def _family(target: Checkpoint) -> str:
    return str(target.config.get("model_type", ""))


def _scaled(published: float, small: float, parameters: int) -> float:
    """Return the published learning rate, or for models below a billion parameters a larger one, in two digits."""
    share = math.log(LARGE / min(max(parameters, SMALL), LARGE)) / math.log(LARGE / SMALL)
    return float(f"{published * (small / published) ** share:.2g}")


def _filled(options: Options, **chosen: float | str) -> Options:
    """Return options in which what was not given is as chosen."""
    return options.model_copy(
        update={key: value for key, value in chosen.items() if key not in options.model_fields_set}
    )


def batching_for(
    options: TrainingOptions, model: Checkpoint, *, tokens: int, device: torch.device, trained: int, label: str
) -> Batching:
    """Return how a batch fits into the memory of a device, which every process of a training has one of.

    Takes from what the weights and the optimizer leave (`training/memory.py`); the number of rows divides the batch
    evenly. Memory is that of the whole device, so the same machine always gives the same answer.

    Args:
        options: the size of a batch, and the number of rows if it is given.
        model: what is trained from.
        tokens: of the longest row (of a preference pair, both answers).
        device: where it is trained.
        trained: number of parameters that are trained.
        label: of the training, for errors.

    Raises:
        TrainingError: the batch cannot be divided evenly.
    """
    count = processes()
    share, rest = divmod(options.batch_size, count)
    wanted = options.micro_batch
    if rest or (wanted and share % wanted):
        raise TrainingError(
            f"{label}: expected a batch_size that {count} processes times {wanted or 1} rows at once divide "
            f"evenly, found {options.batch_size}; change batch_size or micro_batch."
        )
    shape = shape_of(config_of(model.config, model.path), model.parameters)
    free = _memory(device) - held_bytes(shape, trained, processes=count, sharded=sharded())
    return fit_batch(shape, free, share, wanted, tokens=tokens, number=2 if device.type == "cuda" else 4)


def config_of(content: Mapping[str, Any], where: str | Path) -> PreTrainedConfig:
    """Return the configuration of a model from its config.json.

    Raises:
        CheckpointError: transformers knows no such model.
    """
    try:
        return AutoConfig.for_model(**content)
    except (ValueError, TypeError) as error:
        problem = first_line(error)
        raise CheckpointError(f"{where}: transformers cannot read its config.json ({problem}).") from error


def shape_of(config: PreTrainedConfig, parameters: int) -> Shape:
    """Return the shape of a decoder by its configuration and number of parameters."""
    text: Any = config.get_text_config()
    width, heads = text.hidden_size, getattr(text, "num_attention_heads", None) or 1  # state spaces have none
    inner = getattr(text, "intermediate_size", 0)
    head = getattr(text, "head_dim", None) or width // heads
    return Shape(
        parameters=parameters,
        layers=text.num_hidden_layers,
        width=width,
        inner=inner if isinstance(inner, int) and inner else 4 * width,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head,
        vocabulary=text.vocab_size,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
    )


def _memory(device: torch.device) -> float:
    """Return the bytes that a training may take: nine tenths of a GPU, half of a computer."""
    if device.type == "cuda":
        return 0.9 * torch.cuda.get_device_properties(device).total_memory
    return 0.5 * memory_bytes()
