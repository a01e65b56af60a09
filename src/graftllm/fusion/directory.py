"""The directory of a grafted model: what is in it, and changes to it that happen whole or not at all.

    grafted/
      manifest.json            base reference and fingerprint; packs by name, file and SHA-256; router; rules
      packs/NAME.safetensors   SkillPacks, linked where possible, else copied
      router-HASH.safetensors  optional

The base is referred to, not copied; a relative path keeps a moved run directory whole. The manifest
alone says what belongs: files are put in place before it is replaced and taken away after, so a
process killed at any moment leaves the old model or the new one. A change that fails takes back what it put.
"""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from graftllm.checkpoint import Checkpoint
from graftllm.errors import FusionError
from graftllm.fusion.manifest import (
    HASH,
    MANIFEST,
    Manifest,
    ShelvedPack,
    ShelvedRouter,
    manifest_text,
    open_base,
    open_router_file,
    read_manifest,
    sha256_of,
)
from graftllm.fusion.names import check_names, unknown_pack
from graftllm.fusion.routes import BASE
from graftllm.fusion.routing import Router
from graftllm.fusion.rules import Rule
from graftllm.skillpack import SkillPack
from graftllm.storage import check_apart, only_writer, whole_directory, whole_file, write_text, writing

_PASSING = ".router.safetensors"  # a router's name until its bytes, and with them its hash, are known
HOLDS = ("packs/*.safetensors", "router-*.safetensors", _PASSING, ".*.partial", "packs/.*.partial")


def write_grafted(
    out: Path, base: str, packs: Mapping[str, Path], router: Router | None = None, rules: Sequence[Rule] = ()
) -> None:
    """Write a grafted directory: packs linked or copied, the base referred to.

    Args:
        out: appears whole or not at all.
        base: checkpoint directory or Hub id.
        packs: pack files by the names they shall have.
        router: its classes are `base` and names of packs.
        rules: prompts that go to a pack whatever the router says.

    Raises:
        FusionError: a name is reserved, a pack is for another base, a rule names no pack, or the manifest is too long.
        PackError: a pack is damaged or was made for another base.
        StorageError: another process writes there now, or nobody can.
    """
    checkpoint = Checkpoint.open(base)
    check_fusable(out, list(packs.values()))
    manifest = Manifest(
        base=base if not Path(base).is_dir() else os.path.relpath(Path(base).resolve(), out.resolve()),
        fingerprint=checkpoint.fingerprint,
        packs={},
    )
    held = only_writer(out) if out.is_dir() else nullcontext()  # against changes of the one that is replaced
    with held, whole_directory(out, over=[MANIFEST], holds=HOLDS, beside=[checkpoint.path]) as partial:
        manifest = _with_packs(partial, manifest, packs, checkpoint)
        manifest = _with_rules(out, _with_router(partial, manifest, router), rules)
        write_text(partial / MANIFEST, manifest_text(out, manifest))


def check_fusable(out: Path, read: Sequence[Path]) -> None:
    """Check that a grafted directory may be written, in the place of another one, too.

    Args:
        out: where.
        read: files that it is made of. Only packs of the directory that is replaced may lie in it.

    Raises:
        FusionError: what is there has a manifest of another kind.
        StorageError: a file that is read would be deleted.
    """
    if (out / MANIFEST).exists():
        read_manifest(out)
    check_apart(out, [file for file in read if not file.resolve().is_relative_to((out / "packs").resolve())])


def add_packs(
    directory: Path, packs: Mapping[str, Path], *, router: Router | None = None, taught: Manifest | None = None
) -> Manifest:
    """Put packs on a shelf; nothing that is there is touched.

    Args:
        directory: a grafted model.
        packs: pack files by the names they shall have.
        router: one that knows the new packs, too; without it the old one stays, and does not know them.
        taught: the manifest whose router it was made of; a change that came since is refused, not undone.

    Returns:
        The new manifest.

    Raises:
        FusionError: a name is taken or reserved, a pack is for another base, the directory has got another router since
            `taught`, or this is no grafted model.
        PackError: a pack is damaged or was made for another base.
        StorageError: another process changes the directory now, or it cannot be written.
    """
    with _changing(directory, packs) as manifest:
        if taught is not None and manifest.router != taught.router:
            raise FusionError(
                f"{directory}: expected the router that learnt of {', '.join(packs)}, found another; it was changed "
                "meanwhile. Nothing was added; run the same command again."
            )
        changed = _with_packs(directory, manifest, packs, open_base(directory, manifest, check=False))
        if router is not None:
            changed = _with_router(directory, changed, router)
        _commit(directory, changed, manifest)
    return changed


