"""The command `merge`: tuned models into one, by a row of the table of methods. `cli` registers it.

Like there, no logic lives here and heavy imports happen inside the function.
"""

from pathlib import Path
from typing import Annotated

import typer

from graftllm.errors import FusionError
from graftllm.terminal import Base, Device, named_after, print_json, print_table, weighed

Entry = str  # [NAME=]PLACE[:WEIGHT]


def _list_methods(context: typer.Context, option: typer.CallbackParam, value: bool) -> bool:
    """Print the methods and end, where --list is given: at the later one of --list and --json, when both are known."""
    known = context.params | {option.name: value}
    if not known.get("list_methods") or "json" not in known:
        return value
    from rich.table import Table

    from graftllm.fusion.methods.table import METHODS

    if known["json"]:
        shown = ("about", "paper", "defaults", "per_task", "rows")
        print_json({name: {key: getattr(row, key) for key in shown} for name, row in METHODS.items()})
        raise typer.Exit
    drawn = Table("method", "what it does", "arXiv", "defaults", "gives", "needs")
    for row in METHODS.values():
        knobs = ", ".join(f"{key} {value:g}" for key, value in row.defaults.items())
        drawn.add_row(
            row.name, row.about, row.paper, knobs, "one a task" if row.per_task else "one", "rows" if row.rows else ""
        )
    print_table(drawn)
    raise typer.Exit


def merge(
    base: Base,
    method: Annotated[str, typer.Option(help="A row of the table that --list prints.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Checkpoint directory to write, or a .safetensors file for a SkillPack of the merged delta. "
            "Methods that give one model a task write OUT/NAME, or STEM-NAME.safetensors."
        ),
    ],
    pack: Annotated[
        list[Entry] | None,
        typer.Option(
            metavar="[NAME=]FILE[:WEIGHT]",
            help="SkillPack, or user/repo on the Hub, its name (the file's by default) and weight (1 by default); "
            "repeat for several.",
        ),
    ] = None,
    tuned: Annotated[
        list[Entry] | None,
        typer.Option(metavar="[NAME=]DIR[:WEIGHT]", help="The same with a checkpoint directory instead of a pack."),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of the merged delta.  [default: the method's]")] = None,
    density: Annotated[float | None, typer.Option(help="Share of the entries kept.  [default: the method's]")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="consensus, tall-mask: how far a task must exceed the others.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="twin, routed-lora: rank of a task's own part.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random draws and searches.")] = None,
    rows: Annotated[
        Path | None,
        typer.Option(help="regmean, lorahub: JSONL prompt rows with answers; a row's task is the name of its model."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Size of a SkillPack that is written, as for `pack`.")] = None,
    list_methods: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_methods, help="Print the methods and end.")
    ] = False,
    device: Device = "auto",
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            is_eager=True,
            callback=_list_methods,
            help="Print one JSON object on stdout and nothing else there.",
        ),
    ] = False,
) -> None:
    """Merge tuned models of one base into a checkpoint or a SkillPack."""
    from graftllm.checkpoint import Checkpoint
    from graftllm.companions import DIFFERING
    from graftllm.fusion import merging
    from graftllm.fusion.inputs import open_tuned
    from graftllm.fusion.methods import table
    from graftllm.packing_options import PackOptions
    from graftllm.recipe import options_of
    from graftllm.records import read_prompts
    from graftllm.storage import check_apart

    row = table.method(method)
    given = {"scale": scale, "density": density, "threshold": threshold, "rank": rank, "seed": seed}
    knobs = row.knobs(given)
    opened = Checkpoint.open(base)
    models = [
        open_tuned(opened, place, name=name, weight=row.weight(weight), is_pack=is_pack)
        for entries, is_pack in ((pack, True), (tuned, False))
        for name, place, weight in map(_entry, entries or [])
    ]
    if rows is not None:
        check_apart(out.absolute(), [rows])
    by_task: dict[str, list] = {}
    for prompt in read_prompts(rows) if rows else []:
        by_task.setdefault(prompt.task, []).append(prompt)
    options = None if budget is None else options_of(PackOptions, {"budget": budget})
    made = merging.merge(opened, models, row, out, knobs=knobs, rows=by_task, pack=options, device=device)
    if json:
        outputs = {name or "merged": str(path) for name, path in made.outputs.items()}
        figures = {"weights": dict(made.weights), "stored_bytes": made.stored_bytes, "companions_agree": made.agree}
        print_json({"outputs": outputs, **figures})
        return
    for path in made.outputs.values():
        size = f" ({path.stat().st_size:,} bytes)" if path.is_file() else ""
        print(f"{path}{size}: {base} with {', '.join(made.weights)} by {method}")
    print(f"What {method} keeps takes {made.stored_bytes:,} bytes, the base included where it is needed.")
    if not made.agree:
        print(DIFFERING)


def _entry(text: str) -> tuple[str, str, float | None]:
    """Return the name, place and weight of [NAME=]PLACE[:WEIGHT].

    >>> _entry("packs/math.safetensors:0.7"), _entry("math=runs/tuned")
    (('math', 'packs/math.safetensors', 0.7), ('math', 'runs/tuned', None))
    """
    place, weight = weighed(text)
    name, equals, rest = text.partition("=")
    if equals and not Path(place).exists():  # else the sign is part of a path
        place, weight = weighed(rest)
    else:
        name = named_after(place)
    if not place or not name:
        raise FusionError(f"merge: expected [NAME=]PLACE[:WEIGHT], such as math.safetensors:0.7; found {text!r}.")
    return name, place, weight
