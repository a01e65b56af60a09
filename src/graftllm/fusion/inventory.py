"""What stands on the shelf of a grafted model, as `graftllm list` shows it. Headers alone are read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftllm.fusion.directory import Manifest, read_manifest
from graftllm.fusion.rules import Rule
from graftllm.header import Header, read_header


@dataclass(frozen=True)
class Item:
    """One pack.

    Attributes:
        file_bytes: size of its file.
        sha256: of its file.
        description: from its card.
        factors: whether all matrices of its layers are factors, so that it can run beside the weights.
        routed: whether the router knows it.
    """

    file_bytes: int
    sha256: str
    description: str
    factors: bool
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
                "merged, beside" if item.factors else "merged",
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
            file.stat().st_size, shelved.sha256, header.card.description, in_factors(header), name not in late
        )
    return Inventory(directory, manifest.base, manifest.fingerprint, manifest.router is not None, manifest.rules, packs)


def in_factors(header: Header) -> bool:
    """Return whether the layers' matrices are stored as factors; vocabularies and vectors may be stored anyhow.

    Experts, which transformers stacks, do not count as factors.
    """
    allowed = ("factored", "lowrank", "unchanged")
    return all(
        entry.operator in (allowed if entry.role != "expert" else ("unchanged",)) and entry.tuned_spec == entry.spec
        for entry in header.tensors.values()
        if len(entry.shape) > 1 and entry.role not in ("embedding", "head")
    )
