"""Where a packing keeps its finished work: a directory of small files, each whole or not there.

The directory belongs to one packing, told by a key over everything that its results depend on. Work
that was killed is found again under the same key; under another key the directory starts empty.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from weakref import finalize

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import StorageError
from graftllm.packing_options import PackOptions
from graftllm.records import Prompt
from graftllm.storage import only_writer, partial_of, write_text

_KEY = "packing.key"


@dataclass(frozen=True)
class Workspace:
    """A directory of finished work."""

    directory: Path

    @classmethod
    def temporary(cls) -> "Workspace":
        """Return a new one that goes with its last user."""
        directory = tempfile.TemporaryDirectory(prefix="packing-")
        made = cls(Path(directory.name))
        finalize(made, directory.cleanup)
        return made

    def remove(self) -> None:
        """Delete the directory as far as that can be done: what was packed is saved."""
        with suppress(OSError):
            _empty(self.directory)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def open_workspace(directory: Path, key: str) -> Iterator[Workspace]:
    """Hold a directory for a packing; what another one left there is deleted.

    Raises:
        StorageError: another process packs there now, or the directory holds something else or cannot be cleared up.
    """
    with only_writer(directory):
        marker = directory / _KEY
        strange = [path.name for path in directory.iterdir() if path.name != partial_of(marker).name]
        if strange and not marker.exists():
            raise StorageError(
                f"{directory}: expected nothing or an unfinished packing there, found {strange[0]}. "
                "Choose another place."
            )
        if not marker.exists() or marker.read_text(encoding="utf-8") != key:
            try:
                _empty(directory)
            except OSError as error:
                raise StorageError(f"{directory}: cannot be cleared up ({error.strerror}). Delete it.") from error
            write_text(marker, key)
        yield Workspace(directory)


def _empty(directory: Path) -> None:
    """Delete all but the marker, which goes last: what a kill leaves is known as a packing's."""
    for path in directory.iterdir():
        if path.name != _KEY:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def packing_key(delta: Delta, options: PackOptions, calibration: Sequence[Prompt], device: str) -> str:
    """Return a digest of everything that finished work depends on; a budget only says which work there is."""
    parts = [
        options.model_copy(update={"budget": None}).model_dump(mode="json"),
        *map(_identity, (delta.base, delta.tuned)),
        [asdict(row) for row in calibration],
        device,
        _code(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _identity(checkpoint: Checkpoint) -> list[object]:
    """Return what a change of the weights or the tokenizer would change."""
    return [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.sources]


@cache
def _code() -> list[str]:
    """Return a digest of our code, and the versions of what calculates: other code may give other bits."""
    home = Path(__file__).parent.parent
    sources = b"".join(path.read_bytes() for path in sorted(home.rglob("*.py")))
    return [hashlib.sha256(sources).hexdigest(), *map(version, ("torch", "numpy", "constriction", "transformers"))]
