"""Companions of a model's weights: the small files that decide how it is spoken to and when its answer ends.

A fine-tune often has a tokenizer, chat template or generation config of its own. Those that are not the
base's come along in its pack, and stand in the place of the base's wherever the pack is put on.
"""

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
_TEMPLATE: Companion = "chat_template.jinja"
TOKENIZER: tuple[Companion, ...] = tuple(name for name in get_args(Companion) if name != GENERATION)
DIFFERING = "Tokenizer, chat template and end tokens are the base's, as the tuned models differ in theirs."
LARGEST = 64 << 20  # bytes of all companions of a model
_WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of them makes a tokenizer
_OF_SAVING = (  # keys that say nothing of a model: who saved it, and what a trainer did last
    "transformers_version", "_from_model_config", "name_or_path", "_name_or_path", "is_local", "local_files_only",
    "padding", "truncation",
)  # fmt: skip
_MEMORY = 32 << 20  # bytes that decompression may take


def changed_companions(base: Path, tuned: Path, *, ends_changed: bool = False) -> dict[Companion, bytes | None]:
    """Return the companions of a tuned model that are not the base's.

    Where its tokenizer differs, it does without all files that it lacks, whichever of them this copy of the base has. A
    checkpoint without a tokenizer says nothing of it.

    Args:
        base: directory of the base model.
        tuned: directory of the tuned model.
        ends_changed: the tuned `config.json` names other end tokens, which a generation config would hide.

    Raises:
        CheckpointError: one cannot be read, or all together have more than 64 MiB.
    """
    names: tuple[Companion, ...] = get_args(Companion)
    own: dict[Companion, bytes | None] = {name: _read(tuned / name) for name in names}
    old: dict[Companion, bytes | None] = {name: _read(base / name) for name in names}
    found: dict[Companion, bytes | None] = {}
    differing: list[Companion] = [
        name for name in TOKENIZER if own[name] is not None and not _same(name, own[name], old[name])
    ]
    if not any(own[name] is not None for name in _WORDS):
        found = {name: own[name] for name in differing}
    elif differing or (own[_TEMPLATE] is None and old[_TEMPLATE] is not None):
        found = {name: own[name] for name in TOKENIZER if name in differing or own[name] is None}
    if not _same(GENERATION, own[GENERATION], old[GENERATION]) and (own[GENERATION] is not None or ends_changed):
        found[GENERATION] = own[GENERATION]
    if sum(len(one) for one in found.values() if one is not None) > LARGEST:
        largest = max(found, key=lambda name: len(found[name] or b""))
        raise CheckpointError(
            f"{tuned / largest}: expected at most {LARGEST:,} bytes of tokenizer and the like, found more; is it what "
            "its name says?"
        )
    return {name: found[name] for name in names if name in found}


def put_companions(companions: Companions, directory: Path) -> None:
    """Write companions over those of a directory, which has copies of the base's."""
    for name, content in companions.items():
        if content is None:
            (directory / name).unlink(missing_ok=True)
        else:
            (directory / name).write_bytes(content)


def agreed_companions(told: Sequence[Companions]) -> Companions | None:
    """Return the companions that several tuned models have alike; None where they differ in one: the base's stay."""
    if not told:
        return {}
    return told[0] if all(one == told[0] for one in told) else None


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


def _same(name: Companion, own: bytes | None, base: bytes | None) -> bool:
    """Return whether two files say the same of a model; which library saved them, and when, is no matter."""
    if own is None or base is None or own == base:
        return own == base
    if not name.endswith(".json"):
        return False
    try:
        one, other = json.loads(own), json.loads(base)
    except (ValueError, RecursionError):
        return False
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return False
    return _said(one) == _said(other)


def _said(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key not in _OF_SAVING}
