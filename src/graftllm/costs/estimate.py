"""Amounts on hardware: hours, memory and disk, and whether it fits."""

from collections.abc import Sequence
from dataclasses import dataclass

from graftllm.costs.amounts import Amount, Asked
from graftllm.costs.hardware import USABLE, Hardware
from graftllm.packing_options import DEFAULT_SHARE, PackOptions, budget_bytes
from graftllm.training.memory import activation_bytes, fit_batch, held_bytes

TRAINING_SHARE = 0.4  # of the peak that training reaches, recomputed activations not counted
READING_SHARE = 0.3
SAMPLING_SHARE = 0.05  # `generate` of transformers; inference servers reach several times that
PACKING_S = 270e-9  # core seconds a parameter, `auto`: 342 s for 1.27 B parameters (LOG.md, benchmarks/scale.py)


@dataclass(frozen=True)
class Estimate:
    """What an amount takes on some hardware.

    Attributes:
        amount: of what.
        hours: by the clock; None for what endpoints do.
        devices: at work.
        memory_bytes: at the peak, on each device.
        fits: whether a device has that.
        how: of a training, the rows at once and whether activations are computed twice.
        rows_left: of a batch that the devices cannot share evenly.
    """

    amount: Amount
    hours: float | None
    devices: int
    memory_bytes: float
    fits: bool
    how: str = ""
    rows_left: int = 0

    @property
    def device_hours(self) -> float:
        """Hours times devices."""
        return (self.hours or 0) * self.devices


def estimate(amount: Amount, on: Hardware, *, sharded: bool, processes: int | None = None) -> Estimate:
    """Return what an amount takes on hardware.

    Args:
        amount: of what.
        on: devices; only training takes more than one.
        sharded: whether trainings share weights and optimizer out over the devices.
        processes: that train together; one a device by default.
    """
    if amount.model is None:
        return Estimate(amount, None, 0, 0, True)
    number, shape = 2 if on.chip.gpu else 4, amount.model.shape
    room = USABLE * on.chip.memory_bytes
    if amount.way == "train":
        return _trained(amount, on, processes or on.count, sharded=sharded, number=number)
    memory = float(number * shape.parameters)
    if amount.way == "generate":
        cached = 2 * shape.layers * shape.keys * amount.longest
        memory += amount.sequences * (number * cached + 4 * shape.vocabulary)
        share = SAMPLING_SHARE
    else:
        memory += amount.sequences * number * amount.longest * (4 * shape.width + 2 * shape.inner)
        share = READING_SHARE
    seconds = amount.flops / (share * on.chip.peak_flops)
    if amount.way == "pack":  # the model is read layer by layer, matrices one by one
        layer = (shape.parameters - shape.vocabulary * shape.width) / shape.layers
        memory = 4.0 * max(3 * shape.vocabulary * shape.width, 2 * layer)
        seconds += PACKING_S * shape.parameters
    return Estimate(amount, seconds / 3600, 1, memory, memory <= room)


def _trained(amount: Amount, on: Hardware, processes: int, *, sharded: bool, number: int) -> Estimate:
    assert amount.model is not None and amount.options is not None
    shape, options = amount.model.shape, amount.options
    held = held_bytes(shape, amount.trained, processes=processes, sharded=sharded)
    room = USABLE * on.chip.memory_bytes if on.chip.gpu else 0.5 * on.chip.memory_bytes
    share, rest = divmod(options.batch_size, processes)
    batching = fit_batch(
        shape, room - held, max(1, share), options.micro_batch, tokens=amount.longest, number=number
    )  # fmt: skip
    again = batching.checkpointing
    memory = held + batching.rows * activation_bytes(shape, amount.longest, checkpointing=again, number=number)
    hours = amount.flops / (TRAINING_SHARE * on.chip.peak_flops * processes) / 3600
    how = f"{batching.rows} of {share} rows at once{', activations twice' if again else ''}"
    if rest:
        how = f"batch_size {options.batch_size} cannot be divided by {processes}"
    return Estimate(amount, hours, processes, memory, memory <= room and not rest, how, rest)


def pack_bytes(options: PackOptions, tuned_bytes: float) -> float | None:
    """Return the size of a pack by its options; None where only packing tells."""
    if options.budget is not None and not options.layered:
        return None if options.divergence is not None else budget_bytes(options.budget, round(tuned_bytes))
    return DEFAULT_SHARE * tuned_bytes if options.strategy == "auto" else None


def disk_bytes(asked: Asked, found: Sequence[Amount]) -> float:
    """Return what a run writes at most: answers, checkpoints, and the trainer's own while it trains.

    Models that are downloaded are not counted.
    """
    parameters, skills = asked.target.shape.parameters, len(asked.recipe.skills)
    answers = 3 * 5 * sum(one.tokens_out for one in found)  # three files of them, five bytes a token
    checkpoints = 2 * parameters * skills * (2 if asked.recipe.dpo else 1)
    trainer = 2 * (4 * parameters + 8 * asked.trained)  # the next is written before it goes
    packed = 2 * skills * (pack_bytes(asked.recipe.pack, 2 * parameters) or 2 * parameters)
    return answers + checkpoints + trainer + packed
