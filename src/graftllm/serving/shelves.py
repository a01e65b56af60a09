"""The packs of a served directory: which there are, what their cards say, and changes while it is served."""

import os
from pathlib import Path
from threading import Lock
from typing import Any

from graftllm.evaluation.anatomy import figures
from graftllm.fusion.directory import add_packs, remove_pack
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.manifest import AUTO, read_manifest
from graftllm.fusion.names import unknown_pack
from graftllm.fusion.routing import BASE
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
        self._manifest = read_manifest(directory)
        self.grafted = _knowing(GraftedModel.load(directory, device=device))
        self.engine: Engine | None = None

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each pack's file, by name."""
        return {name: pack.sha256 for name, pack in self._manifest.packs.items()}

    def models(self) -> dict[str, dict[str, Any]]:
        """Return what can be asked for by name: the base, each pack and, with a router or rules, `auto`."""
        routed = set() if self.grafted.router is None else set(self.grafted.router.classes)
        found: dict[str, dict[str, Any]] = {BASE: {"description": "the model without a pack"}}
        for name, pack in self.grafted.packs.items():
            beside = self.grafted.merged_only(name) is None
            found[name] = {
                "description": pack.header.card.description,
                "bytes": (self._directory / self._manifest.packs[name].file).stat().st_size,
                "runs": "beside" if beside else "merged",
                "routed": name in routed,
            }
        if self.grafted.router is not None or self.grafted.rules:
            found[AUTO] = {"description": "the router chooses"}
        return found

    def card(self, name: str) -> dict[str, Any]:
        """Return what a pack is made of, as `graftllm inspect --json` prints it, but without single tensors.

        Raises:
            Refused: there is no such pack.
        """
        pack = self.grafted.packs.get(name)
        if pack is None:
            raise Refused(str(unknown_pack(name, self.grafted.packs)), status=404, code="model_not_found")
        size = os.stat(self._directory / self._manifest.packs[name].file).st_size
        return {key: value for key, value in figures(pack.header, size).items() if key != "tensors"}

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
            if name not in self._manifest.packs:
                raise Refused(str(unknown_pack(name, self.grafted.packs)), status=404, code="model_not_found")
            assert self.engine is not None
            self.engine.retire(name)
            try:
                remove_pack(self._directory, name)
            finally:
                self._reload()

    def _reload(self) -> None:
        """Serve what the directory holds now, with the base that is in memory."""
        assert self.engine is not None
        manifest = read_manifest(self._directory)
        grafted = _knowing(GraftedModel.load(self._directory, model=self.grafted.model, check=False))
        self._manifest, self.grafted = manifest, grafted
        self.engine.adopt(grafted, self.digests)


def _knowing(grafted: GraftedModel) -> GraftedModel:
    """Let a router go on that has never heard of a pack: it does not choose that, but it knows the others.

    One that knows a pack by another file is still refused.
    """
    known = () if grafted.router is None else grafted.router.classes
    grafted.unrouted = [name for name in grafted.unrouted if name in known]
    return grafted
