import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.packer import compress
from tests.command import Command


@pytest.fixture(scope="module")
def pack(base_dir: Path, tuned_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("terminal") / "pack.safetensors"
    compress(Delta(Checkpoint.open(base_dir), Checkpoint.open(tuned_dir))).save(path)
    return path


def test_progress_goes_to_stderr_and_nowhere_when_quiet(
    graftllm: Command, pack: Path, base_dir: Path, tmp_path: Path
) -> None:
    arguments = ("apply", "--base", base_dir, "--pack", pack, "--out", tmp_path / "out")
    _, out, err = graftllm(*arguments)
    assert "applying" in err
    assert out == f"{tmp_path / 'out'}: {base_dir} with {pack}\n"
    assert graftllm("--quiet", *arguments)[1:] == (out, "")


def test_json_before_the_command_is_json_after_it(graftllm: Command, pack: Path, base_dir: Path) -> None:
    for command in (("inspect", pack), ("verify", "--base", base_dir, "--pack", pack)):
        assert json.loads(graftllm("--json", *command).out) == json.loads(graftllm(*command, "--json").out)
    _, out, err = graftllm("--json", "apply", "--base", base_dir, "--pack", pack, "--out", "none")
    assert out == ""
    assert "apply prints no figures; those that do: run, " in " ".join(err.split())


def test_colors_stay_away_where_they_are_not_wanted(
    graftllm: Command, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b[" not in graftllm("inspect", pack).out  # no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    failed = graftllm("apply", "--base", "none", "--pack", pack, "--out", "none")
    shown = failed.err + graftllm("inspect", pack).out
    assert not re.search(r"\x1b\[[\d;]*3\d", shown)


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("inspect",), ("inspect", "--json")])
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_stdout_is_one_line_and_exit_code_1(words: tuple[str, ...], unbuffered: str, pack: Path) -> None:
    command = [sys.executable, "-m", "graftllm", *words, *([pack] if "inspect" in words else [])]
    with open("/dev/full", "w") as full:
        told = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=told)
    assert (done.returncode, done.stderr) == (1, "graftllm: stdout cannot be written (No space left on device).\n")


def test_a_pipe_that_nobody_reads_is_exit_code_1_and_no_line() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "graftllm", "--version"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_full_disk_elsewhere_is_not_called_stdout(graftllm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("graftllm.cli.app", fail)
    with pytest.raises(OSError, match="No space left"):
        graftllm("doctor")


def test_a_directory_that_went_under_the_shell_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    call = shlex.join([sys.executable, "-m", "graftllm", "inspect", "p.safetensors"])
    done = subprocess.run(
        ["sh", "-c", f"rmdir ../gone && {call}"], cwd=tmp_path / "gone", capture_output=True, text=True
    )
    expected = "graftllm: the directory that you are in is not there any more; go to one that is.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


@pytest.mark.parametrize("words", [("chat", "g"), ("--quiet", "serve", "g"), ("apply",), ("eval", "g"), ("merge",)])
def test_ctrl_c_in_what_does_not_go_on_does_not_say_so(words: tuple[str, ...]) -> None:
    code = f"import sys; from graftllm import cli; sys.argv = {['graftllm', *words]}\n"
    code += "cli.app = lambda: sys.exit(130)\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "graftllm: interrupted.\n")


def test_a_shell_completes_commands_and_options() -> None:
    def completed(*words: str) -> list[str]:
        told = {
            "_GRAFTLLM_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        code = "import sys; sys.argv = ['graftllm']; from graftllm import cli; cli.main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | told)
        return done.stdout.split()

    assert completed("graftllm", "ver") == ["verify"]
    assert completed("graftllm", "pack", "--bud") == ["--budget"]


_ODD = os.fsdecode(b"m\xff")  # what Latin-1 calls it, on a system of UTF-8


@pytest.mark.parametrize(
    "words",
    [
        lambda base, tuned, pack: ("pack", "--base", base, "--tuned", tuned, "--out", f"{_ODD}.safetensors"),
        lambda base, tuned, pack: ("pack", "--base", _ODD, "--tuned", tuned, "--out", "out.safetensors"),
        lambda base, tuned, pack: ("pack", "--base", "link", "--tuned", tuned, "--out", "out.safetensors"),
        lambda base, tuned, pack: ("inspect", f"{_ODD}.safetensors"),
        lambda base, tuned, pack: ("fuse", f"--base={_ODD}", "--pack", f"one={pack}", "--out", "g"),
        lambda base, tuned, pack: ("fuse", "--base", base, "--pack", f"one={pack}", "--out", _ODD),
    ],
)
def test_a_name_that_is_not_utf_8_is_one_line_and_exit_code_1(
    words: Callable[..., tuple[str | Path, ...]],
    graftllm: Command,
    pack: Path,
    base_dir: Path,
    tuned_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_dir, _ODD)
    shutil.copy(pack, f"{_ODD}.safetensors")
    Path("link").symlink_to(_ODD)
    there = sorted(os.listdir())
    code, out, err = graftllm(*words(base_dir, tuned_dir, pack))
    assert (code, out) == (1, "")
    assert re.fullmatch(
        r"graftllm: b'.*m\\xff.*': expected text in UTF-8, found other bytes; rename the file or directory.\n", err
    )
    assert sorted(os.listdir()) == there


def test_a_directory_whose_name_is_not_utf_8_is_told_where_the_command_runs_in_it(
    graftllm: Command, base_dir: Path, tuned_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_dir, tmp_path / _ODD)
    monkeypatch.chdir(tmp_path / _ODD)
    code, _, err = graftllm("pack", "--base", ".", "--tuned", tuned_dir, "--out", tmp_path / "out.safetensors")
    assert code == 1
    assert "m\\xff': expected text in UTF-8" in err
