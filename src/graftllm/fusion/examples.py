"""What a router keeps of each class's prompts, so that it can be trained again without them.

A sample of the prompts' features, one byte a number. Nothing here knows layers, texts or packs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def keep_examples(features: Tensor, count: int, *, seed: int) -> Examples:
    """Draw at most `count` rows of features, and keep them in a byte a number.

    Args:
        features: shape (prompts, width).
        count: rows to keep.
        seed: of the draw; the same rows and seed give the same examples.
    """
    draw = torch.Generator().manual_seed(seed)
    kept = features[torch.randperm(len(features), generator=draw)[:count]].float()
    scales = kept.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return Examples((kept / scales).round().to(torch.int8), scales)
