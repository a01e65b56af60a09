"""Methods that keep a low-rank part for each task, which a router serves."""

import math

from torch import Tensor

from graftllm.compression.lowrank import truncated_svd
from graftllm.fusion.methods.sums import task_arithmetic
from graftllm.fusion.methods.tasks import Knobs, Merge, Tasks


def twin(tasks: Tasks, knobs: Knobs) -> Merge:
    """One model a task: what task arithmetic makes of all, and the leading `rank` directions of what it lacks.

    The paper mixes the tasks' own parts by the router's probabilities; here one task has all of it.
    """
    shared = task_arithmetic(tasks, knobs)

    def merge(name: str, stack: Tensor, task: int) -> Tensor:
        common = shared(name, stack, task)
        return common + truncated(stack[task] - common, knobs.rank)

    return merge


def routed_lora(tasks: Tasks, knobs: Knobs) -> Merge:
    """One model a task: the leading `rank` directions of each matrix's delta; vectors whole."""
    return lambda name, stack, task: knobs.scale * truncated(tasks.weights[task] * stack[task], knobs.rank)


def truncated(delta: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank to a matrix; whole where factors would not be smaller, or no matrix."""
    if factor_parameters(tuple(delta.shape), rank) == delta.numel():
        return delta
    u, s, vh = truncated_svd(delta, rank)
    return (u * s) @ vh


def factor_parameters(shape: tuple[int, ...], rank: int) -> int:
    """Return how many numbers `truncated` keeps of a delta."""
    whole = math.prod(shape)
    return min(whole, rank * sum(shape)) if len(shape) == 2 else whole
