"""Packs and grafted models to the Hugging Face Hub and back; what comes back is trusted no more than a stranger's.

A repository holds `skillpack.safetensors`, or what a grafted directory holds, and a README.md. Everything that is
pulled is read at one commit and checked whole before it appears.
"""

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError

from graftllm.checkpoint import Checkpoint
from graftllm.downloads import Repository, download, hub_errors, repository
from graftllm.errors import HubError, PackError
from graftllm.fusion.assembly import check_none_lost
from graftllm.fusion.directory import HOLDS
from graftllm.fusion.manifest import (
    MANIFEST,
    Manifest,
    manifest_text,
    open_packs,
    open_router,
    open_shelf,
    read_manifest,
)
from graftllm.hub.modelcard import MARK, grafted_card, pack_card
from graftllm.packfile import check_place
from graftllm.progress import track
from graftllm.skillpack import PACK_FILE, SkillPack
from graftllm.storage import check_apart, only_writer, whole_directory, whole_file, write_text

_CARD = "README.md"
_OURS = re.compile(r"packs/\w[\w.-]*\.safetensors|router-[0-9a-f]{12}\.safetensors")


@dataclass(frozen=True)
class Pushed:
    """What was pushed: at which commit of which repository, and the files of that."""

    repository: str
    commit: str
    url: str
    files: Sequence[str]


@dataclass(frozen=True)
class Pulled:
    """What was pulled: where it lies now, and at which commit of which repository it was."""

    path: Path
    repository: str
    commit: str
    packs: Sequence[str]


def push(
    source: Path, repo: str, *, base: str | None = None, private: bool | None = None, revision: str | None = None
) -> Pushed:
    """Put a pack or a grafted directory on the Hub, in one commit; the repository is made where there is none.

    What the Hub already has is not sent again, so after an interruption the same call goes on. A README.md that does
    not come from here is left as it is.

    Args:
        source: a SkillPack file, or a grafted directory.
        repo: user/repo.
        base: Hub id of the base, where the pack or the directory knows only a path.
        private: of a repository that is made; None leaves it to the owner's settings.
        revision: branch to put it on; the main one by default.

    Raises:
        HubError: the Hub cannot be reached or refuses, or the base's Hub id is not known.
        PackError: a pack is damaged; nothing is sent then.
        FusionError: the directory is no grafted model, or was changed.
    """
    to = repository(repo, revision)
    if to is None:
        raise HubError(f"{repo}: not a name of a repository; expected user/repo.")
    api, contents = HfApi(library_name="graftllm"), _contents(source, to, base)
    with hub_errors(to.name):
        api.create_repo(to.name, private=private, exist_ok=True)
        if to.revision is not None:
            api.create_branch(to.name, branch=to.revision, exist_ok=True)
        there = api.list_repo_files(to.name, revision=to.revision)
        if _CARD in there and MARK not in download(to, _CARD).read_text(encoding="utf-8", errors="replace"):
            del contents[_CARD]
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
        gone = [name for name in there if _is_ours(name) and name not in contents]
        operations += [CommitOperationDelete(name) for name in gone]
        done = api.create_commit(to.name, operations, commit_message=f"Push {source.name}", revision=to.revision)
    return Pushed(to.name, str(done.oid), f"{api.endpoint}/{to.name}", tuple(contents))


def pull(source: str, out: Path | None = None, *, revision: str | None = None, base: Path | None = None) -> Pulled:
    """Get a pack or a grafted model from the Hub, all of it at one commit, and check it before it appears.

    Args:
        source: user/repo, or user/repo@revision.
        out: the pack's file, or the grafted directory; by default named after the repository.
        revision: branch, tag or commit.
        base: checkpoint directory of the base: checked to be that, and referred to by a grafted directory.

    Raises:
        HubError: the Hub cannot be reached, has nothing of the kind, or what it gave is not what it should be.
        PackError: a pack is damaged, hostile or made for another base.
        FusionError: a file is not the one that the manifest names, or at `out` is a grafted model with other packs, or
            a manifest of another kind.
        StorageError: at `out` are files that would be lost, or another process changes what is there now.
    """
    wanted = repository(source, revision)
    if wanted is None:
        raise HubError(f"{source}: not a name of a repository; expected user/repo or user/repo@revision.")
    first = _first_there(wanted, (PACK_FILE, MANIFEST))
    pinned = Repository(wanted.name, first.parent.name)  # a snapshot's directory is named after its commit
    name = wanted.name.rpartition("/")[2]
    if first.name == PACK_FILE:
        path = out or Path(f"{name}.safetensors")
        check_apart(path, [] if base is None else [base])
        check_place(path)
        _check_pack(SkillPack.load(first), None if base is None else Checkpoint.open(base))
        with open(first, "rb") as file, whole_file(path) as copy:
            shutil.copyfileobj(file, copy)
        return Pulled(path, pinned.name, str(pinned.revision), (path.stem,))
    path = out or Path(name)
    manifest = _pull_directory(pinned, first, path, base)
    return Pulled(path, pinned.name, str(pinned.revision), tuple(manifest.packs))


