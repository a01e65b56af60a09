"""The options that several commands share, and how results are printed."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Base = Annotated[Path, typer.Option(help="Checkpoint directory of the base model.")]
Device = Annotated[str, typer.Option(help="auto takes a GPU when there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def print_table(drawn: Any) -> None:
    """Print a table of rich's, whole also where there is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width, and tables cut to 80 columns would lose numbers
    console.print(drawn)


def print_lines(*lines: str) -> None:
    """Print each line."""
    print("\n".join(lines))


def print_json(figures: dict[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(figures))
