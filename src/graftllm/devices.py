"""Which device the work is done on, and how much memory there is."""

import os
from bisect import bisect_right
from collections.abc import Iterable
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
    limits = [limit for limit, _ in map(_group_memory, _GROUPS) if limit]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])


def free_bytes(device: torch.device) -> int:
    """Return how much memory is left on a device; where that is not known, as much as the machine has."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = memory_bytes()
    if device.type == "cpu":
        with suppress(OSError, KeyError):
            found = min(found, 1024 * _numbers(Path("/proc/meminfo"))["MemAvailable:"])
        found = min([found, *(limit - used for limit, used in map(_group_memory, _GROUPS) if limit)])
    return max(found, 0)


_SHARE = 0.75  # of what is free


def room_bytes(device: torch.device) -> int:
    """Return how much of a device's free memory packs may take; the rest is for answering."""
    return int(_SHARE * free_bytes(device))


_GROUPS = (  # Linux's control groups, versions 2 and 1: where, the files of the limit and of what is used, its caches
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "{}active_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_{}active_file"),
)


def _group_memory(group: tuple[Path, str, str, str]) -> tuple[int, int]:
    """Return the limit of a control group, in bytes, and what is used of it, caches of files left out; 0 for none."""
    place, limit, used, cache = group
    try:
        most, taken = (int((place / file).read_text(encoding="ascii")) for file in (limit, used))
        told = _numbers(place / "memory.stat")
    except (OSError, ValueError):  # there is none, or no limit ("max")
        return 0, 0
    return most, max(taken - told.get(cache.format(""), 0) - told.get(cache.format("in"), 0), 0)


def _numbers(file: Path) -> dict[str, int]:
    """Return the numbers of a file of the system that has a name and a number in each line."""
    lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def backed_by_files(addresses: Iterable[int]) -> set[int]:
    """Return those addresses of this process's memory whose pages are a file's until they are written to."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # a system that does not tell
        return set()
    ranges: list[tuple[int, int]] = []
    for line in lines:
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5].startswith("/"):
            start, end = (int(part, 16) for part in words[0].split("-"))
            ranges.append((start, end))
    starts = [start for start, _ in ranges]  # in order, as the system tells them
    found = ((address, bisect_right(starts, address) - 1) for address in addresses)
    return {address for address, at in found if at >= 0 and address < ranges[at][1]}


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
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # PyTorch's for an unknown name, a build without CUDA, and `meta`
        raise CheckpointError(
            f"device: expected auto, cpu or a device that PyTorch sees here, found {device!r} ({first_line(error)})."
        ) from error
