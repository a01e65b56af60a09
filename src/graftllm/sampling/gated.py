"""Reward models that grade several objectives and weigh them by the prompt (ArmoRM, arXiv 2406.12845).

transformers knows no such model, and code from the Hub is not run here; the body is an ordinary
language model, and the head is these few lines, read from the checkpoint by the names it has there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftllm.checkpoint import Checkpoint

_MARKS = ("regression_layer.weight", "reward_transform_matrix", "gating.logit_scale")


@dataclass(frozen=True)
class GatedHead:
    """What turns hidden states into one grade."""

    regression: Tensor  # (objectives, hidden)
    transform: Tensor  # (objectives, objectives): takes the influence of length out of the others
    layers: list[tuple[Tensor, Tensor]]  # of the gate: weight (out, in) and bias (out,)
    logit_scale: float
    temperature: float

    def grade(self, answered: Tensor, asked: Tensor) -> Tensor:
        """Return grades, shape (rows,).

        Args:
            answered: hidden states of the last token of each conversation, shape (rows, hidden).
            asked: hidden states of the last token of each prompt, shape (rows, hidden).
        """
        hidden = asked.float()
        for weight, bias in self.layers[:-1]:
            hidden = torch.relu(nn.functional.linear(hidden, weight, bias))
        logits = nn.functional.linear(hidden, *self.layers[-1])  # (rows, objectives)
        gate = torch.softmax(logits / self.temperature, dim=1) * self.logit_scale
        rewards = answered.float() @ self.regression.T @ self.transform  # (rows, objectives)
        return (gate * rewards).sum(dim=1)


def is_gated(checkpoint: Checkpoint) -> bool:
    """Say whether a checkpoint holds such a head."""
    return set(_MARKS) <= set(checkpoint.names())


def read_head(checkpoint: Checkpoint, model: PreTrainedModel) -> GatedHead:
    """Read the head in float32 to the device of the body."""

    def tensor(name: str) -> Tensor:
        return checkpoint.tensor(name).float().to(model.device)

    numbers = sorted({int(name.split(".")[2]) for name in checkpoint.names() if name.startswith("gating.layers.")})
    return GatedHead(
        tensor("regression_layer.weight"),
        tensor("reward_transform_matrix"),
        [(tensor(f"gating.layers.{n}.weight"), tensor(f"gating.layers.{n}.bias")) for n in numbers],
        float(tensor("gating.logit_scale")),
        float(getattr(model.config, "gating_temperature", 10)),
    )
