"""The SkillPack: a header and every parameter's encoded delta, in one safetensors file.

Save, load, decode and check against a base; `packer` builds it. The format is described in
docs/skillpack-format.md; `header` reads what a file says of itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftllm.checkpoint import Checkpoint
from graftllm.companions import Companion, decompressed
from graftllm.compression.encoded import EncodedTensor, ExactLayer, payload_digest
from graftllm.delta import align
from graftllm.downloads import Repository, download, repository
from graftllm.errors import HubError, PackError, PackGoneError, first_line
from graftllm.header import Header
from graftllm.packfile import Run, check_place, opening, places, read_header
from graftllm.storage import whole_file
from graftllm.tensors import DTYPE_NAMES, TensorSpec, digest, is_finite

Layer = Literal["lossy", "exact"]
PACK_FILE = "skillpack.safetensors"  # the name of a pack in a repository on the Hub


@dataclass(frozen=True, repr=False)
class SkillPack:
    """A compressed delta to one base model. Payloads stay on disk until they are asked for.

    Attributes:
        header: what is stored, and how.
        source: the file, or a description of where else the payloads are; used in errors.
    """

    header: Header
    source: str
    _payload: Callable[[Run, str], np.ndarray]

    def __repr__(self) -> str:
        """Return the pack in one line."""
        header, stored = self.header, sum(entry.stored_bytes for entry in self.header.tensors.values())
        return (
            f"SkillPack({header.card.name!r}, {len(header.tensors)} tensors in {stored:,} bytes, strategy "
            f"{header.options.strategy}, base {header.base.name} {header.base.fingerprint[:12]}, from {self.source})"
        )

    @classmethod
    def load(cls, path: str | Path, layer: Layer | None = None, *, revision: str | None = None) -> "SkillPack":
        """Open a pack; reads its header only.

        Args:
            path: the file; or `user/repo` or `user/repo@revision` on the Hugging Face Hub, downloaded or cached.
            layer: `lossy` leaves exact layers out and never reads them; `exact` expects a pack that gives the tuned
                bits. By default what the file has.
            revision: branch, tag or commit of the repository; the newest of the main branch by default.

        Raises:
            PackError: the file is missing, truncated, damaged, hostile or not a SkillPack, or has no such layer; or no
                layer is called so.
            HubError: the repository cannot be had, or holds no pack.
        """
        if layer is not None and layer not in get_args(Layer):
            raise PackError(f"{path}: layer: expected one of {', '.join(get_args(Layer))}; found {layer!r}.")
        source = None if str(path).endswith(".safetensors") else repository(str(path), revision)
        path = Path(path) if source is None else _downloaded(source)
        header = read_header(path)
        odd = next((name for name, entry in header.tensors.items() if not entry.bit_for_bit), None)
        if layer == "exact" and odd is not None:
            raise PackError(
                f"{path}: expected a pack with an exact layer, but {odd!r} has none. "
                "Take the lossy layer, or pack with the strategy exact."
            )
        stored = places(header)
        header = header.lossy_layer() if layer == "lossy" else header

        def payload(run: Run, name: str) -> np.ndarray:
            try:
                with safe_open(path, framework="np") as file:
                    return file.get_slice(run)[stored[run][name]]
            except (OSError, SafetensorError) as error:
                kind = PackGoneError if isinstance(error, FileNotFoundError) else PackError
                raise kind(
                    f"{path}: {name!r} cannot be read any more ({first_line(error)}). "
                    "The file was removed or changed after it was opened; put it back and open it again."
                ) from error

        return cls(header, str(path), payload)

    def save(self, path: str | Path) -> None:
        """Write the pack; the file appears whole or not at all, and the same pack gives the same bytes.

        Raises:
            StorageError: there is no room, the place cannot be written, or something else than a pack is there.
        """
        check_place(Path(path))
        with whole_file(Path(path)) as file:
            file.write(opening(self.header))
            for run, parts in places(self.header).items():
                for name, place in parts.items():
                    chunk = self._stored(run, name, place.stop - place.start)
                    if chunk.nbytes != place.stop - place.start:
                        raise ValueError(f"{name}: expected {place.stop - place.start} bytes, found {chunk.nbytes}")
                    file.write(chunk.data)

    def __iter__(self) -> Iterator[str]:
        """Yield the names of all parameters of the base."""
        return iter(self.header.tensors)

    def encoded(self, name: str) -> EncodedTensor:
        """Return one parameter's encoded delta.

        Raises:
            PackError: the payload is not the one that the header describes.
        """
        entry = self.header.tensors[name]
        payload, on_top = self._checked("payloads", name, entry.nbytes, entry.payload_digest), entry.refinement
        if on_top is None:
            return EncodedTensor(entry.how, payload)
        refinement = self._checked("exact_layers", name, on_top.nbytes, on_top.payload_digest)
        return EncodedTensor(entry.how, payload, ExactLayer(on_top.weight, on_top.how, refinement))

    def companions(self) -> dict[Companion, bytes | None]:
        """Return what stands beside the tuned weights and is not the base's, by file name; None for what has to go.

        Raises:
            PackError: one is damaged.
        """
        return {name: self.companion(name) for name in self.header.companions}

    def companion(self, name: Companion) -> bytes | None:
        """Return one of the companions; None if the pack has none of that name, or it is one that has to go.

        Raises:
            PackError: it is damaged.
        """
        if (told := self.header.companions.get(name)) is None:
            return None
        try:
            content = decompressed(self._stored("companions", name, told.nbytes).tobytes(), told.size)
        except ValueError as error:
            raise PackError(f"{self.source}: {name} cannot be read ({error}). The file is damaged.") from error
        if payload_digest(content) != told.digest:
            raise PackError(
                f"{self.source}: {name} does not match its digest {told.digest}. "
                "The file is damaged; copy or download it again."
            )
        return content

    def check_companions(self) -> None:
        """Compare the companions with their digests, one at a time.

        Raises:
            PackError: one is damaged.
        """
        for name in self.header.companions:
            self.companion(name)

    def check_payloads(self) -> None:
        """Compare all that is stored with its digests; no delta is decoded.

        Raises:
            PackError: one is damaged.
        """
        for name in self:
            self.encoded(name)
        self.check_companions()

    def restore(self, name: str, base: Tensor) -> Tensor:
        """Return the tuned value of one parameter from the base's (on CPU), in the tuned shape and dtype.

        Raises:
            PackError: the payload is damaged, does not fit the base, or what is exact does not give the tuned bits.
        """
        value, expected = self._decoded(name, base, EncodedTensor.restore), self.header.tensors[name].tuned_digest
        if expected is not None and digest(value) != expected:
            raise PackError(
                f"{self.source}: {name!r} is stored exactly, but gives values of digest {digest(value)}, expected "
                f"{expected}. The file is damaged, or this machine calculates otherwise than others; "
                "copy it again, or take the lossy layer if it has one."
            )
        return value

    def delta(self, name: str, base: Tensor) -> Tensor:
        """Return the delta of one parameter in float32; `base` is its value in the base model, on CPU.

        It is the difference to the base value that `delta.align` brought to the tuned shape and dtype.

        Raises:
            PackError: as for `restore`.
        """
        entry = self.header.tensors[name]
        if entry.tuned_digest is not None:
            return self.restore(name, base).float() - align(base, entry.tuned_spec).float()
        return self._decoded(name, base, EncodedTensor.decode)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return float32 factors, (rows, rank) and (rank, columns), whose product is a matrix's delta.

        None for what is stored in another way, and for a delta of more rows than the base has.

        Raises:
            PackError: the payload is damaged.
        """
        entry = self.header.tensors[name]
        is_grown = entry.tuned_spec.shape != entry.shape
        if entry.operator not in ("factored", "lowrank") or len(entry.shape) != 2 or is_grown:
            return None
        try:
            found = self.encoded(name).factors((entry.shape[0], entry.shape[1]))
            if found is not None and not all(map(is_finite, found)):
                raise ValueError("expected finite values, found others")
            return found
        except ValueError as error:
            raise PackError(
                f"{self.source}: the payload of {name!r} cannot be decoded ({error}). The file is damaged."
            ) from error

    def check_base(self, base: Checkpoint) -> None:
        """Compare names, shapes and dtypes with a base model, without reading its weights.

        Raises:
            PackError: the pack was made for another model.
        """
        known = self.header.base
        for name in [*self.header.tensors, *base.specs]:
            entry, spec = self.header.tensors.get(name), base.specs.get(name)
            if entry is None or spec is None:
                raise PackError(
                    f"{self.source}: made for the base {known.name} ({known.fingerprint[:12]}), but {base.path} "
                    f"{'lacks' if spec is None else 'also has'} the tensor {name!r}. Use that base or rebuild the pack."
                )
            self._check_spec(name, spec)

    def check_tensor(self, name: str, value: Tensor) -> None:
        """Compare a base tensor's shape, dtype and bytes with those that the pack was made for.

        Raises:
            PackError: they differ.
        """
        self._check_spec(name, TensorSpec(DTYPE_NAMES[value.dtype], tuple(value.shape)))
        found = digest(value)
        if found != self.header.tensors[name].base_digest:
            known = self.header.base
            raise PackError(
                f"{self.source}: tensor {name!r} of this base has digest {found}, but the pack was made for "
                f"{self.header.tensors[name].base_digest} ({known.name}, {known.fingerprint[:12]}). "
                "Load that base or rebuild the pack."
            )

    @property
    def payload_bytes(self) -> int:
        """Size of all payloads in bytes; the file adds its headers to it."""
        return sum(entry.stored_bytes for entry in self.header.tensors.values())

    def bytes_by_role(self) -> dict[str, int]:
        """Return how many bytes each role's payloads take."""
        totals: dict[str, int] = {}
        for entry in self.header.tensors.values():
            totals[entry.role] = totals.get(entry.role, 0) + entry.stored_bytes
        return totals

    def _stored(self, run: Run, name: str, nbytes: int) -> np.ndarray:
        stored = name if run == "companions" else self.header.tensors[name].same_as or name
        return self._payload(run, stored) if nbytes else np.empty(0, np.uint8)

    def _checked(self, run: Run, name: str, nbytes: int, expected: str) -> np.ndarray:
        payload = self._stored(run, name, nbytes)
        if payload_digest(payload) != expected:
            what = "payload" if run == "payloads" else "exact layer"
            raise PackError(
                f"{self.source}: the {what} of {name!r} does not match its digest {expected}. "
                "The file is damaged; copy or download it again."
            )
        return payload

    def _check_spec(self, name: str, spec: TensorSpec) -> None:
        entry = self.header.tensors[name]
        if entry.spec != spec:
            known = self.header.base
            raise PackError(
                f"{self.source}: tensor {name!r} has shape {list(entry.shape)} and dtype {entry.dtype}, "
                f"but the base model has {list(spec.shape)} and {spec.dtype}. "
                f"This pack was made for {known.name} ({known.fingerprint[:12]}); load that base or rebuild the pack."
            )

    def _decoded(self, name: str, base: Tensor, decode: Callable[[EncodedTensor, Tensor], Tensor]) -> Tensor:
        self._check_spec(name, TensorSpec(DTYPE_NAMES[base.dtype], tuple(base.shape)))
        entry = self.header.tensors[name]
        try:
            value = decode(self.encoded(name), align(base, entry.tuned_spec))
            if entry.operator not in ("exact", "unchanged") and not is_finite(value):
                raise ValueError("expected finite values, found others")
        except ValueError as error:
            raise PackError(
                f"{self.source}: the payload of {name!r} cannot be decoded ({error}). The file is damaged."
            ) from error
        return value


def _downloaded(source: Repository) -> Path:
    try:
        return download(source, PACK_FILE)
    except HubError as error:
        raise HubError(f"{error} (There is no file of that name here.)") from error
