"""What a grafted directory consists of, as its manifest says, and its parts opened; `directory` changes it."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, StringConstraints, ValidationError

from graftllm.checkpoint import Checkpoint
from graftllm.errors import FusionError, GraftError
from graftllm.fusion.names import plain_name
from graftllm.fusion.routing import Router
from graftllm.fusion.rules import Rule
from graftllm.recipe import PACK_NAME
from graftllm.skillpack import SkillPack

AUTO = "auto"
MANIFEST = "manifest.json"
HASH = 12  # hexadecimal digits of the SHA-256 of a router's file that are in its name
_LONGEST = 1 << 20  # bytes of a manifest, of some thousand packs; what is wrong in it takes hundreds of times as many

Seen = TypeVar("Seen")
PackName = Annotated[str, AfterValidator(plain_name)]


class ShelvedPack(BaseModel):
    """One pack of a grafted model: its file, relative to the directory, and the file's SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: Annotated[str, StringConstraints(pattern=rf"^packs/{PACK_NAME}\.safetensors$")]
    sha256: str


class ShelvedRouter(BaseModel):
    """The router's file, relative to the directory, and the SHA-256 of each pack that it was trained on, by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: Annotated[str, StringConstraints(pattern=rf"^router-[0-9a-f]{{{HASH}}}\.safetensors$")]
    packs: dict[PackName, str]


class Manifest(BaseModel):
    """What a grafted model consists of. `base` is a path relative to the directory, or a Hub id."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["graftllm/grafted"] = "graftllm/grafted"
    version: Literal[1] = 1
    base: str
    fingerprint: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    packs: dict[PackName, ShelvedPack]
    router: ShelvedRouter | None = None
    rules: Annotated[tuple[Rule, ...], FailFast()] = ()

    def unrouted(self) -> list[str]:
        """Return the packs that the router does not know, or knows as other files: it is older than they are."""
        known = {} if self.router is None else self.router.packs
        return [name for name, pack in self.packs.items() if known.get(name) != pack.sha256]


