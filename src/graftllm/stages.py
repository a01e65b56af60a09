"""Steps of long work that are done once: each leaves a stamp, and is skipped while the stamp holds.

A stamp holds while the step's inputs are the same and what it made is still there. Stamps also
keep each step's result and what it took, so that a report can be made of several runs. What a killed
attempt took is kept too, and added to that of the attempt that goes on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel

from graftllm.launched import leads, wait_until
from graftllm.metering import Spent, metered
from graftllm.storage import CHECKPOINT_FILES, write_text, writing

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None


@dataclass(frozen=True)
class Stamp:
    """What is remembered of a finished step: its name, the hash of its inputs, its result, and what it took."""

    name: str
    key: str
    result: Json
    seconds: float
    peak_memory_bytes: int
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_gpu_bytes: int = 0

    @property
    def spent(self) -> Spent:
        """What all attempts at the step took together."""
        return Spent(self.seconds, self.cpu_seconds, self.gpu_seconds, self.peak_memory_bytes, self.peak_gpu_bytes)


@dataclass(frozen=True)
class Stages:
    """The finished steps of one run directory; which of them this process has needed, and what it is at."""

    directory: Path
    used: dict[str, Stamp] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict, repr=False)  # of files, by what tells that they are the same
    running: dict[str, Callable[[], Spent]] = field(default_factory=dict)

    def run(
        self,
        name: str,
        inputs: Sequence[Any],
        makes: Sequence[Path],
        action: Callable[[], Json],
        *,
        unfinished: Sequence[Path] = (),
        together: bool = False,
    ) -> Stamp:
        """Do a step unless it is done; return its stamp.

        Of several processes that were launched together only the first does it; the others wait for its stamp.

        Args:
            name: such as `sample.math`; the part before the first dot is the kind of step.
            inputs: what the result depends on: options, stamps of earlier steps, and paths, of which the content
                counts: of files, or of a model's files in a directory.
            makes: files and directories that the step leaves behind.
            action: does the step; its result must be JSON.
            unfinished: files that a killed attempt may go on with. Those of other inputs are deleted first.
            together: whether all processes do it, as they train; still only the first may write.
        """
        key = self.key_of(inputs)
        path = self.directory / f"{name}.json"
        if (stamp := _holding(path, key, makes)) is None and not leads():
            if together:
                action()
            wait_until(lambda: _holding(path, key, makes) is not None)
            stamp = _holding(path, key, makes)
        if stamp is not None:
            self.used[name] = stamp
            return stamp
        _delete(path)
        marker = self.directory / f"{name}.started"
        before = self._begin(key, marker, unfinished)
        with metered(lambda spent: _mark(marker, key, before + spent)) as spent:
            self.running[name] = lambda: before + spent()
            try:
                result = action()
                stamp = Stamp(name, key, result, **asdict(self.running[name]()))
            finally:
                del self.running[name]
        write_text(path, json.dumps(asdict(stamp), indent=1))
        _delete(marker)
        self.used[name] = stamp
        return stamp

    def key_of(self, inputs: Sequence[Any]) -> str:
        """Return a hash of inputs, which is another one when one of them changes.

        A file is read once: its hash is remembered in the run's directory, until its size or time of change is another.
        """
        kept = self.directory / "files.sha256"
        if not self.hashes and kept.exists():
            with suppress(ValueError, TypeError):  # damaged: files are hashed again
                self.hashes.update(json.loads(kept.read_text(encoding="utf-8")))
        before = len(self.hashes)
        text = json.dumps([_identity(part, self.hashes) for part in inputs], sort_keys=True)
        if len(self.hashes) > before and leads():
            write_text(kept, json.dumps(self.hashes, indent=1))
        return hashlib.sha256(text.encode()).hexdigest()

    def forget(self, name: str) -> None:
        """Let a step be done again, for a reason that its inputs do not tell."""
        if leads():
            _delete(self.directory / f"{name}.json")

    def spent_on(self, name: str) -> Spent:
        """Return what a step that is under way has taken up to now, earlier attempts included."""
        return self.running[name]()

    def _begin(self, key: str, marker: Path, unfinished: Sequence[Path]) -> Spent:
        """Return what earlier attempts took; what those with other inputs left is deleted."""
        found, spent = _marked(marker)
        if found != key:
            for path in unfinished:
                _delete(path)
            spent = Spent()
            _mark(marker, key, spent)
        return spent


def _holding(path: Path, key: str, makes: Sequence[Path]) -> Stamp | None:
    """Return the stamp at a path if it holds: the inputs are its own, and what the step made is there."""
    if not path.exists() or not all(made.exists() for made in makes):
        return None
    try:
        stamp = Stamp(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # damaged: the step is done again
        return None
    return stamp if stamp.key == key else None


def _delete(path: Path) -> None:
    with writing(path):
        path.unlink(missing_ok=True)


def _mark(marker: Path, key: str, spent: Spent) -> None:
    """Write that an attempt with these inputs has begun, and what it has taken."""
    write_text(marker, f"{key}\n{json.dumps(asdict(spent))}")


def _marked(marker: Path) -> tuple[str, Spent]:
    """Return the inputs of the attempt that a marker tells of, and what it took."""
    if not marker.exists():
        return "", Spent()
    key, _, spent = marker.read_text(encoding="utf-8").partition("\n")
    try:
        return key, Spent(**json.loads(spent or "{}"))
    except (ValueError, TypeError):
        return key, Spent()


def _identity(part: Any, hashes: dict[str, str]) -> Json:
    """Return what a change of an input would change."""
    if isinstance(part, BaseModel):
        return part.model_dump(mode="json")
    if isinstance(part, Stamp):
        return part.key
    if isinstance(part, Path):
        with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter to others
            found = threads.map(partial(_hash, hashes=hashes), files := files_of(part))
            return {file.relative_to(part).as_posix(): digest for file, digest in zip(files, found, strict=True)}
    return part


def files_of(part: Path) -> list[Path]:
    """Return a file itself, or those files in a directory that a model is read from."""
    if not part.is_dir():
        return [part] if part.exists() else []
    return sorted(file for file in part.rglob("*") if file.suffix in CHECKPOINT_FILES and file.is_file())


def _hash(file: Path, hashes: dict[str, str]) -> str:
    """Return the SHA-256 of a file, from `hashes` where they have it."""
    stat = file.stat()
    known = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    if known not in hashes:
        with open(file, "rb") as opened:
            hashes[known] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes[known]
