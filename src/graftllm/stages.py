"""Steps of long work that are done once: each leaves a stamp, and is skipped while the stamp holds.

A stamp holds while the step's inputs are the same and what it made is still there. Stamps also
keep each step's result, seconds and peak memory, so that a report can be made of several runs.
"""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel

from graftllm.storage import write_text

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None


@dataclass(frozen=True)
class Stamp:
    """What is remembered of a finished step: its name, the hash of its inputs, its result and its cost."""

    name: str
    key: str
    result: Json
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Stages:
    """The finished steps of one run directory, and which of them this process has needed."""

    directory: Path
    used: dict[str, Stamp] = field(default_factory=dict)

    def run(
        self,
        name: str,
        inputs: Sequence[Any],
        makes: Sequence[Path],
        action: Callable[[], Json],
        *,
        unfinished: Sequence[Path] = (),
    ) -> Stamp:
        """Do a step unless it is done; return its stamp.

        Args:
            name: such as `sample.math`; the part before the first dot is the kind of step.
            inputs: what the result depends on: options, stamps of earlier steps, and paths (which count as changed
                when a size or a time of change does).
            makes: files and directories that the step leaves behind.
            action: does the step; its result must be JSON.
            unfinished: files that a killed attempt may go on with. Those of other inputs are deleted first.
        """
        key = hashlib.sha256(json.dumps([_identity(part) for part in inputs], sort_keys=True).encode()).hexdigest()
        path = self.directory / f"{name}.json"
        if path.exists() and all(made.exists() for made in makes):
            stamp = Stamp(**json.loads(path.read_text(encoding="utf-8")))
            if stamp.key == key:
                self.used[name] = stamp
                return stamp
        path.unlink(missing_ok=True)
        self._clear_unless(key, self.directory / f"{name}.started", unfinished)
        started = time.monotonic()
        result = action()
        stamp = Stamp(name, key, result, round(time.monotonic() - started, 2), peak_memory_bytes())
        write_text(path, json.dumps(asdict(stamp), indent=1))
        (self.directory / f"{name}.started").unlink()
        self.used[name] = stamp
        return stamp

    def _clear_unless(self, key: str, marker: Path, unfinished: Sequence[Path]) -> None:
        """Delete what an attempt with other inputs left, and mark that this one has begun."""
        if not marker.exists() or marker.read_text(encoding="utf-8") != key:
            for path in unfinished:
                path.unlink(missing_ok=True)
            write_text(marker, key)


def peak_memory_bytes() -> int:
    """Return the most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _identity(part: Any) -> Json:
    """Return what a change of an input would change."""
    if isinstance(part, BaseModel):
        return part.model_dump(mode="json")
    if isinstance(part, Stamp):
        return part.key
    if isinstance(part, Path):
        files = sorted(part.rglob("*")) if part.is_dir() else [part]
        stats = [(str(file), file.stat()) for file in files if file.is_file()]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return part
