"""A grafted directory for vLLM: an adapter of each pack, and the command that serves them."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from graftllm.errors import ServingError
from graftllm.exporting.adapter import FILES, LEGAL_RANKS, Adapter, export_adapter
from graftllm.fusion.manifest import open_base, read_manifest
from graftllm.storage import whole_directory, write_text


@dataclass(frozen=True)
class Launch:
    """Adapters by name, and the command line."""

    adapters: dict[str, Adapter]
    command: str


def export_shelf(
    directory: Path,
    out: Path,
    *,
    max_rank: int = LEGAL_RANKS[-1],
    allow_drop: bool = False,
    prompts: Path | None = None,
    device: str = "auto",
) -> Launch:
    """Write an adapter of each pack of a grafted model, and `launch.sh`.

    Args:
        directory: a grafted model.
        out: directory of adapters; appears whole or not at all. Names with `graftllm serve --engine` stay the same.
        max_rank: as for `export_adapter`, as are the other arguments and errors.
        allow_drop: write adapters also where they lack something of their packs.
        prompts: JSONL rows to measure on.
        device: `auto` takes a GPU when there is one.

    Raises:
        ServingError: there is no pack, or one cannot travel.
    """
    manifest = read_manifest(directory)
    if not manifest.packs:
        raise ServingError(f"{directory}: there are no packs to export; put some there with `graftllm add`.")
    base = open_base(directory, manifest).path
    with whole_directory(
        out, over=["launch.sh"], holds=[f"*/{file}" for file in FILES], beside=[base, directory]
    ) as partial:
        adapters = {
            name: export_adapter(
                directory / pack.file, base, partial / name,
                max_rank=max_rank, allow_drop=allow_drop, prompts=prompts, device=device,
            )
            for name, pack in manifest.packs.items()
        }  # fmt: skip
        command = _command(base, out, adapters)
        write_text(partial / "launch.sh", f"#!/bin/sh\nexec {command}\n")
        os.chmod(partial / "launch.sh", 0o755)
    return Launch(adapters, command)


def _command(base: Path, out: Path, adapters: dict[str, Adapter]) -> str:
    """Return the command that serves the base as `base` and each adapter by its pack's name."""
    rank = max(adapter.vllm_rank for adapter in adapters.values())
    modules = [f"{name}={out.resolve() / name}" for name in adapters]
    words = [
        "vllm", "serve", str(base.resolve()), "--served-model-name", "base", "--enable-lora",
        "--max-lora-rank", str(rank), "--max-loras", str(min(len(adapters), 8)), "--lora-modules", *modules,
    ]  # fmt: skip
    return shlex.join(words)
