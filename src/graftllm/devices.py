"""Which device the work is done on, and how much memory there is."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from graftllm.errors import CheckpointError, first_line


def gpus(device: str) -> int:
    """Return how many GPUs a device may stand for: all that are here for `auto` and `cuda`, else 0 or 1."""
    if resolve_device(device).type != "cuda":
        return 0
    return torch.cuda.device_count() if device in ("auto", "cuda") else 1


def memory_bytes() -> int:
    """Return how much memory the machine has, or the container that this runs in."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no such limit here
        return total


def free_bytes(device: torch.device) -> int:
    """Return how much memory is left on a device; where that is not known, as much as the machine has."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = memory_bytes()
    if device.type == "cpu":
        with suppress(OSError, ValueError):
            found = min(found, _told("/proc/meminfo", "MemAvailable:") * 1024)
        with suppress(OSError, ValueError):  # caches of files do not count
            found = min(found, memory_bytes() - _told("/sys/fs/cgroup/memory.stat", "anon "))
    return found


def _told(file: str, key: str) -> int:
    """Return the number that a line of a file of the system has after its key."""
    for line in Path(file).read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.removeprefix(key).split()[0])
    raise ValueError(f"{file}: no {key!r}")


def use_own_gpu(device: str, worker: int) -> None:
    """Let `auto` and `cuda` in this thread, one of several workers, stand for a GPU that few others use."""
    if (found := gpus(device)) > 1:
        torch.cuda.set_device(worker % found)


def resolve_device(device: str) -> torch.device:
    """Return the device that `auto` stands for (a GPU when there is one), or the named one.

    Raises:
        CheckpointError: PyTorch does not know the device or cannot reach it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.zeros(1, device=device)
        found.item()  # a device without values, such as meta, will not do
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, not built in, without values
        raise CheckpointError(
            f"device: expected auto, cpu or a device that PyTorch sees here, found {device!r} ({first_line(error)})."
        ) from error
