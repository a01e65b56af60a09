"""The router: a prompt -> the pack that should answer it, or `base`.

A small feed-forward classifier on the base model's own hidden states of the prompt: LayerNorm,
Linear, GELU, Linear, softmax, with the classes `base` and one for each pack. Top-1 at unit weight,
so a routed answer is exactly the pack's.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.checkpoint import TensorSpec, raw_bytes, write_safetensors
from graftllm.errors import FusionError
from graftllm.generation import load_model, load_tokenizer, pad, render
from graftllm.progress import track
from graftllm.recipe import RouterOptions
from graftllm.records import Message, Prompt

BASE = "base"
_HIDDEN = 64
_BATCH = 32


@dataclass(frozen=True)
class Route:
    """Where a prompt goes: a pack's name or `base`, and how probable each class was."""

    name: str
    probabilities: Mapping[str, float]


@dataclass(frozen=True)
class Router:
    """A trained classifier.

    Attributes:
        classes: `base` first, then pack names.
        threshold: when the best pack is less probable than this, `base` answers.
        temperature: logits are divided by it, so that probabilities match frequencies.
        network: maps features (prompts, 2 * hidden size) to logits (prompts, classes).
    """

    classes: tuple[str, ...]
    threshold: float
    temperature: float
    network: nn.Module

    @torch.inference_mode()
    def route(self, features: Tensor) -> list[Route]:
        """Return one route for each row of `prompt_features`."""
        probabilities = torch.softmax(self.network(features) / self.temperature, dim=1)
        routes = []
        for row in probabilities.tolist():
            best = max(range(len(row)), key=row.__getitem__)
            name = self.classes[best] if row[best] >= self.threshold else BASE
            routes.append(Route(name, dict(zip(self.classes, row, strict=True))))
        return routes

    def save(self, path: Path) -> None:
        """Write the router as one safetensors file; it appears whole or not at all."""
        state = self.network.state_dict()
        layout = {name: TensorSpec("F32", tuple(value.shape)) for name, value in state.items()}
        about = {"classes": self.classes, "threshold": self.threshold, "temperature": self.temperature}
        write_safetensors(path, layout, lambda name: raw_bytes(state[name]), metadata={"router": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> "Router":
        """Read a router that `save` wrote.

        Raises:
            FusionError: the file is missing, damaged or no router.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["router"])
                state = {name: file.get_tensor(name) for name in file.keys()}
            network = _network(state["0.weight"].shape[0], len(about["classes"]))
            network.load_state_dict(state)
            return cls(tuple(about["classes"]), float(about["threshold"]), float(about["temperature"]), network.eval())
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, IndexError, TypeError) as error:
            raise FusionError(
                f"{path}: not a router ({str(error).splitlines()[0]}). Run `graftllm fuse` again."
            ) from error


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
        options: threshold and training steps.
        seed: of the initial weights and the batches.
        device: `auto` takes a GPU when there is one.

    Raises:
        FusionError: there are no general prompts, or no pack's.
        CheckpointError: the base cannot be loaded.
    """
    _check_classes(prompts)
    model, tokenizer = load_model(base, device=device), load_tokenizer(base)
    features = {
        name: prompt_features(model, tokenizer, [row.question for row in rows], label=f"router: {name}")
        for name, rows in prompts.items()
    }
    return train_router(features, options, seed=seed)


@torch.inference_mode()
def prompt_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    label: str = "routing",
) -> Tensor:
    """Return what the router sees of each prompt: hidden states of the middle layer.

    Args:
        model: the bare base model.
        tokenizer: the model's own.
        conversations: each up to and including the last user message.
        label: shown beside the progress bar.

    Returns:
        Shape (prompts, 2 * hidden size), float32 on CPU: the mean over the prompt's tokens, then the last token.
    """
    rows: list[Tensor] = []
    for start in track(range(0, len(conversations), _BATCH), label=label):
        sequences = [
            render(tokenizer, messages, answer_next=True) for messages in conversations[start : start + _BATCH]
        ]
        ids, mask = pad(sequences, tokenizer, model.device)
        states = cast(Any, model)(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        hidden = states[len(states) // 2].float()  # (rows, length, hidden size)
        weights = mask[:, :, None] / mask.sum(dim=1)[:, None, None]
        rows.append(torch.cat([(hidden * weights).sum(dim=1), hidden[:, -1]], dim=1).cpu())
    return torch.cat(rows)


def train_router(features: Mapping[str, Tensor], options: RouterOptions, *, seed: int) -> Router:
    """Train a router and calibrate its temperature on every fifth prompt, which it does not train on.

    Args:
        features: class name (`base` or a pack) -> `prompt_features` of its prompts.
        options: threshold and training steps.
        seed: of the initial weights and the batches.

    Raises:
        FusionError: there are no general prompts for `base`, or no pack's.
    """
    _check_classes(features)
    classes = (BASE, *(name for name in features if name != BASE))
    inputs = torch.cat([features[name] for name in classes])
    labels = torch.cat([torch.full((len(features[name]),), i) for i, name in enumerate(classes)])
    held_out = torch.arange(len(labels)) % 5 == 4
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(inputs.shape[1], len(classes))
    class_weights = len(labels) / (len(classes) * torch.bincount(labels[~held_out]).clamp(min=1))
    train_inputs, train_labels = inputs[~held_out], labels[~held_out]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(options.steps):
        batch = torch.randint(len(train_labels), (min(256, len(train_labels)),), generator=draw)
        loss = nn.functional.cross_entropy(network(train_inputs[batch]), train_labels[batch], weight=class_weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.inference_mode():
        logits = network(inputs[held_out])
    return Router(classes, options.threshold, _temperature(logits, labels[held_out]), network)


def _check_classes(found: Collection[str]) -> None:
    if BASE not in found or len(found) < 2:
        raise FusionError(
            f"router: expected prompts of 'base' and of at least one pack, found {', '.join(found) or 'none'}. "
            "Add rows of general prompts, and rows whose task is a pack's name."
        )


def _network(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, classes))


def _temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature of least log-loss, from 0.5 (sharper) to 5 (softer)."""
    grid = torch.logspace(-0.301, 0.699, 41)
    losses = [float(nn.functional.cross_entropy(logits / temperature, labels)) for temperature in grid]
    return float(grid[min(range(len(losses)), key=losses.__getitem__)])
