"""The commands that take packs to where they are used: serve, export. `cli` registers them.

Like there, no logic lives here and heavy imports happen inside the functions.
"""

from pathlib import Path
from typing import Annotated

import typer

from graftllm.terminal import Device

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
        typer.Option(min=0, help="GiB of decoded packs to keep.  [default: the model's size, at least 1]"),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Choices that may wait; more are refused (429).")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, help="Choices that are written at once.")] = 32,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together.  [default: the model's]")
    ] = None,
    max_body: Annotated[float, typer.Option(min=0.001, help="MiB of a request; larger are refused (413).")] = 4.0,
    device: Device = "auto",
) -> None:
    """Serve a grafted model as an OpenAI-compatible endpoint, with a page to talk to it.

    Models are `base`, each pack by its name, and `auto`, where the router chooses. Ctrl-C finishes what is begun.
    """
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
        lambda: Local(dir, limits, device=device),
        host=host,
        port=port,
        api_key=api_key,
        admin_key=admin_key,
        max_body=limits.max_body,
    )
