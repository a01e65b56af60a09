"""The file of a SkillPack: where header and payloads are in it, and reading the header without trusting it.

The format is described in docs/skillpack-format.md. Files come from strangers, so whatever does not
fit is a PackError, found before anything is decoded.
"""

import base64
import hashlib
import re
import zlib
from itertools import accumulate, chain
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open

from graftllm.delta import convertible, growable, is_setting
from graftllm.errors import PackError, StorageError
from graftllm.header import VERSION, Header, TensorEntry
from graftllm.storage import check_file
from graftllm.tensors import DTYPES, TensorSpec, safetensors_opening

MAX_HEADER_BYTES = 64 << 20
_CONTAINERS = 16  # bytes of JSON for each object or list, and
_MARKS = 5  # for each comma or colon, at least; headers of the shortest names have a third more
_NAMES, _OUTSIDE = 64, 4096  # strings, and bytes outside of them, before the payloads; a pack has fewer than 20 and 200
_LONGEST = 4096  # members of an object or list, but for `tensors`
Run = Literal["payloads", "exact_layers", "companions"]  # the tensors of the file
_STRING = re.compile(rb'"(?:[^"\\]+|\\.)*+(?:"|\\?\Z)', re.DOTALL)


def check_place(path: Path) -> None:
    """Check that a pack may be written at a place: nothing is there, or a pack that it replaces.

    Raises:
        StorageError: something else is there, or the name is not one of a safetensors file.
    """
    check_file(path)
    try:
        if path.exists():
            if not path.is_file():
                raise PackError(f"{path}: no regular file.")
            read_header(path)
    except PackError as error:
        raise StorageError(
            f"{path}: expected nothing or a SkillPack there, found something else, which would be lost; choose another "
            "place, or take that away."
        ) from error
    if path.suffix != ".safetensors":
        raise StorageError(f"{path}: expected a name that ends in .safetensors, as a SkillPack's does.")


def read_header(path: Path) -> Header:
    """Read and check the header of a pack file.

    Raises:
        PackError: the file is missing, truncated, damaged, hostile or not a SkillPack.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            room = path.stat().st_size - 8
            simple = _is_simple(file.read(min(size, MAX_HEADER_BYTES)))
    except IsADirectoryError as error:
        raise PackError(f"{path}: expected a SkillPack, which is a file, found a directory; check the path.") from error
    except OSError as error:
        raise PackError(f"{path}: cannot be read ({error.strerror}); check the path.") from error
    if room < 0 or not 2 <= size <= min(room, MAX_HEADER_BYTES):
        raise PackError(
            f"{path}: expected a header of at most {min(max(room, 0), MAX_HEADER_BYTES):,} bytes, "
            f"found a length of {size:,}. The file is truncated or not a SkillPack."
        )
    if not simple:
        raise PackError(f"{path}: a safetensors file, but not a SkillPack (it lists more than a pack's three tensors).")
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
    if _is_crowded(text):
        raise PackError(
            f"{path}: the header's {len(text):,} bytes hold more lists and values than headers do. "
            "The file is damaged, or made to fill memory."
        )
    where = ""
    try:
        content = from_json(text, allow_inf_nan=False)
        version, tensors = content.get("version"), content.get("tensors")
        if type(version) is not int or version != VERSION:
            raise PackError(
                f"{path}: format version {version!r}; this graftllm reads {VERSION}. "
                "Upgrade graftllm or rebuild the pack."
            )
        if not isinstance(tensors, dict):
            raise ValueError("expected an object under 'tensors'")
        content["tensors"] = entries = {}
        if _is_immense(content) or any(map(_is_immense, tensors.values())):
            raise ValueError(f"expected whole numbers of 64 bits and lists of at most {_LONGEST} members, found others")
        for where, entry in tensors.items():  # one by one: an error apiece would fill the memory
            entries[where] = TensorEntry.model_validate(entry)
        where = ""
        header = Header.model_validate(content)
    except (ValueError, AttributeError) as error:
        problem: object = error
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = ("tensors", where, *first["loc"]) if where else first["loc"]
            problem = f"{place}: {first['msg']}"
        raise PackError(
            f"{path}: the header is not one of format version {VERSION} ({problem}). It was made by another graftllm, "
            "or is damaged: download it or pack the model again."
        ) from None
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
    rows = {entry.tuned_shape[0] for entry in header.tensors.values() if entry.tuned_shape}
    for key, value in header.config.items():
        if not is_setting(key) or (key.endswith("vocab_size") and value not in rows):
            raise PackError(f"{path}: claims to change the config's {key!r} to {value!r}, which its tensors do not.")
    return header


def _is_simple(opening: bytes) -> bool:
    """Return whether what a safetensors file begins with is text and few names, as a pack's, not a crowd of values."""
    strings = outside = place = 0
    for found in _STRING.finditer(opening):
        strings, outside, place = strings + 1, outside + found.start() - place, found.end()
        if strings > _NAMES or outside > _OUTSIDE:
            return False
    return outside + len(opening) - place <= _OUTSIDE


def _is_crowded(text: bytes) -> bool:
    """Return whether a JSON text would take many times its size in memory: values of a few bytes each."""
    containers, marks, place = 1024 + len(text) // _CONTAINERS, 4096 + len(text) // _MARKS, 0
    for start, end in chain((found.span() for found in _STRING.finditer(text)), [(len(text), len(text))]):
        containers -= text.count(b"{", place, start) + text.count(b"[", place, start)
        marks -= max(1, text.count(b",", place, start) + text.count(b":", place, start))  # one before each string
        if containers < 0 or marks < 0:
            return True
        place = end
    return False


def _is_immense(part: object) -> bool:
    """Return whether a JSON value, or one in it, has more members, or more digits, than any in a header."""
    if not isinstance(part, dict | list):
        return isinstance(part, int) and not -1 << 63 <= part < 1 << 63
    return len(part) > _LONGEST or any(map(_is_immense, part.values() if isinstance(part, dict) else part))


def places(header: Header) -> dict[Run, dict[str, slice]]:
    """Return where the file has each parameter's payload, exact layer or companion, in the run of bytes of all of them.

    What repeats another parameter has none.
    """
    own = {name: entry for name, entry in header.tensors.items() if entry.same_as is None}
    sizes: dict[Run, dict[str, int]] = {
        "payloads": {name: entry.nbytes for name, entry in own.items()},
        "exact_layers": {name: entry.refinement.nbytes for name, entry in own.items() if entry.refinement},
        "companions": {name: one.nbytes for name, one in header.companions.items() if one is not None},
    }
    ends = {run: accumulate(parts.values()) for run, parts in sizes.items()}
    return {
        run: {name: slice(end - parts[name], end) for name, end in zip(parts, ends[run], strict=True)}
        for run, parts in sizes.items()
    }


def layout(header: Header) -> dict[str, TensorSpec]:
    """Return the file's tensors: all payloads, all exact layers, all companions; what would be empty is not there."""
    lengths = {run: max((part.stop for part in parts.values()), default=0) for run, parts in places(header).items()}
    return {run: TensorSpec("U8", (length,)) for run, length in lengths.items() if length}


def opening(header: Header) -> bytes:
    """Return what the file begins with, before the payloads."""
    return safetensors_opening(layout(header), metadata(header))


def file_bytes(header: Header) -> int:
    """Return how many bytes the file with this header has."""
    stored = sum(entry.stored_bytes for entry in header.tensors.values())
    return len(opening(header)) + stored + header.companion_bytes


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
