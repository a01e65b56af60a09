"""What was measured of a model, and what errors cost by that; measuring it is for `calibration` and `sensitivity`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftllm.compression.metric import Metric

SEQUENCES = 512  # calibration rows; with 128, packs of the demo's fine-tunes have up to twice the divergence
MAX_LENGTH = 2048  # tokens of a row; longer ones are cut
DAMPING = 0.05  # share of the mean that is added to row weights: what calibration never saw may matter too


@dataclass(frozen=True)
class Calibration:
    """What the layers of a tuned model saw.

    Attributes:
        moments: by parameter name in the checkpoint, each of shape (d_in, d_in); tensors that are no
            linear layer, and experts that no token reached, are not in it. A tied embedding has those of the head.
        tokens: how many tokens made them; padding is not counted.
        transposed: names whose input side is dimension 0 of the stored tensor, not 1 (Conv1D).
        unseen: names of experts' matrices, and of stacks of them, of which no token reached one.
        shared: by parameter name, the key of its moments; equal for layers that get the same input.
        reached: by parameter name, of how many tokens its moments are; where it is not told, they are exact.
    """

    moments: Mapping[str, Tensor]
    tokens: int
    transposed: frozenset[str] = frozenset()
    unseen: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    reached: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sensitivity:
    """Second moments of gradients, by parameter name in the checkpoint, in nats a predicted token.

    Attributes:
        outputs: of each linear layer's output, shape (d_out,).
        reads: of each row that is read, how much: how often that of a vocabulary is, shape (V,); the squares of what
            multiplies those of experts that are stored inputs first, shape (experts x d_in,).
        read_outputs: of what is read, shape (d, d), for each time.
        reached: of each expert's matrix, the share of the tokens that it saw.
        rows: of each row of what the model uses without a layer that could be watched, shape (d_out,).
    """

    outputs: Mapping[str, Tensor]
    reads: Mapping[str, Tensor]
    read_outputs: Mapping[str, Tensor]
    reached: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def measured(self) -> list[str]:
        """The names of all that has a price of its own."""
        return list(dict.fromkeys([*self.outputs, *self.reads, *self.rows]))

    def price(self, name: str, moments: Tensor | None) -> float | None:
        """Return the scale of `metric` alone."""
        if name in self.rows:
            return float(self.rows[name].mean())
        uses = self._uses(name, moments)
        return sum(float(rows.mean() * right.diagonal().mean()) for rows, right in uses) if uses else None

    def metric(self, name: str, moments: Tensor | None) -> Metric | None:
        """Return what errors in a matrix cost, from the second moments of its layer's input.

        None where nothing was measured, as of an expert that no token reached.
        """
        if name in self.rows:
            rows = self.rows[name]
            return Metric(float(rows.mean()), _damped(rows), None if moments is None else normal(moments))
        parts = self._uses(name, moments)
        if not parts:
            return None
        # The sum of two Kronecker products is brought to one by the mean of each factor.
        right = torch.stack([rows.mean() * of_input for rows, of_input in parts]).sum(0)
        rows = torch.stack([rows * of_input.diagonal().mean() for rows, of_input in parts]).sum(0)
        return Metric(float(right.diagonal().mean()), _damped(rows), normal(right))

    def _uses(self, name: str, moments: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Return `rows` and `right` of each use of a matrix; a tied one has two."""
        found = []
        if moments is not None and name in self.outputs:
            # An expert's gradients and inputs are sums over its own tokens, and each is told over all tokens.
            found.append((self.outputs[name], moments / self.reached.get(name, 1.0)))
        if name in self.reads:
            found.append((self.reads[name], self.read_outputs[name]))
        return found


def input_metric(moments: Tensor | None) -> Metric:
    """Return what errors cost when only the second moments of the layer's input are known, or nothing at all."""
    if moments is None:
        return Metric()
    return Metric(float(moments.diagonal().mean()), None, normal(moments))


def normal(moments: Tensor) -> Tensor:
    """Return moments with a diagonal of mean 1."""
    return moments / moments.diagonal().mean().clamp(min=torch.finfo(moments.dtype).tiny)


def _damped(rows: Tensor) -> Tensor:
    """Return what rows cost with mean 1, and none of them nothing."""
    return (rows / rows.mean().clamp(min=torch.finfo(rows.dtype).tiny) + DAMPING) / (1 + DAMPING)
