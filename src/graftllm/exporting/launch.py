"""A grafted directory for vLLM: an adapter of each pack, and the command that serves them."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftllm.errors import ServingError
from graftllm.exporting.adapter import FILES, LEGAL_RANKS, Adapter, NoAdapter, export_adapter, legal_rank
from graftllm.fusion.manifest import Manifest, open_base, open_packs, unchanged
from graftllm.fusion.names import unknown_pack
from graftllm.skillpack import SkillPack
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
    names: Sequence[str] = (),
    max_rank: int = LEGAL_RANKS[-1],
    allow_drop: bool = False,
    prompts: Path | None = None,
    device: str = "auto",
) -> Launch:
    """Write an adapter of each pack of a grafted model, or of some, and `launch.sh`.

    Args:
        directory: a grafted model.
        out: directory of adapters; appears whole or not at all. Names with `graftllm serve --engine` stay the same.
        names: of the packs to export; all if none.
        max_rank: as for `export_adapter`, as are the other arguments and errors.
        allow_drop: write adapters also where they lack something of their packs.
        prompts: JSONL rows to measure on.
        device: `auto` takes a GPU when there is one.

    Raises:
        ServingError: there is no pack, or some cannot travel, all of which are named.
        FusionError: there is no pack of a name, or this is no grafted model, or a file of it was changed.
    """
    legal_rank(max_rank)

    def look(manifest: Manifest) -> tuple[Manifest, dict[str, SkillPack]]:
        return manifest, open_packs(directory, _chosen(directory, manifest, names))

    manifest, packs = unchanged(directory, look)
    base = open_base(directory, manifest).path
    adapters: dict[str, Adapter] = {}
    refused: dict[str, NoAdapter] = {}
    with whole_directory(
        out, over=["launch.sh"], holds=[f"*/{file}" for file in FILES], beside=[base, directory]
    ) as partial:
        for name, pack in packs.items():
            try:
                adapters[name] = export_adapter(
                    pack, base, partial / name,
                    max_rank=max_rank, allow_drop=allow_drop, prompts=prompts, device=device,
                )  # fmt: skip
            except NoAdapter as error:
                refused[name] = error
        if refused:
            raise _refusal(directory, refused, adapters)
        command = _command(base, out, adapters)
        write_text(partial / "launch.sh", f"#!/bin/sh\nexec {command}\n")
        os.chmod(partial / "launch.sh", 0o755)
    return Launch(adapters, command)


def _chosen(directory: Path, manifest: Manifest, names: Sequence[str]) -> Manifest:
    """Return the manifest with the packs of these names alone; with all if there are none."""
    if not manifest.packs:
        raise ServingError(f"{directory}: there are no packs to export; put some there with `graftllm add`.")
    if unknown := next((name for name in names if name not in manifest.packs), None):
        raise unknown_pack(unknown, manifest.packs)
    packs = {name: pack for name, pack in manifest.packs.items() if not names or name in names}
    return manifest.model_copy(update={"packs": packs})


def _refusal(directory: Path, refused: Mapping[str, NoAdapter], adapters: Mapping[str, Adapter]) -> ServingError:
    """Return the error that names the packs that cannot travel, why, and what to do instead."""
    others = " ".join(f"--pack {name}" for name in adapters)
    told = "; ".join(f"{name} ({error.why})" for name, error in refused.items())
    mends = [f"Export the others alone with {others}."] if others else []
    mends += dict.fromkeys(error.mend for error in refused.values())
    return ServingError(f"{directory}: packs that no adapter can hold: {told}. {' '.join(mends)}")


def _command(base: Path, out: Path, adapters: dict[str, Adapter]) -> str:
    """Return the command that serves the base as `base` and each adapter by its pack's name."""
    rank = max(adapter.vllm_rank for adapter in adapters.values())
    modules = [f"{name}={out.resolve() / name}" for name in adapters]
    words = [
        "vllm", "serve", str(base.resolve()), "--served-model-name", "base", "--enable-lora",
        "--max-lora-rank", str(rank), "--max-loras", str(min(len(adapters), 8)), "--lora-modules", *modules,
    ]  # fmt: skip
    return shlex.join(words)
