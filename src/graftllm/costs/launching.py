"""How `accelerate launch` would share a training out, by a configuration file that accelerate itself reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.config.config_args import load_config_from_file

from graftllm.costs.hardware import Hardware, hardware
from graftllm.errors import RecipeError


@dataclass(frozen=True)
class Launch:
    """A launch: processes, machines, and what they share out.

    Attributes:
        kind: FSDP2, DeepSpeed ZeRO-3, or plain data parallelism.
        processes: in all.
        machines: that they run on.
        sharded: whether weights, gradients and optimizer are shared out.
        precision: of activations, such as `bf16`.
    """

    kind: str
    processes: int
    machines: int
    sharded: bool
    precision: str


def read_launch(path: Path) -> Launch:
    """Read a configuration of accelerate's.

    Raises:
        RecipeError: accelerate cannot read it, or it shares out only a part.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such accelerate configuration; recipes/accelerate/ has some to start from.")
    try:
        config: Any = load_config_from_file(str(path))
        kind, stage = str(getattr(config.distributed_type, "value", config.distributed_type)), 0
        if kind == "FSDP":
            stage = int(config.fsdp_config.get("fsdp_version", 1))
        elif kind == "DEEPSPEED":
            stage = int(config.deepspeed_config.get("zero_stage", 2))
        processes, machines = int(config.num_processes), int(config.num_machines)
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: accelerate cannot read it ({' '.join(str(error).split())}).") from error
    if (kind, stage) in (("FSDP", 1), ("DEEPSPEED", 1), ("DEEPSPEED", 2)):
        name = "fsdp_version" if kind == "FSDP" else "zero_stage"
        raise RecipeError(f"{path}: expected {name} {2 if kind == 'FSDP' else 3}, found {stage}; write that.")
    if processes % machines:
        raise RecipeError(
            f"{path}: expected num_processes, of all machines together, to be a multiple of num_machines {machines}, "
            f"found {processes}."
        )
    told = {"FSDP": "FSDP2", "DEEPSPEED": "DeepSpeed ZeRO-3"}.get(kind, "every process holds everything")
    return Launch(told, processes, machines, kind in ("FSDP", "DEEPSPEED"), str(config.mixed_precision or "no"))


def fitting(launch: Launch, on: Hardware | None) -> Hardware:
    """Return the hardware that a launch runs on: what is given, or its number of H100.

    Raises:
        RecipeError: the launch has more or fewer processes or machines than the hardware has devices.
    """
    each = launch.processes // launch.machines
    if on is None:
        return hardware(f"{launch.machines}x{each}xh100" if launch.machines > 1 else f"{each}xh100")
    if on.chip.gpu and (on.devices, on.machines) != (each, launch.machines):
        raise RecipeError(
            f"--hardware: expected {launch.processes} devices on {launch.machines} machines, as the accelerate "
            f"configuration has processes, found {on.name}; change one of them."
        )
    return on
