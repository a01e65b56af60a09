"""Machines to estimate for: how many devices, their memory, and how fast they are on paper.

Peaks are the makers' for dense bfloat16 with float32 sums (without sparsity); of a processor core it is float32 at
three gigahertz and 16 multiply-adds a cycle.
"""

import re
from dataclasses import dataclass

from graftllm.errors import RecipeError

USABLE = 0.9  # of a device's memory


@dataclass(frozen=True)
class Chip:
    """A device: bytes of memory, peak operations per second, and whether it is a GPU."""

    name: str
    memory_bytes: float
    peak_flops: float
    gpu: bool = True


CHIPS = {
    "4090": Chip("NVIDIA RTX 4090", 24e9, 165e12),
    "l40s": Chip("NVIDIA L40S", 48e9, 362e12),
    "a100": Chip("NVIDIA A100 SXM", 80e9, 312e12),
    "h100": Chip("NVIDIA H100 SXM", 80e9, 989e12),
    "h200": Chip("NVIDIA H200 SXM", 141e9, 989e12),
    "b200": Chip("NVIDIA B200 SXM", 180e9, 2250e12),
    "mi300x": Chip("AMD MI300X", 192e9, 1307e12),
}
_CORE = Chip("processor core", 8e9, 96e9, gpu=False)
ROWS = ("cpu-2", "1x4090", "1xh100", "1xh200", "8xh100", "2x8xh100")


@dataclass(frozen=True)
class Hardware:
    """Equal devices, `devices` in each of `machines`; the cores of a processor count as one device."""

    name: str
    chip: Chip
    devices: int = 1
    machines: int = 1

    @property
    def count(self) -> int:
        """How many devices train together."""
        return self.devices * self.machines

    def __str__(self) -> str:
        memory = f"{self.chip.memory_bytes / 1e9:.0f} GB"
        peak = f"{self.chip.peak_flops / 1e12:.3g} TFLOP/s"
        many = f"{self.machines} machines with " * (self.machines > 1) + f"{self.devices} x "
        return f"{many}{self.chip.name}, {memory} and {peak} each"


def hardware(name: str) -> Hardware:
    """Return the machines that a name such as `cpu-2`, `1xh100` or `2x8xh200` stands for.

    Raises:
        RecipeError: it is no such name.
    """
    if found := re.fullmatch(r"cpu-([1-9]\d{0,3})", name):
        cores = int(found[1])
        chip = Chip(f"{cores} processor cores", cores * _CORE.memory_bytes, cores * _CORE.peak_flops, gpu=False)
        return Hardware(name, chip)
    found = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-9]\d{0,3})x([a-z0-9]+)", name)
    if found is None or found[3] not in CHIPS:
        raise RecipeError(
            f"--hardware: expected cpu-CORES, COUNTxGPU or MACHINESxCOUNTxGPU such as 2x8xh100, found {name!r}; "
            f"GPUs are {', '.join(CHIPS)}."
        )
    return Hardware(name, CHIPS[found[3]], int(found[2]), int(found[1] or 1))
