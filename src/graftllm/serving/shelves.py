"""The packs of a served directory: which there are, what their cards say, and changes while it is served.

Others may change the directory, too, such as `graftllm remove`: whoever asks next is told of what it holds then.
"""

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from graftllm.errors import FusionError, GraftError
from graftllm.evaluation.anatomy import figures
from graftllm.fusion.directory import add_packs, remove_pack
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.manifest import AUTO, MANIFEST, read_manifest
from graftllm.fusion.names import unknown_pack
from graftllm.fusion.routes import BASE, Route
from graftllm.fusion.voices import Voices
from graftllm.packfile import file_bytes
from graftllm.records import Message
from graftllm.serving.engine import Engine
from graftllm.serving.orders import Refused
from graftllm.skillpack import SkillPack

_log = logging.getLogger(__name__)


class Library:
    """A grafted directory that is served, by an engine in this process or another one.

    Methods may be called by any thread; changes take turns.
    """

    def __init__(self, directory: Path, *, device: str = "auto") -> None:
        """Load the base, the router and the headers of the packs.

        Raises:
            FusionError: the directory is no grafted model, or a file of it was changed.
            CheckpointError: the base is missing or cannot be loaded.
            PackError: a pack is damaged or was made for another base.
        """
        self._directory, self._lock, self._seen = directory, Lock(), _state(directory)
        self._held = _hold(directory, device=device)
        self.engine: Engine | None = None  # the one in this process, which follows changes

    @property
    def grafted(self) -> GraftedModel:
        """The model, as the directory was when it was last read."""
        return self._held.grafted

    @property
    def packs(self) -> Mapping[str, SkillPack]:
        """The packs that there are now."""
        return self._now().grafted.packs

    def route(self, messages: Sequence[Message]) -> Route:
        """Return which pack a conversation goes to; of a directory that no engine in this process serves.

        Raises:
            FusionError: no rule fits, and there is no router.
        """
        held = self._now()
        with self._lock:  # what is read again has the same live model
            return held.grafted.route([messages])[0]

    @property
    def digests(self) -> Mapping[str, str]:
        """The SHA-256 of each pack's file, by name."""
        return self._held.grafted.digests

    @property
    def voices(self) -> Voices:
        """The voices of the packs that there are now."""
        return self._now().grafted.voices

    def models(self) -> dict[str, dict[str, Any]]:
        """Return what can be asked for by name: the base, each pack and, with a router or rules, `auto`."""
        held = self._now()
        routed = set() if held.grafted.router is None else set(held.grafted.router.classes)
        found: dict[str, dict[str, Any]] = {BASE: {"description": "the model without a pack"}}
        for name, pack in held.grafted.packs.items():
            found[name] = {
                "description": pack.header.card.description,
                "bytes": held.sizes[name],
                "runs": "beside" if name in held.beside else "merged",
                "routed": name in routed,
                "own_files": pack.header.own_files,
            }
        if held.grafted.chooses:
            found[AUTO] = {"description": "the router chooses"}
        return found

    def card(self, name: str) -> dict[str, Any]:
        """Return what a pack is made of, as `graftllm inspect --json` prints it, but without single tensors.

        Raises:
            Refused: there is no such pack.
        """
        held = self._now()
        if name not in held.sizes:
            raise Refused(str(unknown_pack(name, held.sizes)), status=404, code="model_not_found")
        found = figures(held.grafted.packs[name].header, held.sizes[name])
        return {key: value for key, value in found.items() if key != "tensors"}

    def add(self, name: str, file: Path) -> None:
        """Put a pack on the shelf and serve it.

        Raises:
            FusionError: the name is taken or reserved.
            PackError: the pack is damaged or was made for another base.
            StorageError: the directory cannot be written.
        """
        with self._lock:
            add_packs(self._directory, {name: file})
            self._reload()

    def remove(self, name: str) -> None:
        """Take a pack off the shelf when all that was asked of it is answered; new orders for it are refused.

        Raises:
            FusionError: there is no such pack, or a rule names it.
            StorageError: the directory cannot be written.
            Refused: the server stops.
        """
        self._now()
        with self._lock:
            if name not in self.digests:
                raise Refused(str(unknown_pack(name, self.digests)), status=404, code="model_not_found")
            assert self.engine is not None
            self.engine.retire(name)
            try:
                remove_pack(self._directory, name)
            finally:
                self._reload()

    def _now(self) -> "_Held":
        """Return what the directory holds; if others changed it, it is read again and served, or stays as it was."""
        if _state(self._directory) != self._seen:
            with self._lock:
                if _state(self._directory) != self._seen:
                    try:
                        self._reload()
                    except Refused:
                        raise  # the server stops
                    except GraftError as error:
                        _log.error("%s was changed, but is served as it was: %s", self._directory, error)
        return self._held

    def _reload(self) -> None:
        """Serve what the directory holds now, with the base that is in memory."""
        engine, before = self.engine, self._held

        def when(look: Callable[[], Any]) -> Any:
            return look() if engine is None else engine.between_steps(look).result()

        self._seen = _state(self._directory)
        held = _hold(self._directory, when, model=before.grafted.model, check=False)
        if held.fingerprint != before.fingerprint:
            raise FusionError(
                f"{self._directory}: expected the base that is served ({before.fingerprint[:12]}), found packs for "
                f"another ({held.fingerprint[:12]}); start the server again."
            )
        held.grafted.voices = before.grafted.voices.of_others(held.grafted.packs)
        self._held = held
        if engine is not None:
            engine.adopt(self.grafted, self.digests)


@dataclass(frozen=True)
class _Held:
    """What a directory held when it was read; what can be told without asking the model again.

    Attributes:
        fingerprint: of the base that the packs are made for.
        grafted: the model.
        sizes: the bytes of each pack's file, by name.
        beside: packs that can run beside the weights.
    """

    fingerprint: str
    grafted: GraftedModel
    sizes: Mapping[str, int]
    beside: Collection[str]


def _hold(directory: Path, when: Callable[[Callable[[], Any]], Any] = lambda look: look(), **options: Any) -> _Held:
    """Read a directory.

    A router that has never heard of a pack goes on: it does not choose that, but it knows the others. One that knows a
    pack by another file is still refused.

    Args:
        directory: a grafted model.
        when: looks at the live model while nobody runs it.
        options: of `GraftedModel.load`, whose errors are raised, too.
    """
    fingerprint = read_manifest(directory).fingerprint
    grafted = GraftedModel.load(directory, memory_bytes=0, **options)  # the engine keeps decoded packs itself
    known = () if grafted.router is None else grafted.router.classes
    grafted.unrouted = [name for name in grafted.unrouted if name in known]
    return _Held(
        fingerprint,
        grafted,
        {name: file_bytes(pack.header) for name, pack in grafted.packs.items()},
        when(lambda: frozenset(name for name in grafted.packs if grafted.merged_only(name) is None)),
    )


def _state(directory: Path) -> tuple[int, ...]:
    """Return what is another whenever a directory's manifest was replaced; nothing where there is none."""
    try:
        found = os.stat(directory / MANIFEST)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
