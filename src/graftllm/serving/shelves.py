"""The packs of a served directory: which there are, what their cards say, and changes while it is served."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from graftllm.evaluation.anatomy import figures
from graftllm.fusion.directory import add_packs, remove_pack
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.manifest import AUTO
from graftllm.fusion.names import unknown_pack
from graftllm.fusion.routes import BASE
from graftllm.packfile import file_bytes
from graftllm.serving.engine import Engine
from graftllm.serving.orders import Refused


class Library:
    """A grafted directory that an engine serves. Methods may be called by any thread; changes take turns."""

    def __init__(self, directory: Path, *, device: str = "auto") -> None:
        """Load the base, the router and the headers of the packs.

        Raises:
            FusionError: the directory is no grafted model, or a file of it was changed.
            CheckpointError: the base is missing or cannot be loaded.
            PackError: a pack is damaged or was made for another base.
        """
        self._directory, self._lock = directory, Lock()
        self._held = _hold(directory, device=device)
        self.engine: Engine | None = None

    @property
    def grafted(self) -> GraftedModel:
        """The model, as the directory was when it was last read."""
        return self._held.grafted

    @property
    def digests(self) -> Mapping[str, str]:
        """The SHA-256 of each pack's file, by name."""
        return self._held.grafted.digests

    def models(self) -> dict[str, dict[str, Any]]:
        """Return what can be asked for by name: the base, each pack and, with a router or rules, `auto`."""
        held = self._held
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
        held = self._held
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
        with self._lock:
            if name not in self.digests:
                raise Refused(str(unknown_pack(name, self.digests)), status=404, code="model_not_found")
            assert self.engine is not None
            self.engine.retire(name)
            try:
                remove_pack(self._directory, name)
            finally:
                self._reload()

    def _reload(self) -> None:
        """Serve what the directory holds now, with the base that is in memory."""
        assert self.engine is not None
        engine = self.engine
        self._held = _hold(
            self._directory,
            lambda look: engine.between_steps(look).result(),
            model=self.grafted.model,
            check=False,
        )
        self.engine.adopt(self.grafted, self.digests)


@dataclass(frozen=True)
class _Held:
    """What a directory held when it was read; what can be told without asking the model again.

    Attributes:
        grafted: the model.
        sizes: the bytes of each pack's file, by name.
        beside: packs that can run beside the weights.
    """

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
    grafted = GraftedModel.load(directory, memory_bytes=0, **options)  # the engine keeps decoded packs itself
    known = () if grafted.router is None else grafted.router.classes
    grafted.unrouted = [name for name in grafted.unrouted if name in known]
    return _Held(
        grafted,
        {name: file_bytes(pack.header) for name, pack in grafted.packs.items()},
        when(lambda: frozenset(name for name in grafted.packs if grafted.merged_only(name) is None)),
    )
