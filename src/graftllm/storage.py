"""Files and directories that appear whole or not at all.

Everything is written beside its place under a hidden name and renamed at the end, so a process
killed at any moment leaves the old content or the new. (Where the system cannot exchange two
directories in one step, as Linux does, one that is replaced steps aside first: killed between these
two renamings, the next writer puts it back.) The hidden name is fixed and locked: a killed
writer's leftovers are reused by the next one, and two writers never mix.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from graftllm.errors import StorageError
from graftllm.launched import leads

_PICTURES = (".png", ".svg", ".pdf")
CHECKPOINT_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")  # what a model is read from


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block ends without an exception.

    Raises:
        StorageError: the place cannot be written, has no room, or another process writes it now.
    """
    path = path.absolute()
    partial = partial_of(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(partial, "a+b")
    with _room_for(path), file:  # closing writes once more what did not fit
        _lock(file.fileno(), partial, path)
        file.truncate(0)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            with writing(path):
                os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def partial_of(path: Path) -> Path:
    """Return where what is to appear at a path is written."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def whole_directory(
    path: Path, *, over: Sequence[str] = (), holds: Sequence[str] = (), beside: Sequence[Path] = ()
) -> Iterator[Path]:
    """Yield an empty directory that replaces `path` when the block ends without an exception.

    Args:
        path: where it goes.
        over: names of files of which a directory must hold one to be replaced; any is replaced where none is named.
        holds: patterns, such as `packs/*.safetensors`, of all files that such a directory may hold beside these.
        beside: directories that are read, and therefore not replaced.

    Raises:
        StorageError: as for `whole_file`; also when `path` is a file, or a directory that must stay.
    """
    check_replaceable(path, over=over, holds=holds, beside=beside)
    path = path.resolve()  # what a link leads to is replaced, not the link
    partial = partial_of(path)
    with writing(path):
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    try:
        with _room_for(path):
            _lock(descriptor, partial, path)
            replaced = path.with_name(f".{path.name}.replaced")
            if replaced.exists() and not path.exists():
                os.replace(replaced, path)
            try:
                for leftover in partial.iterdir():
                    _remove(leftover)
                yield partial
                with writing(path):
                    _replace_directory(path, partial, replaced)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    finally:
        os.close(descriptor)


def check_replaceable(
    path: Path, *, over: Sequence[str], holds: Sequence[str] = (), beside: Sequence[Path] = ()
) -> None:
    """Check that a directory may be written at a place; arguments and errors are those of `whole_directory`."""
    if not path.exists():
        return
    if not path.is_dir():
        raise StorageError(f"{path}: expected a directory or nothing there, found a file; choose another place.")
    if Path.cwd().is_relative_to(path.resolve()):
        raise StorageError(
            f"{path}: expected a place that can be replaced as a whole, but you are in it; choose another, or name it "
            "from outside."
        )
    if read := next((one for one in beside if one.resolve().is_relative_to(path.resolve())), None):
        raise StorageError(f"{path}: expected a place of its own, but {read} is read from there; choose another one.")
    if not over or not any(path.iterdir()):
        return
    if not any((path / name).exists() for name in over):
        raise StorageError(
            f"{path}: expected nothing there, or a directory with {' or '.join(over)}, found other files, which would "
            "be lost; choose another place."
        )
    files = (file.relative_to(path) for file in sorted(path.rglob("*")) if not file.is_dir() or file.is_symlink())
    if lost := next((file for file in files if not any(_fits(file, one) for one in (*over, *holds))), None):
        raise StorageError(
            f"{path}: expected nothing there, or what is written by this command, found {lost} as well, which would be "
            "lost; choose another place, or take that away."
        )


def _fits(file: Path, pattern: str) -> bool:
    return len(file.parts) == pattern.count("/") + 1 and file.match(pattern)


def check_apart(path: Path, read: Sequence[Path]) -> None:
    """Check that what is written at a place, a file or a directory, spares what is read.

    Args:
        path: what is to be written.
        read: files and directories.

    Raises:
        StorageError: it is one of them, holds one, or lies in one.
    """
    place = path.resolve()
    for one in read:
        if place.is_relative_to(one.resolve()) or one.resolve().is_relative_to(place):
            raise StorageError(f"{path}: expected a place apart from {one}, which is read; choose another one.")


def check_file(path: Path) -> None:
    """Check that a file may be written at a place.

    Raises:
        StorageError: a directory is there.
    """
    if path.is_dir():
        raise StorageError(f"{path}: expected a file or nothing there, found a directory; choose another place.")


def check_picture(path: Path, *, read: Sequence[Path] = ()) -> str:
    """Check that a picture may be written at a place, and return its format.

    Args:
        path: where it goes.
        read: files that it must spare.

    Raises:
        StorageError: its name does not end in a format's, or something else is there.
    """
    if path.suffix not in _PICTURES:
        raise StorageError(f"{path}: expected a name that ends in {', '.join(_PICTURES)}; found {path.suffix!r}.")
    check_file(path)
    check_apart(path, read)
    return path.suffix.removeprefix(".")


@contextmanager
def appended_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file to append to; when the block ends, what was written survives a power cut."""
    with writing(path), open(path, "ab") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; the file appears whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold `directory` against other graftllm processes for the length of the block.

    Processes that were launched together are one writer: the first holds it for all of them.

    Raises:
        StorageError: another process holds it, or it cannot be created.
    """
    if not leads():
        yield
        return
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        _lock(descriptor, directory, directory)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, opened: Path, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another writer may have renamed what we opened between our open and our lock.
        if os.stat(opened).st_ino == os.fstat(descriptor).st_ino:
            return
    except (BlockingIOError, FileNotFoundError):
        pass
    raise StorageError(f"{path}: another process is writing here now; wait for it or choose another place.")


def _replace_directory(path: Path, new: Path, aside: Path) -> None:
    """Put a directory in the place of another; nothing is deleted before the new one is there."""
    if aside.exists():
        _remove(aside)
    if path.exists() and _exchange(new, path):
        _remove(new)
        return
    if path.exists():
        os.replace(path, aside)
    try:
        os.replace(new, path)
    except BaseException:
        if aside.exists():
            os.replace(aside, path)
        raise
    if aside.exists():
        _remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step; return whether the system and its file system can do so."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # of Linux; paths count from the working directory
    return rename is not None and rename(_FROM_HERE, bytes(one), _FROM_HERE, bytes(other), _EXCHANGE) == 0


_FROM_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn every failure of the file system inside the block into a StorageError about `path`."""
    with _room_for(path):
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise
            reason = error.strerror or str(error)
            raise StorageError(f"{path}: cannot be written ({reason}); check the path and its permissions.") from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Turn a full disk inside the block into a StorageError, also when a library reports it in words."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if full or any(f"(os error {number})" in str(error) for number in _FULL):
            raise StorageError(
                f"{path}: no space left to write it; nothing half-written was kept. "
                "Free some room or choose another place, then run the same command again."
            ) from error
        raise
