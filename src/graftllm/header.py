"""What a SkillPack says of itself: the header's fields, and reading it from a file without trusting it.

The format is described in docs/skillpack-format.md. Files come from strangers, so whatever does not
fit is a PackError, found before anything is decoded.
"""

import base64
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from safetensors import SafetensorError, safe_open

from graftllm.checkpoint import DTYPES, TensorSpec, safetensors_header
from graftllm.compression.encoded import Operator, Refinement
from graftllm.compression.roles import Role
from graftllm.delta import convertible, growable, is_setting
from graftllm.errors import PackError
from graftllm.recipe import PackOptions
from graftllm.training_options import DpoOptions, SftOptions

VERSION = 1
MAX_HEADER_BYTES = 64 << 20


class Part(BaseModel):
    """A part of the header: immutable, and closed to fields that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseInfo(Part):
    """The model that a pack is a delta to."""

    name: str
    architecture: str
    fingerprint: str
    parameters: int


class Provenance(Part):
    """Where a skill came from: who was asked, how much was learnt from, and how."""

    sources: tuple[str, ...] = ()
    sft_rows: int = 0
    preference_pairs: int = 0
    sft: SftOptions | None = None
    dpo: DpoOptions | None = None


class Card(Part):
    """What a person wants to know of a pack before using it."""

    name: str = ""
    description: str = ""
    license: str = ""
    provenance: Provenance = Provenance()
    scores: dict[str, float] = {}


class TensorEntry(Part):
    """One parameter: what it is in the base, and how its delta is stored.

    `tuned_shape` and `tuned_dtype` are there where the tuned model's are not the base's; `unseen` where
    it is an expert's matrix that no calibration token reached, so that it was coded without calibration;
    `refinement` where an exact layer lies on top, the error is that of the lossy layer then.
    """

    role: Role
    dtype: str
    shape: tuple[int, ...]
    base_digest: str
    how: Operator
    nbytes: int = Field(ge=0)
    payload_digest: str
    error: float
    tuned_shape: tuple[int, ...] | None = None
    tuned_dtype: str | None = None
    unseen: bool = False
    refinement: Refinement | None = None

    @property
    def stored_bytes(self) -> int:
        """Size of its payloads, both layers."""
        return self.nbytes + (self.refinement.nbytes if self.refinement else 0)

    @property
    def operator(self) -> str:
        """The name of the operator that restores it: `exact` where an exact layer lies on top."""
        return "exact" if self.refinement else self.how.operator

    @property
    def bit_for_bit(self) -> bool:
        """Whether restoring gives the tuned bits."""
        return self.operator == "exact" or (self.operator == "unchanged" and self.error == 0)

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape as the base checkpoint states them."""
        return TensorSpec(self.dtype, self.shape)

    @property
    def tuned_spec(self) -> TensorSpec:
        """Dtype and shape that restoring gives: the tuned checkpoint's."""
        return TensorSpec(self.tuned_dtype or self.dtype, self.shape if self.tuned_shape is None else self.tuned_shape)

    @model_serializer(mode="wrap")
    def _only_what_differs(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        usual = {"tuned_shape": None, "tuned_dtype": None, "unseen": False, "refinement": None}
        return {key: value for key, value in write(self).items() if key not in usual or value != usual[key]}


Setting = int | tuple[int, ...] | None


class Header(Part):
    """Everything but the payloads. See docs/skillpack-format.md."""

    format: Literal["graftllm/skillpack"] = "graftllm/skillpack"
    version: Literal[1] = VERSION
    card: Card
    base: BaseInfo
    tuned_bytes: int
    options: PackOptions
    calibration_tokens: int
    config: dict[str, Setting] = {}  # what the tuned config.json says otherwise, by dotted key
    tokenizer_changed: bool = False
    tensors: dict[str, TensorEntry]

    def lossy_layer(self) -> "Header":
        """Return the header of the same pack without its exact layer."""
        tensors = {name: entry.model_copy(update={"refinement": None}) for name, entry in self.tensors.items()}
        return self.model_copy(update={"tensors": tensors})


def read_header(path: Path) -> Header:
    """Read and check the header of a pack file.

    Raises:
        PackError: the file is missing, truncated, damaged, hostile or not a SkillPack.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            room = path.stat().st_size - 8
    except OSError as error:
        raise PackError(f"{path}: cannot be read ({error.strerror}); check the path.") from error
    if room < 0 or not 2 <= size <= min(room, MAX_HEADER_BYTES):
        raise PackError(
            f"{path}: expected a header of at most {min(max(room, 0), MAX_HEADER_BYTES):,} bytes, "
            f"found a length of {size:,}. The file is truncated or not a SkillPack."
        )
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            parts = {name: file.get_slice(name) for name in file.keys()}
            found = {name: TensorSpec(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise PackError(
            f"{path}: not a whole safetensors file ({error}). It is truncated or damaged; copy it again."
        ) from error
    if "skillpack" not in about:
        raise PackError(f"{path}: a safetensors file, but not a SkillPack (it has no 'skillpack' metadata).")
    text = _decompressed(about["skillpack"])
    if text is None or hashlib.sha256(text).hexdigest() != about.get("skillpack_sha256"):
        raise PackError(
            f"{path}: the header does not match its digest. The file is damaged; copy or download it again."
        )
    header = _parse_header(path, text)
    if found != layout(header):
        odd = min(name for name, _ in set(found.items()) ^ set(layout(header).items()))
        raise PackError(
            f"{path}: the header and the stored payloads disagree on {odd!r}. The file is damaged; copy it again."
        )
    return header


def _parse_header(path: Path, text: bytes) -> Header:
    try:
        version = json.loads(text).get("version")
        if version != VERSION:
            raise PackError(
                f"{path}: format version {version!r}; this graftllm reads {VERSION}. "
                "Upgrade graftllm or rebuild the pack."
            )
        header = Header.model_validate_json(text)
    except (ValueError, AttributeError, RecursionError) as error:
        problem = (
            f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}" if isinstance(error, ValidationError) else error
        )
        raise PackError(f"{path}: the header is not one of format version {VERSION} ({problem}).") from error
    for name, entry in header.tensors.items():
        if entry.dtype not in DTYPES or any(side < 0 for side in entry.shape) or entry.spec.nbytes >= 1 << 48:
            raise PackError(
                f"{path}: tensor {name!r} claims dtype {entry.dtype} and shape {list(entry.shape)}, which cannot be."
            )
        tuned = entry.tuned_spec
        grown = tuned.shape != entry.shape
        if not convertible(entry.dtype, tuned.dtype) or (grown and not growable(entry.shape, tuned.shape)):
            raise PackError(
                f"{path}: tensor {name!r} claims to become {tuned.dtype} of shape {list(tuned.shape)} from "
                f"{entry.dtype} of shape {list(entry.shape)}, which cannot be."
            )
        if refinement_key(name) in header.tensors:
            raise PackError(f"{path}: {refinement_key(name)!r} is the name of a tensor and of an exact layer.")
    rows = {entry.tuned_shape[0] for entry in header.tensors.values() if entry.tuned_shape}
    for key, value in header.config.items():
        if not is_setting(key) or (key.endswith("vocab_size") and value not in rows):
            raise PackError(f"{path}: claims to change the config's {key!r} to {value!r}, which its tensors do not.")
    return header


def layout(header: Header) -> dict[str, TensorSpec]:
    """Return the file's tensors: one run of bytes for each parameter that has a payload, then those of exact layers."""
    sizes = {name: entry.nbytes for name, entry in header.tensors.items()}
    sizes |= {
        refinement_key(name): entry.refinement.nbytes for name, entry in header.tensors.items() if entry.refinement
    }
    return {name: TensorSpec("U8", (nbytes,)) for name, nbytes in sizes.items() if nbytes}


def refinement_key(name: str) -> str:
    """Return the name under which a parameter's exact layer is stored."""
    return f"{name}:exact"


def file_bytes(header: Header) -> int:
    """Return how many bytes the file with this header has."""
    stored = layout(header)
    return 8 + len(safetensors_header(stored, metadata(header))) + sum(spec.nbytes for spec in stored.values())


def metadata(header: Header) -> dict[str, str]:
    """Return the header as the file's `__metadata__`: its JSON, compressed, and the SHA-256 of the JSON."""
    text = header.model_dump_json().encode()
    packed = base64.b85encode(zlib.compress(text, 9)).decode()
    return {"skillpack": packed, "skillpack_sha256": hashlib.sha256(text).hexdigest()}


def _decompressed(packed: str) -> bytes | None:
    """Return the header's JSON, at most `MAX_HEADER_BYTES` of it; None where it is not such a text."""
    try:
        stream = zlib.decompressobj()
        text = stream.decompress(base64.b85decode(packed), MAX_HEADER_BYTES)
    except (ValueError, zlib.error):
        return None
    return text if stream.eof and not stream.unused_data else None