def _contents(source: Path, to: Repository, base: str | None) -> dict[str, str | bytes]:
    """Return what goes into a repository by name: paths of files, or bytes."""
    if (source / MANIFEST).is_file():
        manifest, packs, _ = open_shelf(source)
        for pack in packs.values():
            _check_pack(pack, None)
        headers = {name: pack.header for name, pack in packs.items()}
        known = _hub_id(base, [manifest.base, *(header.base.name for header in headers.values())], source)
        text = manifest_text(source, manifest.model_copy(update={"base": known}))
        return {
            MANIFEST: text.encode(),
            **{file: str(source / file) for file in _files(manifest)},
            _CARD: grafted_card(manifest, headers, to.name, known).encode(),
        }
    pack = SkillPack.load(source)
    _check_pack(pack, None)
    known = _hub_id(base, [pack.header.base.name], source)
    return {PACK_FILE: str(source), _CARD: pack_card(pack.header, to.name, known).encode()}


def _hub_id(given: str | None, known: Sequence[str], source: Path) -> str:
    """Return the base's Hub id: the one given, or the first known name that is one."""
    found = [name for name in ([given] if given else known) if repository(name) is not None]
    if not found:
        raise HubError(
            f"{source}: its base is known as {(given or known[0])!r}, which others cannot find. "
            "Give the base's name on the Hub, --base org/name."
        )
    return found[0]


def _first_there(source: Repository, names: Sequence[str]) -> Path:
    """Return the first of some files that a repository has."""
    for name in names[:-1]:
        try:
            return download(source, name)
        except HubError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
    try:
        return download(source, names[-1])
    except HubError as error:
        if isinstance(error.__cause__, EntryNotFoundError) and not isinstance(error.__cause__, FileNotFoundError):
            raise HubError(
                f"{source}: expected {' or '.join(names)} in the repository, found neither. "
                "It is no repository that `graftllm push` made; check the name."
            ) from error
        raise


def _pull_directory(pinned: Repository, first: Path, out: Path, base: Path | None) -> Manifest:
    """Write a grafted directory from the files of one commit; it appears when all of them are as they should be."""
    manifest = read_manifest(first.parent)
    odd = [file for file in _files(manifest) if not _is_ours(file)]
    if odd or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", manifest.base) is None:
        raise HubError(
            f"{pinned}: {MANIFEST} names {(odd or [manifest.base])[0]!r}; expected files below packs/ and a base on "
            "the Hub. It was not made by `graftllm push`."
        )
    if (out / MANIFEST).exists():
        read_manifest(out)  # one of another kind stays
    checkpoint = None if base is None else Checkpoint.open(base)
    if base is not None:
        check_apart(out, [base])
        manifest = manifest.model_copy(update={"base": os.path.relpath(base.resolve(), out.resolve())})
    held = only_writer(out) if out.is_dir() else nullcontext()  # against changes of the one that is replaced
    with held, whole_directory(out, over=[MANIFEST], holds=HOLDS) as partial:
        check_none_lost(out, manifest.packs)
        (partial / "packs").mkdir()
        for file in track(_files(manifest), label="pulling"):
            shutil.copyfile(download(pinned, file), partial / file)
        for pack in open_packs(partial, manifest).values():
            if (made_for := pack.header.base.fingerprint) != manifest.fingerprint:
                raise PackError(
                    f"{pinned}: {Path(pack.source).name} was made for the base {made_for[:12]}, but the manifest says "
                    f"{manifest.fingerprint[:12]}. It was not made by `graftllm push`."
                )
            _check_pack(pack, checkpoint)
        open_router(partial, manifest)
        write_text(partial / MANIFEST, manifest_text(out, manifest))
    return manifest


def _check_pack(pack: SkillPack, base: Checkpoint | None) -> None:
    """Compare every payload with its digest and, where there is a base, its fingerprint with the pack's.

    Raises:
        PackError: the pack is damaged, or made for another base.
    """
    if base is not None:
        pack.check_base(base)
        if (known := pack.header.base).fingerprint != base.fingerprint:
            raise PackError(
                f"{pack.source}: made for the base {known.name} ({known.fingerprint[:12]}), but {base.path} is "
                f"{base.fingerprint[:12]}. Give that base, or leave --base out."
            )
    pack.check_payloads()


def _files(manifest: Manifest) -> list[str]:
    return [pack.file for pack in manifest.packs.values()] + ([manifest.router.file] if manifest.router else [])


def _is_ours(name: str) -> bool:
    return name in (PACK_FILE, MANIFEST) or _OURS.fullmatch(name) is not None
