"""What stands on the shelf of a grafted model, as `graftllm list` shows it.

Headers of packs are read, and of the base its config.json, of which a model without weights is built and asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftllm.companions import Companion
from graftllm.downloads import cached, repository
from graftllm.errors import FusionError, GraftError
from graftllm.fusion.branches import why_merged_only
from graftllm.fusion.manifest import Manifest, base_place, unchanged
from graftllm.fusion.rules import Rule
from graftllm.loading import bare_model
from graftllm.skillpack import SkillPack


@dataclass(frozen=True)
class Item:
    """One pack.

    Attributes:
        file_bytes: size of its file.
        sha256: of its file.
        description: from its card.
        beside: whether it can run beside the weights; None where that is not known.
        routed: whether the router knows it.
        own_files: by which it is asked in the place of the base's; None where it is asked as the base is.
    """

    file_bytes: int
    sha256: str
    description: str
    beside: bool | None
    routed: bool
    own_files: Sequence[Companion] | None


@dataclass(frozen=True)
class Inventory:
    """A grafted model without its weights.

    Attributes:
        unknown: why it is not known which packs can run beside the weights; empty where it is.
    """

    directory: Path
    base: str
    fingerprint: str
    router: bool
    rules: Sequence[Rule]
    packs: Mapping[str, Item]
    unknown: str = ""

    columns = ("pack", "bytes", "sha256", "runs", "routed", "description")

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row of the table for each pack."""
        return [
            (
                name,
                f"{item.file_bytes:,}",
                item.sha256[:12],
                _WAYS[item.beside],
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
            *self._own_files(),
            *([f"beside  not known: {self.unknown}"] if self.unknown else ()),
            *(f"rule    {rule.model_dump_json(exclude_none=True)}" for rule in self.rules),
        ]

    def _own_files(self) -> list[str]:
        """Return which packs are asked by files of their own, a line for each set of files."""
        packs: dict[str, list[str]] = {}
        for name, item in self.packs.items():
            if item.own_files is not None:
                packs.setdefault(", ".join(item.own_files) or "none", []).append(name)
        return [f"files   of {', '.join(names)}: {files}" for files, names in packs.items()]

    def figures(self) -> dict[str, Any]:
        """Return what `graftllm list --json` prints."""
        return {
            "base": self.base,
            "fingerprint": self.fingerprint,
            "router": self.router,
            "rules": [rule.model_dump(exclude_none=True) for rule in self.rules],
            "packs": {name: asdict(item) for name, item in self.packs.items()},
        }


_WAYS = {True: "merged, beside", False: "merged", None: "merged, beside?"}


def take_inventory(directory: Path) -> Inventory:
    """Read what a grafted directory consists of, as one state of it where another process changes it meanwhile.

    Raises:
        FusionError: there is no such directory, or its manifest is not one.
        PackError: a pack is missing or damaged.
    """
    manifest, packs, sizes = unchanged(directory, lambda manifest: _looked_at(directory, manifest))
    beside, unknown = dict[str, bool](), ""
    try:
        beside = _can_run_beside(directory, manifest, packs)
    except GraftError as error:
        unknown = str(error)
    late = set(manifest.unrouted())
    items = {
        name: Item(
            file_bytes=sizes[name],
            sha256=shelved.sha256,
            description=packs[name].header.card.description,
            beside=beside.get(name),
            routed=name not in late,
            own_files=packs[name].header.own_files,
        )
        for name, shelved in manifest.packs.items()
    }
    has_router = manifest.router is not None
    return Inventory(directory, manifest.base, manifest.fingerprint, has_router, manifest.rules, items, unknown)


def _looked_at(directory: Path, manifest: Manifest) -> tuple[Manifest, dict[str, SkillPack], dict[str, int]]:
    """Return the packs that a manifest names, and the sizes of their files."""
    files = {name: directory / shelved.file for name, shelved in manifest.packs.items()}
    packs = {name: SkillPack.load(file) for name, file in files.items()}
    return manifest, packs, {name: file.stat().st_size for name, file in files.items()}


def _can_run_beside(directory: Path, manifest: Manifest, packs: Mapping[str, SkillPack]) -> dict[str, bool]:
    """Return of each pack whether it can run beside the weights, as the live model would say it.

    What the Hub's cache lacks is not downloaded for a look.
    """
    place = base_place(directory, manifest)
    if isinstance(place, str):
        source = repository(place)
        config = None if source is None else cached(source, "config.json")
        if config is None:
            raise FusionError(
                f"{directory}: its base {place} is no directory, and not in the Hub's cache, where loading it puts it."
            )
        place = config.parent
    model = bare_model(place)
    return {name: why_merged_only(model, pack) is None for name, pack in packs.items()}
