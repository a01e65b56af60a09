"""Which device the work is done on, and how much memory there is."""

import os
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