def remove_pack(directory: Path, name: str) -> Manifest:
    """Take a pack off a shelf; every other pack stays as it is, bit for bit.

    The router becomes what it would be without the pack's prompts; it needs no others for that. One that knows no
    pack any more stays, with the general prompts' examples, and can learn again.

    Returns:
        The new manifest.

    Raises:
        FusionError: there is no such pack, a rule names it, or this is no grafted model.
        StorageError: another process changes the directory now, or it cannot be written.
    """
    with _changing(directory) as manifest:
        if name not in manifest.packs:
            raise unknown_pack(name, manifest.packs)
        if used := [i for i, rule in enumerate(manifest.rules, 1) if rule.pack == name]:
            raise FusionError(
                f"{directory}: rule {used[0]} of {len(manifest.rules)} sends prompts to the pack {name!r}; "
                f"take the rule out first (`graftllm rules {directory} FILE`)."
            )
        changed = manifest.model_copy(update={"packs": {key: p for key, p in manifest.packs.items() if key != name}})
        if manifest.router is not None and name in manifest.router.packs:
            router = open_router_file(directory / manifest.router.file)
            changed = _with_router(directory, changed, router.without(name))
        _commit(directory, changed, manifest)
    return changed


def set_router(directory: Path, router: Router | None) -> Manifest:
    """Give a grafted model another router, or none.

    Returns:
        The new manifest.

    Raises:
        FusionError: the router knows a pack that is not there, or this is no grafted model.
        StorageError: another process changes the directory now, or it cannot be written.
    """
    with _changing(directory) as manifest:
        changed = _with_router(directory, manifest, router)
        _commit(directory, changed, manifest)
    return changed


def set_rules(directory: Path, rules: Sequence[Rule]) -> Manifest:
    """Give a grafted model other rules; the first that fits a prompt counts.

    Returns:
        The new manifest.

    Raises:
        FusionError: a rule names no pack, the manifest becomes too long, or this is no grafted model.
        StorageError: another process changes the directory now, or it cannot be written.
    """
    with _changing(directory) as manifest:
        changed = _with_rules(directory, manifest, rules)
        _commit(directory, changed, manifest)
    return changed


def check_new(directory: Path, manifest: Manifest, names: Collection[str]) -> None:
    """Refuse names under which no pack can come to a shelf.

    Raises:
        FusionError: one is reserved or taken.
    """
    check_names(names)
    if taken := next((name for name in names if name in manifest.packs), None):
        raise FusionError(
            f"pack {taken!r}: this grafted model has one of that name; choose another name, or remove the old one "
            f"first (`graftllm remove {directory} {taken}`)."
        )


def open_fitting(packs: Mapping[str, Path], base: Checkpoint) -> dict[str, SkillPack]:
    """Open packs that are to come to a shelf, by name, compare every payload with its digest, and try their tokenizers.

    Raises:
        PackError: one is damaged or was made for another base, or its tokenizer does not load.
        CheckpointError: the base's tokenizer does not load.
    """
    opened = {name: SkillPack.load(path) for name, path in packs.items()}
    for pack in opened.values():
        pack.check_base(base)
        pack.check_payloads()
        if pack.header.companions:  # transformers takes seconds to import, and most packs have none
            from graftllm.fusion.voices import check_voice

            check_voice(base, pack)
    return opened


