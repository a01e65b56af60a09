"""What this installation and this machine are fit for: packages against the supported ranges, devices, room, limits.

It looks and reports; it mends nothing, and asks nothing of the network.
"""

import os
import platform
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

_FEW_FILES = 1024  # open at once: a checkpoint of many shards and a server with clients need some
_LITTLE_ROOM = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        group: what kind of thing.
        name: which.
        found: how it is.
        problem: what is wrong with that, and how to mend it; nothing where it is fit.
    """

    group: str
    name: str
    found: str
    problem: str = ""


@dataclass(frozen=True)
class Examination:
    """All that was found."""

    findings: Sequence[Finding]

    @property
    def problems(self) -> list[str]:
        """What has to be mended, a line each."""
        return [f"{one.name}: {one.problem}" for one in self.findings if one.problem]

    @property
    def rows(self) -> list[list[str]]:
        """The findings as rows of a table: group, name, how it is."""
        return [
            [one.group, one.name, f"{one.found}  ({one.problem})" if one.problem else one.found]
            for one in self.findings
        ]

    def figures(self) -> dict[str, Any]:
        """Return what `graftllm doctor --json` prints."""
        groups: dict[str, dict[str, str]] = {}
        for one in self.findings:
            groups.setdefault(one.group, {})[one.name] = one.found
        return {"fit": not self.problems, "problems": self.problems, **groups}


def examine() -> Examination:
    """Look at everything."""
    looks = (_installation, _extras, _devices, _room, _hub, _sandbox, _limits)
    return Examination([finding for look in looks for finding in look()])


def _installation() -> Iterator[Finding]:
    yield Finding("system", "platform", platform.platform(terse=True))
    yield Finding("system", "python", platform.python_version())
    yield Finding("packages", "graftllm", metadata.version("graftllm"))
    for needed in _requirements():
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            yield _package(needed)


def _package(needed: Requirement) -> Finding:
    found = _version(needed.name)
    if found is None:
        return Finding("packages", needed.name, "absent", f"expected {needed.specifier}; pip install '{needed}'")
    fits = needed.specifier.contains(found, prereleases=True)
    mend = "" if fits else f"expected {needed.specifier}; pip install '{needed.name}{needed.specifier}'"
    return Finding("packages", needed.name, found, mend)


def _extras() -> Iterator[Finding]:
    for extra in sorted(metadata.metadata("graftllm").get_all("Provides-Extra") or []):
        wanted = [
            one
            for one in _requirements()
            if one.marker is not None
            and one.marker.evaluate({"extra": extra})
            and not one.marker.evaluate({"extra": ""})
        ]
        lacking = [one.name for one in wanted if one.name != "graftllm" and _version(one.name) is None]
        hint = f"lacks {', '.join(lacking)}: pip install 'graftllm[{extra}]'"
        yield Finding("extras", extra, hint if lacking else "installed")


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("devices", "cpu", f"{cores} cores, {torch.get_num_threads()} threads of PyTorch")
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield Finding("devices", f"cuda:{i}", f"{about.name}, {_gib(about.total_memory)}")
    if torch.backends.mps.is_available():
        yield Finding("devices", "mps", "available")


def _room() -> Iterator[Finding]:
    from huggingface_hub import constants

    from graftllm.devices import memory_bytes

    yield Finding("room", "memory", f"{_gib(memory_bytes())}")
    for name, place in (("disk here", Path.cwd()), ("disk of the Hub's cache", Path(constants.HF_HUB_CACHE))):
        free = shutil.disk_usage(next(one for one in (place, *place.parents) if one.exists())).free
        yield Finding("room", name, f"{_gib(free)} free", "make room for checkpoints" if free < _LITTLE_ROOM else "")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    yield Finding("hub", "endpoint", constants.ENDPOINT)
    yield Finding("hub", "offline", "yes, by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "no")
    yield Finding("hub", "token", "there" if get_token() else "none; `hf auth login` for private models and to push")


def _sandbox() -> Iterator[Finding]:
    from graftllm.sampling.sandbox import isolation_problem

    problem = isolation_problem()
    yield Finding("sandbox", "isolation", f"no: {problem}" if problem else "by namespaces, tried")


def _limits() -> Iterator[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 <= files < _FEW_FILES
    yield Finding("limits", "open files", _limit(files), f"raise it: ulimit -n {_FEW_FILES}" if few else "")
    yield Finding("limits", "processes", _limit(resource.getrlimit(resource.RLIMIT_NPROC)[0]))
    yield Finding("limits", "file size", _limit(resource.getrlimit(resource.RLIMIT_FSIZE)[0]))


def _requirements() -> list[Requirement]:
    return [Requirement(one) for one in metadata.requires("graftllm") or []]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
