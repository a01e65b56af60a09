"""LoRA adapters: how they are set up, merged and counted."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import peft
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from graftllm.checkpoint import Checkpoint, copy_companions
from graftllm.loading import bare_model, open_model
from graftllm.storage import whole_directory


def lora_settings(rank: int) -> peft.LoraConfig:
    """Return a LoRA of `rank` on every linear layer."""
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def with_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Return a model with a LoRA adapter merged into its weights; `model` itself is changed."""
    with without_foreign_warnings():
        return cast(Any, peft.PeftModel.from_pretrained(model, adapter)).merge_and_unload()


def merge_adapter(base: Path, adapter: Path, out: Path) -> None:
    """Write the checkpoint that `base` is with an adapter merged into its weights, in the dtype of `base`."""
    checkpoint = Checkpoint.open(base)
    merged: Any = with_adapter(open_model(base, torch.float32), adapter)
    with whole_directory(out) as partial:
        merged.to(checkpoint.dtype).save_pretrained(partial)
        copy_companions(checkpoint, partial)


def lora_parameters_per_rank(model: Path) -> int:
    """Return how many numbers a LoRA on every linear layer of `model` takes for each unit of rank."""
    bare = bare_model(model)
    with without_foreign_warnings():
        adapted = peft.get_peft_model(bare, lora_settings(1))
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


@contextmanager
def without_foreign_warnings() -> Iterator[None]:
    """Keep what libraries warn each other of away from users, who can do nothing about it."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # of file times, and of heads that are tied to embeddings
    with warnings.catch_warnings():
        # TRL 1.16 and PEFT 0.21 ask by the old name; harmless until transformers 6.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