@contextmanager
def _changing(directory: Path, coming: Collection[str] = ()) -> Iterator[Manifest]:
    """Yield the manifest while no other process may change the directory.

    Args:
        directory: a grafted model; if the change fails, routers and packs go that were not there before.
        coming: names of packs that the change puts there.
    """
    read_manifest(directory)  # before a lock makes a directory of a name that was mistyped
    with only_writer(directory):
        manifest, before = read_manifest(directory), _there(directory, coming)
        try:
            yield manifest
        except BaseException:
            for file in _there(directory, coming) - before - _files(read_manifest(directory)):
                with suppress(OSError):
                    (directory / file).unlink()
            raise


def _there(directory: Path, names: Collection[str]) -> set[str]:
    """Return the files of routers and of packs of these names, whether the manifest names them or not."""
    packs = {f"packs/{file.name}" for file in directory.glob("packs/*.safetensors") if file.stem in names}
    routers = [file for pattern in ("router-*.safetensors", _PASSING) for file in directory.glob(pattern)]
    return packs | {file.name for file in routers}


def _commit(directory: Path, changed: Manifest, old: Manifest) -> None:
    """Make a manifest the directory's, then take away the files that only the old one names."""
    write_text(directory / MANIFEST, manifest_text(directory, changed))
    for file in _files(old) - _files(changed):
        with suppress(OSError):  # a file that no manifest names does no harm
            (directory / file).unlink()


def _files(manifest: Manifest) -> set[str]:
    routers = set() if manifest.router is None else {manifest.router.file}
    return {pack.file for pack in manifest.packs.values()} | routers


def _with_packs(directory: Path, manifest: Manifest, packs: Mapping[str, Path], base: Checkpoint) -> Manifest:
    """Put pack files into a directory, when all are known to fit; return its manifest with them."""
    check_new(directory, manifest, packs)
    opened = open_fitting(packs, base)
    for pack in opened.values():
        if (made_for := pack.header.base).fingerprint != manifest.fingerprint:
            raise FusionError(
                f"{pack.source}: made for the base {made_for.name} ({made_for.fingerprint[:12]}), but {base.path} is "
                f"{manifest.fingerprint[:12]}. Use that base or rebuild the pack."
            )
    shelved = dict(manifest.packs)
    for name, pack in opened.items():
        file = f"packs/{name}.safetensors"
        _link_or_copy(Path(pack.source), directory / file)
        shelved[name] = ShelvedPack(file=file, sha256=sha256_of(directory / file))
    return manifest.model_copy(update={"packs": shelved})


def _with_router(directory: Path, manifest: Manifest, router: Router | None) -> Manifest:
    """Put a router's file into a directory; return its manifest with it."""
    if router is None:
        return manifest.model_copy(update={"router": None})
    known = [name for name in router.classes if name != BASE]
    if missing := [name for name in known if name not in manifest.packs]:
        raise FusionError(f"router: knows the pack {missing[0]!r}, which is not there; expected {_list(manifest)}.")
    passing = directory / _PASSING
    router.save(passing)
    file = f"router-{sha256_of(passing)[:HASH]}.safetensors"
    os.replace(passing, directory / file)
    packs = {name: manifest.packs[name].sha256 for name in known}
    return manifest.model_copy(update={"router": ShelvedRouter(file=file, packs=packs)})


def _with_rules(directory: Path, manifest: Manifest, rules: Sequence[Rule]) -> Manifest:
    for i, rule in enumerate(rules, 1):
        if rule.pack not in (BASE, *manifest.packs):
            raise FusionError(
                f"{directory}: rule {i} names the pack {rule.pack!r}, which is not there; "
                f"expected base or {_list(manifest)}."
            )
    return manifest.model_copy(update={"rules": tuple(rules)})


def _list(manifest: Manifest) -> str:
    return ", ".join(manifest.packs) or "no pack, since there is none"


def _link_or_copy(source: Path, place: Path) -> None:
    """Put a file in its place whole; what a killed process may have left there is no pack of the manifest."""
    if place.exists() and place.samefile(source):
        return
    with writing(place):
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), place)  # the file itself, where the name is a link, as in the Hub's cache
    except OSError:  # another file system, or one without links
        with open(source, "rb") as file, whole_file(place) as copy:
            shutil.copyfileobj(file, copy)
