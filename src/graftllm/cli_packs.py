"""The commands on SkillPacks: pack, inspect, verify, apply. `cli` registers them.

Like there, no logic lives here and heavy imports happen inside the functions.
"""

import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from graftllm.terminal import AsJson, Base, Device, named_after, print_json, print_lines, print_table, weighed

Layer = Annotated[
    Literal["lossy", "exact"] | None,
    typer.Option(help="Layer of packs that have two.  [default: exact where there is one]"),
]


class ServableAlone(TyperCommand):
    """A command whose option --servable may stand without its rank."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the rank after a --servable that has none."""
        from graftllm.packing_options import SERVED_RANK

        words = []
        for word, after in pairwise([*args, "-"]):
            words += [word, str(SERVED_RANK)] if word == "--servable" and after.startswith("-") else [word]
        return super().parse_args(ctx, words)


def pack(
    base: Base,
    tuned: Annotated[Path, typer.Option(help="Checkpoint directory of the tuned model, or a LoRA adapter of PEFT's.")],
    out: Annotated[Path, typer.Option(help="SkillPack to write, a .safetensors file.")],
    strategy: Annotated[
        Literal["auto", "paper", "exact"],
        typer.Option(help="auto is the smallest at equal fidelity, paper is as published, exact keeps every bit."),
    ] = "auto",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Size of the file: 5% of the tuned checkpoint, 400MB, 60KB or bytes; or kl=0.01, the divergence "
            "that it may have, measured on the calibration rows. With exact: the size of an additional lossy layer in "
            "the same file; apply --layer chooses.  [default: for auto, 5% of the matrices; for exact, no lossy layer]"
        ),
    ] = None,
    servable: Annotated[
        int | None,
        typer.Option(
            metavar="[RANK]",
            help="Keep weights of linear layers at this rank or below, but embedding and head (auto, and the lossy "
            "layer of exact); alone at 16, the most that vLLM serves unless told otherwise.",
        ),
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="Train the codes for so many steps of 32 calibration rows, so that they answer as the tuned model "
            "does: fewer bytes at equal fidelity, about as long as training (auto only; 600 is a good start).",
        ),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="paper: share of squared singular values kept, when there is no budget.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="paper: share kept of embedding and head deltas.")] = None,
    bit_bands: Annotated[
        str | None,
        typer.Option(
            help="paper: bits and share of the kept singular vectors, strongest first.  [default: 8:0.02,4:0.18,2:0.8]"
        ),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="paper: values that share a quantisation scale.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="JSONL prompt rows, or paragraphs of text; best the skill's own training rows.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name for the pack's card.  [default: the file's name]")] = "",
    description: Annotated[str, typer.Option(help="One sentence for the pack's card.")] = "",
    license: Annotated[str, typer.Option(help="Licence for the pack's card.")] = "",
    device: Device = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads that share the work, and GPUs; the file is the same for any number.  [default: for a large "
            "model one a GPU, or one a core; else one]",
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="ray shares the work over the cluster at RAY_ADDRESS, whose machines see the same files."),
    ] = "local",
    json: AsJson = False,
) -> None:
    """Compress the difference between two checkpoints, or what an adapter adds to one, into a SkillPack.

    Finished tensors wait in a hidden directory beside the file until that is written, so that the same command
    goes on where it was after a kill.
    """
    from graftllm.adapters import origin, tuned_model
    from graftllm.checkpoint import Checkpoint
    from graftllm.delta import Delta
    from graftllm.header import Card, Provenance
    from graftllm.metering import peak_memory_bytes
    from graftllm.packer import compress_to
    from graftllm.recipe import pack_options

    started = time.monotonic()
    options = pack_options(
        strategy=strategy,
        budget=budget,
        energy=energy,
        density=density,
        bit_bands=bit_bands,
        group_size=group_size,
        servable=servable,
        distill=distill,
    )
    rows, measure = [], None
    if calibration:
        from graftllm.records import read_calibration
        from graftllm.storage import check_apart

        check_apart(out, [calibration])
        rows = read_calibration(calibration)
    made_of = Provenance(sources=origin(tuned))
    card = Card(name=name or named_after(out), description=description, license=license, provenance=made_of)
    checkpoint = Checkpoint.open(base)
    with tuned_model(tuned, checkpoint, live=bool(rows)) as fine_tune:
        delta = Delta(checkpoint, fine_tune)
        if rows:
            from graftllm.evaluation.fidelity import divergence_on

            measure = divergence_on(delta, rows, options, device=device)
        made = compress_to(
            out,
            delta,
            options,
            calibration=rows,
            card=card,
            measure=measure,
            device=device,
            workers=workers,
            engine=engine,
        )
    size = out.stat().st_size
    figures = {
        "file_bytes": size,
        "bits_per_parameter": 8 * size / delta.tuned.parameters,
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "own_files": made.header.own_files,
    }
    if json:
        print_json(figures)
    else:
        print(
            f"{out}: {size:,} bytes, {size / made.header.tuned_bytes:.1%} of the tuned checkpoint, "
            f"{figures['bits_per_parameter']:.2f} bits per parameter, in {figures['seconds']} s"
        )
        if all(entry.operator == "unchanged" for entry in made.header.tensors.values()):
            print(f"It changes nothing: {tuned} has the weights of {base}.")
        if made.header.own_files:
            print(f"With files that are not the base's, by which it is asked: {', '.join(made.header.own_files)}")


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="SkillPack, or user/repo on the Hub.")],
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture to draw, a .png, .svg or .pdf file: rates, errors, bytes, strengths of directions."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Show what a SkillPack holds: card, provenance, bytes, rates and errors by role and by layer, and what it took.

    Reads its header only; a picture also takes payloads. The base model is not needed.
    """
    from graftllm.evaluation.anatomy import figures
    from graftllm.evaluation.tables import layer_grid, overhead_grids, pack_lines, role_grid, table
    from graftllm.skillpack import SkillPack

    opened = SkillPack.load(file)
    header, size = opened.header, Path(opened.source).stat().st_size
    if plot:
        from graftllm.evaluation.portrait import draw_portrait

        draw_portrait(opened, plot)
    if json:
        print_json(figures(header, size))
        return
    print_lines(*pack_lines(header, size))
    print_table(table(role_grid(header)))
    print_table(table(layer_grid(header)))
    print_lines(
        "Errors are those of the weights. What the answers hardly depend on is left out, so a faithful pack may have "
        "100 % and more in places; `graftllm verify` tells how far the answers are."
    )
    for grid in overhead_grids(header):
        print_table(table(grid))
    if plot:
        print(f"Picture: {plot}")


def verify(
    base: Base,
    pack: Annotated[Path, typer.Option(help="SkillPack.")],
    tuned: Annotated[
        Path | None, typer.Option(help="Checkpoint directory of the tuned model, to compare with.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL prompt rows to compare answers on; needs --tuned.")
    ] = None,
    layer: Layer = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Check a SkillPack against its base, and how faithful it is to the tuned model.

    Without --tuned every payload is checked and decoded. With it the error of the weights is shown
    by role, and with --prompts also the KL divergence to the tuned model, top-1 agreement, the negative
    log-likelihood of the answers under both models, and a verdict.

    The verdict is "faithful" when the KL divergence is at most 0.01 nats per token and the most probable
    token is the same for at least 99% of tokens; else "close" when the KL divergence is at most 0.1; else
    "not faithful".
    """
    from graftllm.evaluation.fidelity import verify_pack

    found = verify_pack(base, pack, tuned, prompts, layer=layer, device=device)
    if json:
        print_json(found.figures())
    else:
        print_lines(*found.sentences())


def apply(
    base: Base,
    pack: Annotated[
        list[str],
        typer.Option(
            metavar="FILE[:WEIGHT]",
            help="SkillPack, or user/repo on the Hub, and its weight (1 by default); repeat for several.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write.")],
    layer: Layer = None,
) -> None:
    """Write base + packs as an ordinary checkpoint, tokenizer included."""
    from graftllm.checkpoint import Checkpoint
    from graftllm.companions import DIFFERING
    from graftllm.fusion.applying import apply_packs
    from graftllm.skillpack import SkillPack

    packs = [(SkillPack.load(path, layer), 1.0 if weight is None else weight) for path, weight in map(weighed, pack)]
    agree = apply_packs(Checkpoint.open(base), packs, out)
    print(f"{out}: {base} with {', '.join(pack)}")
    if not agree:
        print(DIFFERING)
