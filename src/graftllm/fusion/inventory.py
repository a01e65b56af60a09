"""What stands on the shelf of a grafted model, as `graftllm list` shows it. Headers alone are read."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftllm.fusion.manifest import Manifest, read_manifest
from graftllm.fusion.rules import Rule
from graftllm.header import Header, TensorEntry
from graftllm.packfile import read_header

# Names of classes that continue their input; to ask transformers takes seconds.
_CONTINUES = re.compile(r"ForCausalLM$|LMHead|^Gemma\w*ForConditionalGeneration$")


@dataclass(frozen=True)
class Item:
    """One pack.

    Attributes:
        file_bytes: size of its file.
        sha256: of its file.
        description: from its card.
        beside: whether it can run beside the weights, as far as `runs_beside` knows.
        routed: whether the router knows it.
    """

    file_bytes: int
    sha256: str
    description: str
    beside: bool
    routed: bool


@dataclass(frozen=True)
class Inventory:
    """A grafted model without its weights."""

    directory: Path
    base: str
    fingerprint: str
    router: bool
    rules: Sequence[Rule]
    packs: Mapping[str, Item]

    columns = ("pack", "bytes", "sha256", "runs", "routed", "description")

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row of the table for each pack."""
        return [
            (
                name,
                f"{item.file_bytes:,}",
                item.sha256[:12],
                "merged, beside" if item.beside else "merged",
                "yes" if item.routed else "no",
                item.description,
            )
            for name, item in self.packs.items()
        ]

    def sentences(self) -> list[str]:
        """Return what the table does not show, a line each."""
        late = [name for name, item in self.packs.items() if not item.routed]
        router = "none" if not self.router else f"older than {', '.join(late)}" if late else "knows every pack"
        return [
            f"base    {self.base} ({self.fingerprint[:12]})",
            f"packs   {len(self.packs)}, {sum(item.file_bytes for item in self.packs.values()):,} bytes",
            f"router  {router}",
            *(f"rule    {rule.model_dump_json(exclude_none=True)}" for rule in self.rules),
        ]

    def figures(self) -> dict[str, Any]:
        """Return what `graftllm list --json` prints."""
        return {
            "base": self.base,
            "fingerprint": self.fingerprint,
            "router": self.router,
            "rules": [rule.model_dump(exclude_none=True) for rule in self.rules],
            "packs": {name: asdict(item) for name, item in self.packs.items()},
        }


def take_inventory(directory: Path) -> Inventory:
    """Read what a grafted directory consists of.

    Raises:
        FusionError: there is no such directory, or its manifest is not one.
        PackError: a pack is missing or damaged.
    """
    manifest: Manifest = read_manifest(directory)
    late = set(manifest.unrouted())
    packs = {}
    for name, shelved in manifest.packs.items():
        file = directory / shelved.file
        header = read_header(file)
        packs[name] = Item(
            file.stat().st_size, shelved.sha256, header.card.description, runs_beside(header), name not in late
        )
    return Inventory(directory, manifest.base, manifest.fingerprint, manifest.router is not None, manifest.rules, packs)


def runs_beside(header: Header) -> bool:
    """Return whether a pack can run beside the weights, as far as the architecture, names and shapes tell.

    It must be one that only continues its input, and all that the pack touches must be vectors of modules without
    parts, vocabularies, or matrices in factors. `branches.why_merged_only` asks the live model itself.
    """
    modules = {name.rpartition(".")[0] for name in header.tensors}
    parents = {module[:i] for module in modules for i, character in enumerate(module) if character == "."}
    return _CONTINUES.search(header.base.architecture) is not None and all(
        _has_branch(name, entry, parents)
        for name, entry in header.tensors.items()
        if entry.operator != "unchanged" or entry.tuned_spec != entry.spec
    )


def _has_branch(name: str, entry: TensorEntry, parents: Collection[str]) -> bool:
    module, _, key = name.rpartition(".")
    if entry.tuned_spec != entry.spec or entry.role == "expert" or module.endswith("embed_positions"):
        return False  # positions by that name, as OPT has them, look up by more than their input
    if len(entry.shape) == 1:
        return module not in parents
    if key != "weight" or len(entry.shape) != 2 or "norm" in module.rpartition(".")[2]:
        return False  # norms by heads have a matrix
    return entry.role in ("embedding", "head") or entry.operator in ("factored", "lowrank")
