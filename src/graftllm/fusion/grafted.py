"""GraftedModel: a base model, a shelf of packs and a router, as one directory.

    grafted/
      manifest.json            base reference and fingerprint; packs by name, file and SHA-256
      packs/NAME.safetensors   SkillPacks, linked where possible, else copied
      router.safetensors       optional

The base is referred to, not copied; a relative path keeps a moved run directory whole.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.checkpoint import Checkpoint
from graftllm.errors import FusionError
from graftllm.fusion.grafting import Graft, plug
from graftllm.fusion.routing import BASE, Route, Router, fit_router, prompt_features
from graftllm.generation import GREEDY, generate, load_model, load_tokenizer, stream
from graftllm.recipe import SamplingOptions
from graftllm.records import Message, Prompt, read_prompts
from graftllm.skillpack import SkillPack
from graftllm.storage import whole_directory, write_text

AUTO = "auto"
MANIFEST = "manifest.json"
Conversation = str | Sequence[Message]


class ShelvedPack(BaseModel):
    """One pack of a grafted model: its file, relative to the directory, and the file's SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    sha256: str


class Manifest(BaseModel):
    """What a grafted model consists of. `base` is a path relative to the directory, or a Hub id."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["graftllm/grafted"] = "graftllm/grafted"
    version: Literal[1] = 1
    base: str
    fingerprint: str
    packs: dict[str, ShelvedPack]
    router: str | None = None


@dataclass(frozen=True)
class GraftedModel:
    """A live base model that answers with any of its packs.

    One thread at a time: a pack is plugged in while it answers.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    packs: Mapping[str, SkillPack]
    router: Router | None
    _checked: set[str] = field(default_factory=set)

    @classmethod
    def load(cls, directory: str | Path, *, device: str = "auto") -> "GraftedModel":
        """Load the base and open the packs of a grafted directory.

        Raises:
            FusionError: the directory is no grafted model, or a file of it was changed.
            CheckpointError: the base is missing or cannot be loaded.
            PackError: a pack is damaged or was made for another base.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        packs = {name: _open_pack(directory, name, shelved) for name, shelved in manifest.packs.items()}
        base = Checkpoint.open(_base_location(directory, manifest.base))
        for pack in packs.values():
            pack.check_base(base)
        router = Router.load(directory / manifest.router) if manifest.router else None
        if router is not None and (missing := set(router.classes) - {BASE, *packs}):
            raise FusionError(
                f"{directory}: the router knows the pack {min(missing)!r}, which the shelf lacks. "
                "Run `graftllm fuse` again."
            )
        return cls(load_model(base.path, device=device), load_tokenizer(base.path), packs, router)

    def using(self, name: str) -> Graft:
        """Plug the pack of that name (or nothing, for `base`) in for a `with` block.

        Raises:
            FusionError: there is no such pack.
            PackError: the pack does not fit the base model.
        """
        if name == BASE:
            return plug(self.model)
        if name not in self.packs:
            raise FusionError(f"pack: expected one of {', '.join([BASE, AUTO, *self.packs])}; found {name!r}.")
        graft = plug(self.model, self.packs[name], check=name not in self._checked)
        self._checked.add(name)
        return graft

    def route(self, conversations: Sequence[Conversation]) -> list[Route]:
        """Return which pack the router would let answer each conversation.

        Raises:
            FusionError: this grafted model has no router.
        """
        if self.router is None:
            raise FusionError(
                f"pack: {AUTO!r} needs a router, and this grafted model has none; "
                "name a pack, or fuse with --router-data."
            )
        return self.router.route(prompt_features(self.model, self.tokenizer, [_messages(c) for c in conversations]))

    def generate(
        self,
        conversations: Sequence[Conversation],
        pack: str | Sequence[str] | None = AUTO,
        options: SamplingOptions = GREEDY,
        *,
        seed: int = 0,
    ) -> list[str]:
        """Answer conversations, each with the pack it asks for.

        Args:
            conversations: strings (one user message each) or lists of messages.
            pack: a pack's name, `base` or None, `auto` (the router chooses), or one of these for each conversation.
            options: decoding; one answer each.
            seed: of the draws when the temperature is above 0.

        Raises:
            FusionError: a name is unknown, or `auto` is asked for without a router.
        """
        messages = [_messages(conversation) for conversation in conversations]
        names = [pack or BASE] * len(messages) if pack is None or isinstance(pack, str) else list(pack)
        undecided = [i for i, name in enumerate(names) if name == AUTO]
        if undecided:
            for i, route in zip(undecided, self.route([messages[i] for i in undecided]), strict=True):
                names[i] = route.name
        answers = [""] * len(messages)
        for name in dict.fromkeys(names):
            mine = [i for i, chosen in enumerate(names) if chosen == name]
            with self.using(name) as model:
                texts = generate(
                    cast(PreTrainedModel, model), self.tokenizer, [messages[i] for i in mine], options, seed=seed
                )
            for i, samples in zip(mine, texts, strict=True):
                answers[i] = samples[0]
        return answers

    def stream(self, conversation: Conversation, pack: str = AUTO, options: SamplingOptions = GREEDY) -> Iterator[str]:
        """Yield the answer to one conversation piece by piece.

        Raises:
            FusionError: the pack's name is unknown, or `auto` is asked for without a router.
        """
        name = self.route([conversation])[0].name if pack == AUTO else pack
        with self.using(name) as model:
            yield from stream(cast(PreTrainedModel, model), self.tokenizer, _messages(conversation), options)


def write_grafted(out: Path, base: str, packs: Mapping[str, Path], router: Router | None = None) -> None:
    """Write a grafted directory: packs linked or copied, the base referred to.

    Args:
        out: appears whole or not at all.
        base: checkpoint directory or Hub id.
        packs: pack files by the names they shall have.
        router: its classes are `base` and names of packs.

    Raises:
        FusionError: a name is reserved, or packs are of different bases.
        PackError: a pack is damaged or was made for another base.
    """
    checkpoint = Checkpoint.open(base)
    shelved: dict[str, ShelvedPack] = {}
    fingerprint = ""
    with whole_directory(out) as partial:
        (partial / "packs").mkdir()
        for name, path in packs.items():
            if name in (BASE, AUTO) or "/" in name or name.startswith("."):
                raise FusionError(f"pack {name!r}: expected a plain name other than base and auto; choose another.")
            pack = SkillPack.load(path)
            pack.check_base(checkpoint)
            if fingerprint not in ("", pack.header.base.fingerprint):
                raise FusionError(f"{path}: made for another base than the packs before it; fuse packs of one base.")
            fingerprint = pack.header.base.fingerprint
            file = f"packs/{name}.safetensors"
            _link_or_copy(path, partial / file)
            shelved[name] = ShelvedPack(file=file, sha256=_sha256(path))
        if router is not None:
            router.save(partial / "router.safetensors")
        manifest = Manifest(
            base=base if not Path(base).is_dir() else os.path.relpath(Path(base).resolve(), out.resolve()),
            fingerprint=fingerprint,
            packs=shelved,
            router="router.safetensors" if router is not None else None,
        )
        write_text(partial / MANIFEST, manifest.model_dump_json(indent=1))


def fuse_packs(
    out: Path, base: str, packs: Mapping[str, Path], *, router_data: Path | None = None, device: str = "auto"
) -> None:
    """Write a grafted directory, with a router trained on prompt rows if there are any.

    Args:
        out: appears whole or not at all.
        base: checkpoint directory or Hub id.
        packs: pack files by the names they shall have.
        router_data: JSONL prompt rows; those whose task is a pack's name are for that pack, all others for the base.
        device: `auto` takes a GPU when there is one.

    Raises:
        FusionError: a name is reserved, packs are of different bases, or a pack has no prompts.
        PackError: a pack is damaged or was made for another base.
    """
    router = None
    if router_data is not None:
        prompts: dict[str, list[Prompt]] = {}
        for row in read_prompts(router_data):
            prompts.setdefault(row.task if row.task in packs else BASE, []).append(row)
        if missing := [name for name in packs if name not in prompts]:
            raise FusionError(
                f"{router_data}: no row has the task {missing[0]!r}; the router needs prompts of every pack."
            )
        router = fit_router(Checkpoint.open(base).path, prompts, device=device)
    write_grafted(out, base, packs, router)


def read_manifest(directory: Path) -> Manifest:
    """Read what a grafted directory consists of.

    Raises:
        FusionError: there is no such directory, or its manifest is not one.
    """
    try:
        return Manifest.model_validate_json((directory / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise FusionError(
            f"{directory}: expected a grafted model, found no {MANIFEST} in it; make one with `graftllm fuse`."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise FusionError(
            f"{directory / MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}. Run `graftllm fuse` again."
        ) from error


def _open_pack(directory: Path, name: str, shelved: ShelvedPack) -> SkillPack:
    path = directory / shelved.file
    if not path.is_file():
        raise FusionError(
            f"{directory}: the manifest names {shelved.file}, which is not there. Run `graftllm fuse` again."
        )
    if (found := _sha256(path)) != shelved.sha256:
        raise FusionError(
            f"{path}: expected SHA-256 {shelved.sha256[:12]}..., found {found[:12]}...; "
            "the file was changed. Run `graftllm fuse` again."
        )
    return SkillPack.load(path)


def _base_location(directory: Path, base: str) -> str | Path:
    beside = Path(os.path.normpath(directory.resolve() / base))
    return beside if beside.is_dir() or base.startswith(".") else base


def _messages(conversation: Conversation) -> Sequence[Message]:
    return [Message(role="user", content=conversation)] if isinstance(conversation, str) else conversation


def _link_or_copy(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
