"""A Hugging Face checkpoint read one tensor at a time, fingerprinted, and written as it streams by.

This room knows directories and shards, whose bytes are for `tensors`. It knows nothing of deltas, packs or live models.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftllm.companions import Companions, put_companions
from graftllm.downloads import download_all, repository
from graftllm.errors import CheckpointError, HubError, StorageError
from graftllm.storage import CHECKPOINT_FILES, check_replaceable, whole_directory
from graftllm.tensors import (
    DTYPES,
    LARGE,
    MADE_HERE,
    TensorSpec,
    digest,
    fingerprint,
    is_made_here,
    natural_order,
    open_shard,
    raw_bytes,
    row_blocks,
    tensor_specs,
    write_safetensors,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FOREIGN = (".bin", ".pt", ".pth", ".gguf", ".h5")
WRITTEN = tuple(f"*{suffix}" for suffix in CHECKPOINT_FILES)
_USUAL = (  # names in a checkpoint; one that holds others, such as a user's notes, is not replaced
    "*.safetensors", INDEX, "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "chat_template.*", "*.model", "*.tiktoken", "*.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An ordinary model directory: `config.json` and one or more `.safetensors` shards.

    Opening reads headers only. Tensors come one at a time, memory-mapped, and are let go with the
    last reference to them.
    """

    path: Path
    name: str  # the Hub id, or the directory's own name
    specs: Mapping[str, TensorSpec] = field(repr=False)
    shards: Mapping[str, str] = field(repr=False)  # tensor name -> file name
    config: Mapping[str, Any] = field(repr=False)
    made_of: tuple[Path, ...] = field(default=(), repr=False)  # other files that these were made of for a while

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Open a directory, or a Hub id such as `org/name` or `org/name@revision` that is downloaded or cached.

        Raises:
            CheckpointError: nothing is there, a shard is absent or damaged, or the weights are not safetensors.
        """
        directory = _located(path)
        config = _read_json(directory / "config.json")
        index = directory / INDEX
        if (directory / SINGLE).exists():  # before an index, as transformers has it
            shards = dict.fromkeys(tensor_specs(directory / SINGLE), SINGLE)
        elif index.exists():
            named = _read_json(index).get("weight_map")
            if not isinstance(named, dict):
                raise CheckpointError(
                    f"{index}: expected a 'weight_map' from tensors to shards, found {type(named).__name__}. "
                    "The checkpoint is incomplete; download or copy it again."
                )
            shards = {str(name): str(file) for name, file in named.items()}
        else:
            found = sorted(file.name for file in directory.iterdir() if file.suffix in _FOREIGN)
            raise CheckpointError(
                f"{directory}: expected {SINGLE} or {INDEX}, found {', '.join(found) or 'neither'}. "
                "Only safetensors is read: load the model with transformers and save_pretrained() it."
            )
        specs: dict[str, TensorSpec] = {}
        for file in sorted(set(shards.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: expected shards named like model-00001-of-00002.safetensors, found {file!r}."
                )
            if not os.path.isfile(directory / file):  # also where the name is too long for one
                raise CheckpointError(
                    f"{directory}: {index.name} names the shard {file}, which is not there. "
                    "The checkpoint is incomplete; download or copy it again."
                )
            held = tensor_specs(directory / file)
            specs |= {name: spec for name, spec in held.items() if shards.get(name) == file}
        if absent := sorted(set(shards) - set(specs)):
            raise CheckpointError(
                f"{directory}: {index.name} says that {shards[absent[0]]} holds {absent[0]!r}, but it does not. "
                "The checkpoint is incomplete; download or copy it again."
            )
        if not specs:
            raise CheckpointError(f"{directory}: expected a model's tensors, found none in its safetensors files.")
        specs = {name: specs[name] for name in sorted(shards, key=natural_order)}
        known_as = str(path) if Path(path) != directory else directory.resolve().name
        return cls(directory, known_as, specs, {name: shards[name] for name in specs}, config)

    def names(self) -> list[str]:
        """Return the names of all tensors, `layers.2` before `layers.10`."""
        return list(self.specs)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype, backed by the file until it is changed."""
        with open_shard(self.path / self.shards[name]) as shard:
            return shard.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows (of dimension 0) of a tensor; no others are touched."""
        with open_shard(self.path / self.shards[name]) as shard:
            return shard.get_slice(name)[start:stop]

    def digest(self, name: str) -> str:
        """Return `digest` of one tensor; a large one is read block by block."""
        spec = self.specs[name]
        if spec.parameters <= LARGE or len(spec.shape) < 2:
            return digest(self.tensor(name))
        found = hashlib.sha256()
        for start, stop in row_blocks(spec.shape):
            found.update(raw_bytes(self.rows(name, start, stop)).data)
        return found.hexdigest()[:16]

    @property
    def sources(self) -> list[Path]:
        """The files by which it is told whether this is the same checkpoint as before."""
        return sorted(self.made_of or {*self.files, *self.companions})

    @property
    def files(self) -> list[Path]:
        """The files that weights and config are read from."""
        return [self.path / file for file in sorted({*self.shards.values(), "config.json"})]

    @property
    def companions(self) -> list[Path]:
        """The files beside the weights: config, generation config, tokenizer and chat template."""
        return [
            file
            for file in sorted(self.path.iterdir())
            if file.is_file()
            and file.suffix in CHECKPOINT_FILES
            and not file.name.endswith((".safetensors", ".index.json"))
        ]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the floating-point numbers have."""
        return _main_dtype(self.specs)

    @property
    def nbytes(self) -> int:
        """Size of the weight files in bytes."""
        return sum((self.path / file).stat().st_size for file in set(self.shards.values()))

    @property
    def parameters(self) -> int:
        """How many numbers the checkpoint stores; tied weights count once."""
        return sum(spec.parameters for spec in self.specs.values())

    @property
    def architecture(self) -> str:
        """The class that `config.json` names, or `unknown`."""
        named = self.config.get("architectures")
        return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "unknown"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the name, dtype, shape and digest of every tensor; reads the whole checkpoint."""
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            return fingerprint(zip(self.specs, self.specs.values(), threads.map(self.digest, self.specs), strict=True))


def check_opened(**given: object) -> None:
    """Check that what was given under these names are checkpoints, and not their places.

    Raises:
        CheckpointError: one is something else.
    """
    for name, one in given.items():
        if not isinstance(one, Checkpoint):
            raise CheckpointError(
                f"{name}: expected a checkpoint, as Checkpoint.open gives it, found {type(one).__name__}."
            )


def write_checkpoint(
    like: Checkpoint,
    out: Path,
    tensor: Callable[[str], Tensor],
    *,
    specs: Mapping[str, TensorSpec] | None = None,
    config: Mapping[str, Any] | None = None,
    companions: Companions | None = None,
) -> None:
    """Write a checkpoint with the config, tokenizer, shards and names of `like` and other values.

    Args:
        like: the checkpoint to imitate.
        out: the directory to write; it appears whole or not at all. One that was written here is replaced.
        tensor: gives the values of one parameter, in the shape and dtype that `specs` has for it.
        specs: shapes and dtypes to write; those of `like` by default.
        config: what `config.json` says otherwise, by dotted key.
        companions: what stands beside the weights and is not that of `like`.

    Raises:
        StorageError: as `check_vacant` has it, or there is no room.
    """
    specs = like.specs if specs is None else specs
    check_vacant(like, out)
    with whole_directory(out) as partial:
        copy_companions(like, partial)
        put_companions(companions or {}, partial)
        dtypes = [str(_main_dtype(found)).removeprefix("torch.") for found in (like.specs, specs)]
        if config or dtypes[0] != dtypes[1]:
            changed = _changed_config(like.config, config or {}, *dtypes)
            (partial / "config.json").write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
        if SINGLE not in like.shards.values():
            index = _read_json(like.path / INDEX)
            totals = {"total_size": sum(spec.nbytes for spec in specs.values())}
            totals["total_parameters"] = sum(spec.parameters for spec in specs.values())
            told = index.get("metadata")
            index["metadata"] = (told if isinstance(told, dict) else {}) | totals
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for shard in sorted(set(like.shards.values())):
            layout = {name: specs[name] for name, file in like.shards.items() if file == shard}
            write_safetensors(partial / shard, layout, lambda name: raw_bytes(tensor(name)), metadata=MADE_HERE)


def check_vacant(like: Checkpoint, out: Path) -> None:
    """Check that a checkpoint like another may be written at a place: nothing is there, or one that was written here.

    Raises:
        StorageError: something else is there, such as a model that was trained, or the place is read.
    """
    usual = (*_USUAL, *(file.name for file in like.companions))
    check_replaceable(out, over=["config.json"], holds=usual, beside=[like.path])
    shards = sorted(out.glob("*.safetensors"))
    if (out / "config.json").exists() and not (shards and all(map(is_made_here, shards))):
        raise StorageError(
            f"{out}: expected nothing there, or a checkpoint that graftllm wrote, found another model, which would be "
            "lost; choose another place, or take that away."
        )


def _changed_config(
    config: Mapping[str, Any], changes: Mapping[str, Any], old_dtype: str, new_dtype: str, prefix: str = ""
) -> dict[str, Any]:
    """Return a config with other values by dotted key, and with the new dtype where it named the old one."""
    changed = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            value = _changed_config(value, changes, old_dtype, new_dtype, f"{prefix}{key}.")
        elif key in ("dtype", "torch_dtype") and value == old_dtype:
            value = new_dtype
        changed[key] = changes.get(f"{prefix}{key}", value)
    return changed


def copy_companions(checkpoint: Checkpoint, out: Path) -> None:
    """Copy what stands beside the weights."""
    for file in checkpoint.companions:
        shutil.copyfile(file, out / file.name)


def _main_dtype(specs: Mapping[str, TensorSpec]) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for spec in specs.values():
        if DTYPES[spec.dtype].is_floating_point:
            counts[DTYPES[spec.dtype]] = counts.get(DTYPES[spec.dtype], 0) + spec.parameters
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _located(path: str | Path) -> Path:
    directory = Path(path)
    if directory.is_dir():
        return directory
    if (source := repository(str(path))) is not None:
        try:
            return download_all(source, WRITTEN)
        except HubError as error:
            raise CheckpointError(
                f"{path}: there is no such directory, and the Hugging Face Hub did not give it "
                f"({type(error.__cause__).__name__}). Check the name, the network and HF_TOKEN, or pass a directory."
            ) from error
    found = "a file" if directory.is_file() else "nothing"
    raise CheckpointError(f"{path}: expected a checkpoint directory, found {found}. Check the path.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: expected a model directory, found no {path.name} in it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content
