"""The commands on grafted models: fuse, add, remove, list, chat. `cli` registers them.

Like there, no logic lives here and heavy imports happen inside the functions.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from graftllm.errors import FusionError
from graftllm.terminal import AsJson, Device, print_json, print_lines, print_table

GraftedDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="Grafted model directory.")]
RouterData = Annotated[
    Path | None,
    typer.Option(help="JSONL prompt rows to train a router on; a task that is no pack's name means base."),
]


def fuse(
    base: Annotated[str, typer.Option(help="Checkpoint directory or Hub id of the base model.")],
    pack: Annotated[list[str], typer.Option(metavar="NAME=FILE", help="SkillPack and its name; repeat for several.")],
    out: Annotated[Path, typer.Option(help="Grafted model directory to write.")],
    router_data: RouterData = None,
    device: Device = "auto",
) -> None:
    """Write a grafted model: a base, a shelf of packs and, from prompts, a router."""
    from graftllm.fusion.grafted import fuse_packs

    packs = _packs(pack, "--pack")
    fuse_packs(out, base, packs, router_data=router_data, device=device)
    print(f"{out}: {base} with {', '.join(packs)}. Next: graftllm chat {out}")


def add(
    dir: GraftedDirectory,
    pack: Annotated[list[str], typer.Argument(metavar="NAME=FILE...", help="SkillPacks and their names.")],
) -> None:
    """Put packs on the shelf of a grafted model. Nothing that is there is rewritten."""
    from graftllm.fusion.directory import add_packs

    packs = _packs(pack, "NAME=FILE")
    manifest = add_packs(dir, packs)
    print(f"{dir}: {', '.join(packs)} added; {len(manifest.packs)} packs. Next: graftllm list {dir}")


def remove(
    dir: GraftedDirectory,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Pack to take off the shelf.")],
) -> None:
    """Take a pack off the shelf of a grafted model. The others stay as they are, bit for bit."""
    from graftllm.fusion.directory import remove_pack

    manifest = remove_pack(dir, name)
    print(f"{dir}: {name} removed; left: {', '.join(manifest.packs) or 'the base alone'}")


def list_shelf(dir: GraftedDirectory, json: AsJson = False) -> None:
    """Show what a grafted model consists of: its base, packs, router and rules."""
    from graftllm.fusion.inventory import take_inventory

    inventory = take_inventory(dir)
    if json:
        print_json(inventory.figures())
        return
    from rich.table import Table

    drawn = Table(*inventory.columns)
    for row in inventory.rows():
        drawn.add_row(*row)
    print_table(drawn)
    print_lines(*inventory.sentences())


def chat(
    dir: GraftedDirectory,
    pack: Annotated[
        str, typer.Option(help="A pack's name, base, or auto (the router decides by the first message).")
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 0.0,
    device: Device = "auto",
) -> None:
    """Talk to a grafted model. /new starts over, /pack NAME changes the pack, Ctrl-D ends."""
    from graftllm.fusion.chat import Chat
    from graftllm.fusion.grafted import GraftedModel
    from graftllm.recipe import SamplingOptions

    options = SamplingOptions(samples=1, temperature=temperature, top_p=1, max_new_tokens=max_new_tokens)
    conversation = Chat(GraftedModel.load(dir, device=device), pack, options)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        for piece in conversation.say(line):
            print(piece, end="", flush=True)
        print()


def _packs(entries: list[str], option: str) -> dict[str, Path]:
    packs: dict[str, Path] = {}
    for entry in entries:
        name, equals, file = entry.partition("=")
        if not (name and equals and file):
            raise FusionError(f"{option}: expected NAME=FILE, such as math=packs/math.safetensors; found {entry!r}.")
        if name in packs:
            raise FusionError(f"{option}: two packs have the same name, {name!r}; give each its own.")
        packs[name] = Path(file)
    return packs
