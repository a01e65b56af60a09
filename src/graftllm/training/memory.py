"""What training takes of a device's memory, estimated from a model's shape: weights, optimizer, activations.

Weights, gradients and the two moments of Adam are float32, activations bfloat16 on a GPU. Nothing is
measured here, and no device is asked; fragments and the libraries' own buffers are not counted.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder as far as memory depends on it; `inner` is the width of its MLP, `keys` that of keys and values."""

    parameters: int
    layers: int
    width: int
    inner: int
    keys: int
    vocabulary: int
    tied: bool = False


@dataclass(frozen=True)
class Batching:
    """How a batch goes through a device.

    Attributes:
        rows: in memory at once.
        accumulate: how often, for one optimizer step.
        checkpointing: whether activations are computed again in the backward pass rather than kept.
    """

    rows: int
    accumulate: int
    checkpointing: bool


def held_bytes(shape: Shape, trained: int, *, processes: int = 1, sharded: bool = False) -> float:
    """Return what each process holds whatever the batch: weights, and gradients and moments of what is trained.

    Args:
        shape: the model's.
        trained: number of parameters that are trained.
        processes: that train together.
        sharded: whether they share all that out (FSDP, ZeRO-3) and gather the outermost layer and two others when
            they need them; else each holds everything, and a copy of the gradients to exchange.
    """
    whole = 4 * shape.parameters + 12 * trained
    if processes == 1:
        return whole
    if not sharded:
        return whole + 4 * trained
    outer = shape.vocabulary * shape.width * (1 if shape.tied else 2)
    layer = max(0, shape.parameters - outer) / shape.layers
    return whole / processes + 6 * (outer + 2 * layer)  # weights in bfloat16, gradients in float32


def activation_bytes(shape: Shape, tokens: int, *, checkpointing: bool, number: int) -> float:
    """Return what one row of `tokens` tokens adds; `number` is the bytes of an activation, 2 on a GPU, 4 on a CPU."""
    layer = number * (16 * shape.width + 4 * shape.inner)
    layers = shape.layers * number * shape.width + layer if checkpointing else shape.layers * layer
    head = 12 * shape.vocabulary  # logits, their softmax and its gradient, in float32
    return tokens * (layers + head)


def fit_batch(shape: Shape, free: float, share: int, wanted: int | None, *, tokens: int, number: int) -> Batching:
    """Return how a batch fits into memory; at least one row goes at once, whether it fits or not.

    Args:
        shape: the model's.
        free: bytes that `held_bytes` leaves.
        share: rows of a batch that one process has; the rows at once divide it evenly.
        wanted: rows at once, if that is given.
        tokens: of the longest row.
        number: bytes of an activation.
    """
    plainly, sparingly = (
        int(free / activation_bytes(shape, tokens, checkpointing=again, number=number)) for again in (False, True)
    )
    rows = wanted or next(rows for rows in range(share, 0, -1) if share % rows == 0 and rows <= max(1, sparingly))
    return Batching(rows, share // rows, plainly < (wanted or share))
