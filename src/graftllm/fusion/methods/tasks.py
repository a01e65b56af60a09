"""What a merging method sees: the deltas of several tuned models, by parameter, and its knobs.

A method is a function that looks at the whole model as often as it needs (each look decodes every
delta once, one parameter at a time) and returns what merges one parameter.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graftllm.compression.prices import Calibration
from graftllm.progress import track


@dataclass(frozen=True)
class Tasks:
    """Deltas to merge.

    Attributes:
        names: of the n tasks; random draws go by them, so that no order of the tasks matters.
        weights: shape (n,), float32.
        deltas: by parameter name, shape (n, *shape), float32; may be computed when asked for.
        calibrations: what each task's layers saw, where a method needs it.
    """

    names: tuple[str, ...]
    weights: Tensor
    deltas: Mapping[str, Tensor]
    calibrations: tuple[Calibration, ...] = ()

    def stacks(self) -> Iterator[Tensor]:
        """Yield the deltas of one parameter after the other: one look at the whole model."""
        for name in track(list(self.deltas), label="looking"):
            yield self.deltas[name]

    def weighted(self, stack: Tensor) -> Tensor:
        """Return deltas times their weights."""
        return stack * along(self.weights, stack)


@dataclass(frozen=True)
class Knobs:
    """What can be set of a method; each method has some of them, with defaults of its own.

    Attributes:
        scale: factor of the merged delta (lambda).
        density: share of the entries kept.
        threshold: how much of the other tasks' sum an entry must exceed to count as a task's own.
        rank: of a task's own part.
        seed: of random draws.
    """

    scale: float = 1.0
    density: float = 1.0
    threshold: float = 0.4
    rank: int = 8
    seed: int = 0


Merge = Callable[[str, Tensor, int], Tensor]  # parameter name, its deltas (n, *shape), task -> merged delta (*shape)
Prepare = Callable[[Tasks, Knobs], Merge]


def along(values: Tensor, stack: Tensor) -> Tensor:
    """Return one value a task, shape (n,), so that it multiplies a stack of shape (n, *shape)."""
    return values.reshape(-1, *[1] * (stack.ndim - 1))


def flat(stack: Tensor) -> Tensor:
    """Return a stack of shape (n, *shape) as (n, entries); a parameter that is a single number has one."""
    return stack.reshape(len(stack), -1)


def drawn(shape: tuple[int, ...], seed: int, task: str, name: str) -> Tensor:
    """Return uniform numbers in [0, 1) for one task's parameter; the same for the same seed and names."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {task} {name}".encode()))
    return torch.rand(shape, generator=draw)
