"""How large a model is, without its weights: from its files, its configuration, or at worst its name."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from graftllm.checkpoint import Checkpoint
from graftllm.downloads import download, repository
from graftllm.errors import HubError, RecipeError
from graftllm.training.defaults import config_of, shape_of
from graftllm.training.memory import Shape

_USUAL_VOCABULARY = 128_256


@dataclass(frozen=True)
class Sized:
    """A model's name and shape, and what tells its shape."""

    name: str
    shape: Shape
    known_by: str


def sized(model: str) -> Sized:
    """Return the size of a checkpoint directory, or of a model on the Hub, of which at most the config is downloaded.

    Raises:
        RecipeError: neither its configuration can be had nor does its name tell its size.
        CheckpointError: the directory is no whole checkpoint.
    """
    name = model.rstrip("/").split("/")[-1]
    if Path(model).is_dir():
        checkpoint = Checkpoint.open(model)
        return Sized(name, shape_of(config_of(checkpoint.config, checkpoint.path), checkpoint.parameters), "its files")
    source = repository(model)
    try:
        path = None if source is None else download(source, "config.json")
    except HubError:
        path = None  # the name may tell enough, and the assumption is printed
    if path is None:
        return Sized(name, shape_by_name(model), "its name alone")
    config = config_of(json.loads(path.read_text(encoding="utf-8")), model)
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return Sized(name, shape_of(config, bare.num_parameters()), "its configuration")


def shape_by_name(model: str) -> Shape:
    """Return the shape that is usual for the size in a model's name: layers are 128 times fewer than the width.

    >>> shape_by_name("meta-llama/Llama-3.1-8B-Instruct")
    Shape(parameters=8000000000, layers=34, width=4352, inner=15232, keys=1088, vocabulary=128256, tied=False)

    Raises:
        RecipeError: there is no size in the name.
    """
    found = re.findall(r"(?<![\w.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z])", model.split("/")[-1].lower())
    if not found:
        raise RecipeError(
            f"{model}: cannot tell its size: its config.json is not here, and the name does not say it, as in "
            "Llama-3.1-8B. Download it, or let this machine reach the Hub."
        )
    experts, size, unit = found[-1]
    parameters = int(float(experts or 1) * float(size) * (1e9 if unit == "b" else 1e6))
    layers = max(1, round((parameters / (12 * 128**2)) ** (1 / 3)))
    width = 128 * layers
    return Shape(parameters, layers, width, 7 * width // 2, width // 4, _USUAL_VOCABULARY)
