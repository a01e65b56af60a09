"""The commands on grafted models: fuse, add, remove, rules, list, chat. `cli` registers them.

Like there, no logic lives here and heavy imports happen inside the functions.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from graftllm.errors import FusionError
from graftllm.terminal import AsJson, Device, named_after, print_json, print_lines, print_table, typed

GraftedDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="Grafted model directory.")]
RouterData = Annotated[
    Path | None,
    typer.Option(help="JSONL prompt rows to train a router on; a task that is no pack's name means base."),
]


def fuse(
    base: Annotated[str, typer.Option(help="Checkpoint directory or Hub id of the base model.")],
    pack: Annotated[
        list[str], typer.Option(metavar="[NAME=]FILE", help="SkillPack and its name, the file's by default; repeat.")
    ],
    out: Annotated[Path, typer.Option(help="Grafted model directory to write.")],
    router_data: RouterData = None,
    soft: Annotated[
        int | None,
        typer.Option(
            metavar="PACKS", help="Let the router mix so many packs, weighted by their probabilities.  [default: 1]"
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Probability of all packs together below which the base answers.  [default: 0.5]"),
    ] = None,
    rules: Annotated[
        Path | None, typer.Option(help="YAML list of rules, which come before the router: pack, and pattern or tag.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Write a grafted model: a base, a shelf of packs and, from prompts, a router."""
    from graftllm.fusion.assembly import fuse_packs
    from graftllm.fusion.rules import read_rules
    from graftllm.recipe import RouterOptions, options_of

    packs = _packs(pack, "--pack")
    given = {"soft": soft, "threshold": threshold}
    fuse_packs(
        out,
        base,
        packs,
        router_data=router_data,
        options=None if (soft, threshold) == (None, None) else options_of(RouterOptions, given),
        rules=read_rules(rules) if rules else (),
        device=device,
    )
    chosen = [] if router_data or rules else ["--pack", next(iter(packs))]
    print(f"{out}: {base} with {', '.join(packs)}. Next: {typed('graftllm', 'chat', out, *chosen)}")


def add(
    dir: GraftedDirectory,
    pack: Annotated[
        list[str], typer.Argument(metavar="[NAME=]FILE...", help="SkillPacks and their names, the files' by default.")
    ],
    router_data: Annotated[
        Path | None,
        typer.Option(help="JSONL prompt rows with the new packs' names as tasks, to teach the router; no others."),
    ] = None,
    drift: Annotated[
        float | None,
        typer.Option(
            help="Share of any old class's held-out examples that may go elsewhere then.  [default: the router's, 0.01]"
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Put packs on the shelf of a grafted model. Nothing that is there is rewritten.

    Without --router-data the router does not know the new packs, and auto is refused until it does: give the same
    packs again with --router-data to teach it later.
    """
    from graftllm.fusion.assembly import join_packs

    packs = _packs(pack, "[NAME=]FILE")
    manifest = join_packs(dir, packs, router_data=router_data, drift=drift, device=device)
    print(f"{dir}: {', '.join(packs)} added; {len(manifest.packs)} packs. Next: {typed('graftllm', 'list', dir)}")
    if manifest.router is not None and (late := manifest.unrouted()):
        print(
            f"Its router does not know {', '.join(late)}, so auto is refused: name packs, or give the same again with "
            "--router-data."
        )


def remove(
    dir: GraftedDirectory,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Pack to take off the shelf.")],
) -> None:
    """Take a pack off the shelf of a grafted model. The others stay as they are, bit for bit."""
    from graftllm.fusion.directory import remove_pack

    manifest = remove_pack(dir, name)
    print(f"{dir}: {name} removed; left: {', '.join(manifest.packs) or 'the base alone'}")


def rules(
    dir: GraftedDirectory,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML list of rules: pack, and pattern, tag or both. [] for none.")
    ],
) -> None:
    """Give a grafted model other rules. The first that fits a prompt decides; the router is not asked then.

    A pattern is a regular expression to be found in the last user message, a tag a text in the system prompt.
    """
    from graftllm.fusion.directory import set_rules
    from graftllm.fusion.rules import read_rules

    manifest = set_rules(dir, read_rules(file))
    count = len(manifest.rules)
    print(f"{dir}: {count} {'rule' if count == 1 else 'rules'}. Next: {typed('graftllm', 'list', dir)}")


def list_shelf(dir: GraftedDirectory, json: AsJson = False) -> None:
    """Show what a grafted model consists of: its base, packs, router and rules."""
    from graftllm.fusion.inventory import take_inventory

    inventory = take_inventory(dir)
    if json:
        print_json(inventory.figures())
        return
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(*inventory.columns)
    for row in inventory.rows():
        drawn.add_row(*map(escape, row))
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
    """Talk to a grafted model. /new starts over, /pack NAME changes the pack, /help tells, /exit or Ctrl-D ends."""
    from graftllm.fusion.chat import Chat, lines
    from graftllm.fusion.grafted import GraftedModel
    from graftllm.recipe import SamplingOptions, options_of

    given = {"samples": 1, "temperature": temperature, "top_p": 1, "max_new_tokens": max_new_tokens}
    options = options_of(SamplingOptions, given)
    conversation = Chat(GraftedModel.load(dir, device=device), pack, options)
    for line in lines("> " if sys.stdin.isatty() else ""):
        if line in ("/exit", "/quit"):
            break
        for piece in conversation.say(line):
            print(piece, end="", flush=True)
        print()


def _packs(entries: list[str], option: str) -> dict[str, Path]:
    packs: dict[str, Path] = {}
    for entry in entries:
        name, equals, file = entry.partition("=")
        if not equals or Path(entry).is_file():
            name, file = named_after(entry), entry
        if not (name and file):
            raise FusionError(f"{option}: expected [NAME=]FILE, such as math=packs/math.safetensors; found {entry!r}.")
        if name in packs:
            raise FusionError(f"{option}: two packs have the same name, {name!r}; give each its own.")
        packs[name] = Path(file)
    return packs
