import errno
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from graftllm.errors import StorageError
from graftllm.storage import _exchange, only_writer, whole_directory, whole_file, write_text


def test_file_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with whole_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"


def test_a_failed_rewrite_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_leftovers_of_a_killed_writer_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / ".file.partial").write_bytes(b"x" * 100)
    write_text(tmp_path / "file", "short")
    assert (tmp_path / "file").read_text() == "short"
    partial = tmp_path / ".directory.partial"
    (partial / "nested").mkdir(parents=True)
    (partial / "nested" / "old").touch()
    with whole_directory(tmp_path / "directory") as new:
        (new / "fresh").touch()
    assert [found.name for found in (tmp_path / "directory").iterdir()] == ["fresh"]


def test_directory_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with whole_directory(tmp_path / "out") as partial:
            (partial / name).touch()
    assert [found.name for found in (tmp_path / "out").iterdir()] == ["second"]
    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "out"):
        _ = 1 / 0
    assert [found.name for found in (tmp_path / "out").iterdir()] == ["second"]


def test_a_directory_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(StorageError, match="expected a directory or nothing there, found a file"):
        with whole_directory(tmp_path / "out"):
            pass


def test_two_writers_of_one_file_never_mix(tmp_path: Path) -> None:
    with whole_file(tmp_path / "file") as first:
        first.write(b"first")
        with pytest.raises(StorageError, match="another process is writing here now"), whole_file(tmp_path / "file"):
            pass
    assert (tmp_path / "file").read_bytes() == b"first"


def test_a_run_directory_has_one_writer(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(StorageError, match="another process is writing here now"):
        with only_writer(tmp_path):
            pass
    with only_writer(tmp_path):
        pass


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"file: no space left to write it; nothing half-written was kept. Free"):
        with whole_file(tmp_path / "file") as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(StorageError, match="out: no space left"), whole_directory(tmp_path / "out"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it
    assert list(tmp_path.iterdir()) == []


def _write_beyond_limit(path: Path, size_bytes: int, answer) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        with whole_file(path) as file:
            file.write(b"x" * size_bytes)
    except StorageError as error:
        answer.put(str(error))


@pytest.mark.parametrize("size_bytes", [5000, 100_000], ids=["closing writes it again", "more than a buffer"])
def test_the_kernel_refusing_to_write_more_leaves_nothing_behind(size_bytes: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    writer = context.Process(target=_write_beyond_limit, args=(tmp_path / "file", size_bytes, answer))
    writer.start()
    assert "no space left to write it" in answer.get(timeout=120)
    writer.join()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/below: cannot be written \(.*\); check the path"):
        write_text(tmp_path / "file" / "below", "x")


@pytest.mark.parametrize("failing", [0, 1], ids=["the old steps aside", "the new takes its place"])
def test_a_directory_is_not_lost_where_renaming_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    out, calls, rename = tmp_path / "out", itertools.count(), os.replace
    monkeypatch.setattr("graftllm.storage._exchange", lambda one, other: False)
    out.mkdir()
    (out / "old").touch()

    def broken(source: Path, target: Path) -> None:
        if next(calls) == failing:
            raise OSError(errno.EIO, "the disk has gone")
        rename(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(StorageError, match="out: cannot be written"), whole_directory(out) as partial:
        (partial / "new").touch()
    assert [found.name for found in tmp_path.rglob("*")] == ["out", "old"]


_REPLACE = """
import os, sys
from pathlib import Path
from graftllm import storage

def kill(*_):
    os.kill(os.getpid(), 9)

def step_aside(source, target, rename=os.replace):
    rename(source, target)
    kill()

with storage.whole_directory(Path(sys.argv[1])) as partial:
    (partial / "new").touch()
    if sys.argv[2] == "two renamings":
        storage._exchange = lambda one, other: False
        os.replace = step_aside
    storage._remove = kill  # what is to be removed then is the old directory
"""


def test_a_directory_that_a_killed_writer_moved_aside_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    command = [sys.executable, "-c", _REPLACE, str(out), "two renamings"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(KeyboardInterrupt), whole_directory(out):
        assert (out / "old").exists()
        raise KeyboardInterrupt
    assert [found.name for found in tmp_path.rglob("*")] == ["out", "old"]


def test_a_directory_is_exchanged_for_another_in_one_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    (tmp_path / "new").mkdir()
    if not _exchange(tmp_path / "new", out):
        pytest.skip("this system, or its file system, cannot exchange directories")
    assert (tmp_path / "new" / "old").exists()
    assert _exchange(tmp_path / "new", out)
    assert subprocess.run([sys.executable, "-c", _REPLACE, str(out), "one"]).returncode == -signal.SIGKILL
    assert [found.name for found in out.iterdir()] == ["new"]  # killed before the old one was removed
    with whole_directory(out) as partial:
        (partial / "newest").touch()
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["new", "newest", "out"]


def test_a_directory_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(StorageError, match=r"mine: expected nothing there, or a directory with config\.json"):
        with whole_directory(tmp_path / "mine", over=["config.json"]):
            pass
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    with whole_directory(tmp_path / "mine", over=["thesis.txt"]) as partial:
        (partial / "config.json").touch()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.json"]


@pytest.mark.parametrize("place", ["base", "base/..", "base/../base"])
def test_what_is_read_is_not_replaced(tmp_path: Path, place: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").touch()
    with pytest.raises(StorageError, match=r"base is read from there; choose another one"):
        with whole_directory(tmp_path / place, over=["config.json"], beside=[tmp_path / "base"]):
            pass
    assert (tmp_path / "base" / "config.json").exists()


def test_the_current_directory_is_not_replaced_under_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").mkdir()
    monkeypatch.chdir(tmp_path / "kept")
    for place in (Path(), tmp_path):
        with pytest.raises(StorageError, match="replaced as a whole, but you are in it"), whole_directory(place):
            pass
    with pytest.raises(StorageError, match="cannot be written"), whole_file(Path()):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