def read_manifest(directory: Path) -> Manifest:
    """Read what a grafted directory consists of.

    Raises:
        FusionError: there is no such directory, or its manifest is not one, or longer than 1 MiB.
    """
    try:
        with open(directory / MANIFEST, "rb") as file:
            text = file.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise FusionError(
                f"{directory / MANIFEST}: expected at most {_LONGEST:,} bytes, found more. Run `graftllm fuse` again."
            )
        return Manifest.model_validate_json(text)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FusionError(
            f"{directory}: expected a grafted model, found no {MANIFEST} in it; make one with `graftllm fuse`."
        ) from error
    except OSError as error:
        raise FusionError(f"{directory / MANIFEST}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "expected JSON"
        raise FusionError(
            f"{directory / MANIFEST}: {place}: {first['msg'].removeprefix('Value error, ')}. Run `graftllm fuse` again."
        ) from error


def manifest_text(directory: Path, manifest: Manifest) -> str:
    """Return what is written of a manifest, so that `read_manifest` reads it.

    Raises:
        FusionError: it is longer than 1 MiB.
    """
    text = manifest.model_dump_json(indent=1)
    if (size := len(text.encode())) > _LONGEST:
        raise FusionError(
            f"{directory / MANIFEST}: expected at most {_LONGEST:,} bytes, found {size:,} (packs: "
            f"{len(manifest.packs)}, rules: {len(manifest.rules)}). Take fewer, or shorter rules."
        )
    return text


def open_shelf(directory: Path) -> tuple[Manifest, dict[str, SkillPack], Router | None]:
    """Return what a grafted directory consists of, with its packs and router as that says.

    Where another process changes the directory meanwhile, they are those of before, or those of after.

    Raises:
        FusionError: the directory is no grafted model, or a file is missing, damaged or was changed.
        PackError: a pack is damaged.
    """
    return unchanged(
        directory,
        lambda manifest: (manifest, open_packs(directory, manifest), open_router(directory, manifest)),
    )


def unchanged(directory: Path, look: Callable[[Manifest], Seen]) -> Seen:
    """Return what a look at the files of a grafted directory gives; one during which it was changed is taken again.

    Raises:
        FusionError: the directory is no grafted model.
        GraftError: as `look` raises it.
    """
    while True:
        manifest = read_manifest(directory)
        try:
            seen = look(manifest)
        except (GraftError, OSError):
            if read_manifest(directory) == manifest:
                raise
        else:
            if read_manifest(directory) == manifest:
                return seen


def open_packs(directory: Path, manifest: Manifest) -> dict[str, SkillPack]:
    """Open the packs of a grafted directory by name.

    Raises:
        FusionError: a file is missing or was changed.
        PackError: a pack is damaged.
    """
    return {name: _open_pack(directory, name, shelved) for name, shelved in manifest.packs.items()}


def open_router(directory: Path, manifest: Manifest) -> Router | None:
    """Open the router of a grafted directory, if it has one.

    Raises:
        FusionError: the file is missing, damaged or was changed.
    """
    return None if manifest.router is None else open_router_file(directory / manifest.router.file)


def open_router_file(path: Path) -> Router:
    """Open a router by its file, whose name tells its hash.

    Raises:
        FusionError: the file is missing, damaged or was changed.
    """
    if not path.exists():
        raise FusionError(f"{path}: the manifest names this router, which is not there. Run `graftllm fuse` again.")
    with suppress(OSError):  # which the router tells
        if path.stem.removeprefix("router-") != (found := sha256_of(path)[:HASH]):
            raise FusionError(
                f"{path}: expected what its name says, found {found}: it was changed. Run `graftllm fuse` again."
            )
    return Router.load(path)


def open_base(directory: Path, manifest: Manifest, *, check: bool = True) -> Checkpoint:
    """Open the base of a grafted directory.

    Args:
        directory: a grafted model.
        manifest: what it consists of.
        check: compare the weights with the fingerprint, for which all of them are read.

    Raises:
        FusionError: the weights are not those that the packs were made for.
        CheckpointError: the base is missing or not whole.
    """
    base = Checkpoint.open(base_place(directory, manifest))
    if check and base.fingerprint != manifest.fingerprint:
        raise FusionError(
            f"{base.path}: expected the base of {directory} ({manifest.fingerprint[:12]}), found other weights "
            f"({base.fingerprint[:12]}): they were changed or replaced. Put the old ones back, or make packs of this "
            "base and run `graftllm fuse` again."
        )
    return base


def base_place(directory: Path, manifest: Manifest) -> Path | str:
    """Return where the base of a grafted directory is: a directory that is there, or a Hub id.

    Raises:
        FusionError: there is no such directory.
    """
    beside = Path(os.path.normpath(directory.resolve() / manifest.base))
    if beside.is_dir():
        return beside
    if manifest.base.startswith("."):
        raise FusionError(
            f"{directory}: its base, {manifest.base} as seen from there, is not at {beside}. Put it there, or correct "
            f"`base` in {directory / MANIFEST}: a directory, absolute or as seen from {directory}, or a Hub id."
        )
    return manifest.base


def _open_pack(directory: Path, name: str, shelved: ShelvedPack) -> SkillPack:
    path = directory / shelved.file
    if not path.is_file():
        raise FusionError(
            f"{directory}: the manifest names {shelved.file}, which is not there. Run `graftllm fuse` again."
        )
    if (found := sha256_of(path)) != shelved.sha256:
        raise FusionError(
            f"{path}: expected SHA-256 {shelved.sha256[:12]}..., found {found[:12]}...; the file was changed, as by a "
            "copy over the one that it is linked to. Put the old one back, or take it as it is: `graftllm remove "
            f"{directory} {name}`, then `graftllm add` it again."
        )
    return SkillPack.load(path)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
