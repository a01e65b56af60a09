"""What a router keeps of each class's prompts, so that it can be trained again without them.

Some of the prompts' features, one byte a number. Nothing here knows layers, texts or packs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graftllm.recipe import RouterOptions
from graftllm.threads import one_thread

WIDEST = 512  # numbers of a prompt's features; longer vectors are folded


@dataclass(frozen=True)
class Examples:
    """Features of some prompts of one class.

    Attributes:
        codes: shape (prompts, width), int8.
        scales: shape (prompts, 1), float32; features are codes times these.
    """

    codes: Tensor
    scales: Tensor

    @property
    def features(self) -> Tensor:
        """Shape (prompts, width), float32."""
        return self.codes.float() * self.scales

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.codes)


def keep_examples(features: Tensor, count: int, drawn: int, *, seed: int) -> Examples:
    """Keep at most `count` rows of features in a byte a number: some of them drawn, the rest to cover the others.

    Each of the rest is the row that is farthest from all that are kept already (Gonzalez 1985), so that rare
    kinds of a class's prompts are not left out by chance, and are known as its own when they come again.

    Args:
        features: shape (prompts, width).
        count: rows to keep.
        drawn: how many of them, the first, are a sample.
        seed: of the draw; the same rows and seed give the same examples, by any number of threads.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = features[torch.randperm(len(features), generator=draw)].float()
    if len(rows) > count:
        with one_thread():
            rows = rows[_covering(rows, count, drawn)]
    scales = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return Examples((rows / scales).round().to(torch.int8), scales)


def keep_asked(features: Tensor, options: RouterOptions, *, seed: int) -> Examples:
    """Keep what a router knows of the prompts that ask for a pack."""
    return keep_examples(features, options.samples, options.samples // 2, seed=seed)


def keep_general(features: Tensor, options: RouterOptions, *, seed: int) -> Examples:
    """Keep what a router knows of general prompts: twice as many, so that there is room for a sample and rare kinds."""
    return keep_examples(features, 2 * options.samples, _drawn(options), seed=seed)


def sampled(options: RouterOptions, count: int) -> int:
    """Return how many of `count` general examples, the first, are a sample of all general prompts."""
    return count if count < 2 * options.samples else _drawn(options)


def _drawn(options: RouterOptions) -> int:
    """Return how many of the general prompts are drawn: half, or so many that one of them may belong to a pack."""
    return min(2 * options.samples, max(options.samples, math.ceil(2 / options.false_accept) - 1))


def _covering(rows: Tensor, count: int, drawn: int) -> list[int]:
    """Return the numbers of the first `drawn` rows, and of those, `count` in all, that are farthest from all before."""
    lengths = rows.square().sum(dim=1)
    nearest, kept = torch.full_like(lengths, torch.inf), list(range(drawn))
    for place in range(count):
        if place == len(kept):
            kept.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, lengths + lengths[kept[place]] - 2 * (rows @ rows[kept[place]]))
    return kept
