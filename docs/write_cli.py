"""Write docs/cli.md from the command's own --help texts, or with --check fail if it is not current."""

import os
import sys
from pathlib import Path

os.environ |= {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}

from typer.main import get_command
from typer.testing import CliRunner

from graftllm.cli import app

PAGE = Path(__file__).with_name("cli.md")


def page() -> str:
    """Return the page: the help of the command, then of each subcommand."""
    runner = CliRunner()
    parts = ["# Command line\n\nWritten by `make docs` from the `--help` texts.\n"]
    for arguments in [[], *([name] for name in get_command(app).commands)]:
        shown = runner.invoke(app, [*arguments, "--help"], prog_name="graftllm", terminal_width=100)
        title = " ".join(["graftllm", *arguments])
        parts.append(f"## {title}\n\n```text\n{shown.output.strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit("docs/cli.md is not current; run `make docs`.")
    else:
        PAGE.write_text(page(), encoding="utf-8")
