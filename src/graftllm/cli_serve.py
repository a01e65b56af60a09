"""The commands that take packs to where they are used: serve, export. `cli` registers them.

Like there, no logic lives here and heavy imports happen inside the functions.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from graftllm.errors import ServingError
from graftllm.terminal import AsJson, Device, print_json, print_lines, typed

_GIB, _MIB = 1 << 30, 1 << 20


def serve(
    dir: Annotated[Path, typer.Argument(metavar="DIR", help="Grafted model directory.")],
    host: Annotated[str, typer.Option(help="Address to serve at; others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="GRAFTLLM_API_KEY", help="What clients must send as their key.")
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(envvar="GRAFTLLM_ADMIN_KEY", help="Key to add and remove packs; without, nobody can.")
    ] = None,
    pack_memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GiB of decoded packs to keep.  [default: the model's size, at least 1, if there is room]",
        ),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Choices that may wait; more are refused (429).")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, help="Choices that are written at once.")] = 32,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together.  [default: the model's]")
    ] = None,
    max_body: Annotated[float, typer.Option(min=0.001, help="MiB of a request; larger are refused (413).")] = 4.0,
    engine: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Pass requests on to a server that has the packs as adapters, such as vLLM."),
    ] = None,
    engine_key: Annotated[
        str | None, typer.Option(envvar="GRAFTLLM_ENGINE_KEY", help="API key of that server.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Serve a grafted model as an OpenAI-compatible endpoint, with a page to talk to it.

    Models are `base`, each pack by its name, and `auto`, where the router chooses. Ctrl-C finishes what is begun.
    """
    from graftllm.serving.front import Front
    from graftllm.serving.server import Limits, Local
    from graftllm.serving.server import serve as run

    limits = Limits(
        pack_memory=None if pack_memory is None else int(pack_memory * _GIB),
        max_queue=max_queue,
        max_batch=max_batch,
        max_context=max_context,
        max_body=int(max_body * _MIB),
    )
    run(
        lambda: (
            Local(dir, limits, device=device) if engine is None else Front(dir, engine, key=engine_key, device=device)
        ),
        host=host,
        port=port,
        api_key=api_key,
        admin_key=admin_key,
        max_body=limits.max_body,
    )


def export(
    source: Annotated[
        Path, typer.Argument(metavar="PACK|DIR", help="A SkillPack (--format peft), or a grafted model (vllm).")
    ],
    format: Annotated[
        Literal["peft", "vllm"], typer.Option(help="peft: an adapter; vllm: adapters of the packs, and the command.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    base: Annotated[
        Path | None, typer.Option(help="peft: checkpoint directory of the base model; a grafted model knows its own.")
    ] = None,
    pack: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="vllm: pack to export; repeat for several.  [default: all]"),
    ] = None,
    max_rank: Annotated[int, typer.Option(help="Largest rank; raised to the next one that vLLM takes.")] = 512,
    allow_drop: Annotated[
        bool, typer.Option(help="Write also what lacks something: norms, embeddings, ranks beyond the largest.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL rows to measure losses on.  [default: texts that the model writes]")
    ] = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Write packs as LoRA adapters for PEFT and vLLM; what they cannot hold is measured, and refused unless allowed."""
    from graftllm.exporting.adapter import export_adapter
    from graftllm.exporting.launch import export_shelf
    from graftllm.skillpack import SkillPack

    options: Any = {"max_rank": max_rank, "allow_drop": allow_drop, "prompts": prompts, "device": device}
    if format == "vllm":
        if base is not None:
            raise ServingError("--base: is of --format peft; a grafted model knows its own, so leave it out.")
        launch = export_shelf(source, out, names=pack or (), **options)
        if json:
            print_json(asdict(launch))
            return
        for name, adapter in launch.adapters.items():
            print_lines(f"{out / name}:", *(f"  {line}" for line in adapter.sentences()))
        print_lines("Start it:", f"  {launch.command}", "Route in front of it:")
        command = typed("graftllm", "serve", source, "--engine", "http://127.0.0.1:8000", "--port", "8001")
        print_lines(f"  {command}")
        return
    if source.is_dir():
        raise ServingError(f"{source}: expected a SkillPack, found a directory; a grafted model takes --format vllm.")
    if pack:
        raise ServingError("--pack: chooses packs of a grafted model (--format vllm); leave it out.")
    if base is None:
        raise ServingError("--base: expected the checkpoint directory of the pack's base; give it.")
    made = export_adapter(SkillPack.load(source), base, out, **options)
    if json:
        print_json(asdict(made))
    else:
        print_lines(f"{out}:", *made.sentences())
