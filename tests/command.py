"""The command `graftllm`, run in this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from graftllm import cli


class Shown(NamedTuple):
    """A command's exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The last line on stderr."""
        return self.err.strip().splitlines()[-1]


Command = Callable[..., Shown]  # of arguments


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    for name in ("GRAFTLLM_QUIET", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")  # what the command sets is taken back after the test

    def run(*arguments: str | Path) -> Shown:
        monkeypatch.setattr(sys, "argv", ["graftllm", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Shown(code, *capsys.readouterr())

    return run
