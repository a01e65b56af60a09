"""Companions of a model's weights: the small files that decide how it is spoken to and when its answer ends.

A fine-tune often has a tokenizer, chat template or generation config of its own. Those that are not the
base's come along in its pack, and stand in the place of the base's wherever the pack is put on.
"""

import hashlib
import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from graftllm.errors import CheckpointError

Companion = Literal[
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
]
Companions = Mapping[Companion, bytes | None]  # what each file holds; None where the base's has to go
GENERATION: Companion = "generation_config.json"
TOKENIZER = tuple(name for name in get_args(Companion) if name != GENERATION)
LARGEST = 64 << 20  # bytes of a companion
_WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of them makes a tokenizer
_OF_SAVING = ("transformers_version", "_from_model_config", "name_or_path", "_name_or_path")  # say nothing of a model
_MEMORY = 32 << 20  # bytes that decompression may take


def changed_companions(base: Path, tuned: Path) -> dict[Companion, bytes | None]:
    """Return the companions of a tuned model that are not the base's.

    Where it has a tokenizer, and some file of that differs, the base's others go; one without leaves them as they are.

    Args:
        base: directory of the base model.
        tuned: directory of the tuned model.

    Raises:
        CheckpointError: one cannot be read, or has more than 64 MiB.
    """
    found: dict[Companion, bytes | None] = {}
    for name in get_args(Companion):
        if (own := _read(tuned / name)) is not None and not _same(own, _read(base / name)):
            found[name] = own
    if found.keys() & set(TOKENIZER) and any((tuned / name).exists() for name in _WORDS):
        found |= {name: None for name in TOKENIZER if (base / name).exists() and not (tuned / name).exists()}
    return {name: found[name] for name in get_args(Companion) if name in found}


def put_companions(companions: Companions, directory: Path) -> None:
    """Write companions over those of a directory, which has copies of the base's."""
    for name, content in companions.items():
        if content is None:
            (directory / name).unlink(missing_ok=True)
        else:
            (directory / name).write_bytes(content)


def agreed_companions(told: Sequence[Companions]) -> Companions:
    """Return the companions that several tuned models have alike; none where they differ in one."""
    return told[0] if told and all(one == told[0] for one in told) else {}


def companion_digest(content: bytes) -> str:
    """Return the first 16 hexadecimal digits of a companion's SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def compressed(content: bytes) -> bytes:
    """Return what a pack stores of a companion: an .xz stream."""
    return lzma.compress(content, lzma.FORMAT_XZ)


def decompressed(stored: bytes, size: int) -> bytes:
    """Return a companion of `size` bytes from what a pack stores of it.

    Raises:
        ValueError: it is no .xz stream of so many bytes, or one that takes much memory.
    """
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
    try:
        content = stream.decompress(stored, size + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(str(error)) from error
    if len(content) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"expected an .xz stream of {size} bytes, found another")
    return content


def _read(file: Path) -> bytes | None:
    try:
        with open(file, "rb") as opened:
            content = opened.read(LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    if len(content) > LARGEST:
        raise CheckpointError(f"{file}: expected at most {LARGEST:,} bytes, found more; is it what its name says?")
    return content


def _same(own: bytes, base: bytes | None) -> bool:
    """Return whether two files say the same of a model; which library saved them is no matter."""
    if base is None or own == base:
        return own == base
    try:
        one, other = json.loads(own), json.loads(base)
    except (ValueError, RecursionError):
        return False
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return False
    return _said(one) == _said(other)


def _said(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key not in _OF_SAVING}
