"""The options that several commands share, and how results are printed."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from graftllm import __version__
from graftllm.errors import GraftError

Base = Annotated[Path, typer.Option(help="Checkpoint directory of the base model.")]
Device = Annotated[str, typer.Option(help="auto takes a GPU when there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bars.")]
AllJson = Annotated[
    bool, typer.Option("--json", help="Print results as one JSON object, as after a command that has the option.")
]

_LONGEST = 4000  # letters of a message


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"graftllm {__version__}")
        raise typer.Exit


ShowVersion = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
]


class Panels(TyperGroup):
    """The whole command, which lists its subcommands under their panels, with their whole first sentences."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a list of commands for each panel, all with the same first column."""
        panels: dict[str, list[tuple[str, str]]] = {}
        widest = max(map(len, self.commands))
        for name, command in self.commands.items():
            row = (name.ljust(widest), command.get_short_help_str(limit=1000))
            panels.setdefault(cast(TyperCommand, command).rich_help_panel or "", []).append(row)
        for title, rows in panels.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def check_place() -> None:
    """Check that there is a directory to work in.

    Raises:
        GraftError: it was removed, or replaced.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise GraftError("the directory that you are in is not there any more; go to one that is.") from error


def check_words(words: Sequence[str]) -> None:
    """Check that arguments, and the places that they name, are text: JSON and safetensors know no other names.

    Raises:
        GraftError: one is not in UTF-8.
    """
    for word in words:
        for text in (word, os.path.realpath(word)) if os.path.lexists(word) else (word,):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise GraftError(
                    f"{os.fsencode(text)!r}: expected text in UTF-8, found other bytes; rename the file or directory."
                ) from error


def printable(text: str) -> str:
    """Return a message as one line of a reasonable length, whatever a stranger's file put into it.

    >>> printable("made for " + chr(27) + "[31mx" + chr(10) + "all is well")
    'made for ?[31mx all is well'
    """
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def settle(context: typer.Context, *, quiet: bool, json: bool) -> None:
    """Let what stands before the command's name count for the command.

    Raises:
        typer.BadParameter: the command has no results to print as JSON.
    """
    if quiet:
        os.environ |= {"GRAFTLLM_QUIET": "1", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not json:
        return
    commands: dict[str, Any] = cast(Any, context.command).commands
    able = [name for name, command in commands.items() if any(option.name == "json" for option in command.params)]
    if context.invoked_subcommand not in able:
        raise typer.BadParameter(f"{context.invoked_subcommand} prints no figures; those that do: {', '.join(able)}.")
    context.default_map = {name: {"json": True} for name in able}


def print_table(drawn: Any) -> None:
    """Print a table of rich's, whole also where there is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width, and tables cut to 80 columns would lose numbers
    console.print(drawn)


def named_after(place: str | Path) -> str:
    """Return what a pack or checkpoint is called where no name is given: its file's name, or its directory's."""
    return Path(place).name.removesuffix(".safetensors")


def weighed(text: str) -> tuple[str, float | None]:
    """Return the place and weight of PLACE[:WEIGHT]; what is there under the whole text has no weight.

    >>> weighed("user/repo:-0.5"), weighed("math.safetensors")
    (('user/repo', -0.5), ('math.safetensors', None))

    Raises:
        GraftError: what stands behind a file is no number.
    """
    place, colon, last = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, None
    try:
        return place, float(last)
    except ValueError:
        if Path(place).exists():
            raise GraftError(f"{text}: expected a number as weight after {place}:, found {last!r}.") from None
        return text, None


def typed(*words: object) -> str:
    """Return a command as one types it into a shell.

    >>> typed("graftllm", "list", Path("my models/grafted"))
    "graftllm list 'my models/grafted'"
    """
    return shlex.join(map(str, words))


def print_lines(*lines: str) -> None:
    """Print each line."""
    print("\n".join(lines))


def print_json(figures: dict[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(figures))
