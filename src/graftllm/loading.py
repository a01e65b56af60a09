"""Checkpoints -> live transformers models and their tokenizers."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from graftllm.checkpoint import Checkpoint
from graftllm.devices import resolve_device
from graftllm.errors import CheckpointError, first_line, is_failure
from graftllm.records import Message
from graftllm.rendering import rendered
from graftllm.transfer_options import is_template

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)  # of a bad config.json


def load_model(path: str | Path, *, device: str = "auto", device_map: str | None = None) -> PreTrainedModel:
    """Load a causal language model for inference: float32 on CPU, its own dtype on a GPU.

    Args:
        path: checkpoint directory or Hub id.
        device: `auto` takes a GPU when there is one.
        device_map: spread the model over devices as accelerate does (`auto`, `balanced`, ...) instead.

    Raises:
        CheckpointError: it is not there, lacks a parameter, or transformers cannot load it.
    """
    where = resolve_device(device)
    model = open_model(path, torch.float32 if where.type == "cpu" else "auto", device_map)
    return (model if device_map else cast(Any, model).to(where)).eval()


def open_model(
    path: str | Path, dtype: torch.dtype | Literal["auto"], device_map: str | None = None
) -> PreTrainedModel:
    """Load a causal language model as transformers does, but with every parameter from its checkpoint.

    Raises:
        CheckpointError: it is not there, lacks a parameter, or transformers cannot load it.
    """
    path = Checkpoint.open(path).path
    transformers_logging.disable_progress_bar()
    try:
        model, found = cast(Any, AutoModelForCausalLM).from_pretrained(
            path, dtype=dtype, device_map=device_map, output_loading_info=True, trust_remote_code=False
        )
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path}: transformers cannot load it as a causal language model ({first_line(error)})."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{path}: has no tensor for {missing[0]!r} of {type(model).__name__}, which would be drawn at random. "
            "The checkpoint is incomplete or its config.json names another class."
        )
    return model


def bare_model(directory: Path) -> PreTrainedModel:
    """Build the model that `open_model` would load, on PyTorch's device `meta`: its modules without their numbers.

    Nothing but config.json is read, and no code that comes with it is run.

    Raises:
        CheckpointError: there is none, or transformers knows no causal language model of this kind.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{directory}: transformers cannot load it as a causal language model ({first_line(error)})."
        ) from error


def load_tokenizer(path: str | Path, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model, with padding on the left and a pad token.

    Args:
        path: checkpoint directory or Hub id.
        chat_template: Jinja text, or a file of it, instead of the tokenizer's own.

    Raises:
        CheckpointError: transformers cannot load it, or the template cannot be read or does not render a question.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.decode(tokenizer("?")["input_ids"])
        with suppress(TemplateError):  # which is told with the conversation that it refuses
            rendered(tokenizer, [Message(role="user", content="?")], answer_next=True)
    except BaseException as error:  # what reads tokenizer.json raises nothing more special
        if not is_failure(error):
            raise
        raise CheckpointError(f"{path}: transformers cannot load its tokenizer ({first_line(error)}).") from error
    if chat_template is not None:
        _use_template(tokenizer, chat_template)
    return tokenizer


def _use_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    try:
        tokenizer.chat_template = template if is_template(template) else Path(template).read_text(encoding="utf-8")
        rendered(tokenizer, [Message(role="user", content="?")], answer_next=True)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"chat_template: expected a Jinja template or a file that holds one, found {template!r} ({error})."
        ) from error
    except TemplateError as error:
        raise CheckpointError(
            f"chat_template: expected a Jinja template that renders a user's message ({first_line(error)})."
        ) from error
