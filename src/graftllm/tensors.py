"""One safetensors file: what it holds, read one tensor at a time, its digests, and how it is written.

This room knows bytes, shapes and dtypes (https://github.com/huggingface/safetensors); nothing is unpickled.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftllm.errors import CheckpointError
from graftllm.storage import whole_file

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LARGE = 1 << 26  # numbers in a tensor from which on it is read in blocks of rows
MADE_HERE = {"format": "pt", "made_by": "graftllm"}  # metadata of the files that are written here, but packs
_BLOCK = 1 << 24


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype (in safetensors' words, such as `BF16`) of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor takes."""
        return self.parameters * DTYPES[self.dtype].itemsize


def open_shard(path: Path) -> AbstractContextManager[Any]:
    """Open a safetensors file for reading; one that is no whole file is a CheckpointError."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy or download it again.") from error


def is_made_here(path: Path) -> bool:
    """Return whether a file is a safetensors file that graftllm wrote, by `MADE_HERE`; it can be written again."""
    try:
        with open_shard(path) as shard:
            return shard.metadata() == MADE_HERE
    except CheckpointError:
        return False


def tensor_specs(path: Path) -> dict[str, TensorSpec]:
    """Return shapes and dtypes of a safetensors file's tensors; dtypes that are not known are a CheckpointError."""
    with open_shard(path) as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}
        specs = {name: TensorSpec(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    for name, spec in specs.items():
        if spec.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {spec.dtype}; expected one of {', '.join(DTYPES)}. "
                "Convert it first."
            )
    return specs


def fingerprint(tensors: Iterable[tuple[str, TensorSpec, str]]) -> str:
    """Return the SHA-256 of one line per tensor in natural order of names: `name dtype d0,d1 digest`."""
    lines = {name: f"{name} {spec.dtype} {','.join(map(str, spec.shape))} {found}\n" for name, spec, found in tensors}
    return hashlib.sha256("".join(lines[name] for name in sorted(lines, key=natural_order)).encode()).hexdigest()


def is_finite(value: Tensor) -> bool:
    """Return whether a tensor holds no NaN and no infinity; it is looked at part by part, in little memory."""
    parts = value.reshape(-1).split(_BLOCK)
    whole = (part.float() if part.element_size() == 1 else part for part in parts)  # FP8 knows no isfinite
    return all(bool(part.sum().isfinite()) or bool(part.isfinite().all()) for part in whole)  # large sums overflow


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors on one device are the same, bit for bit: -0 is not 0, and NaN is itself."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.dtype.is_floating_point:
        words = _WORDS[one.dtype.itemsize]
        one, other = one.view(words), other.view(words)
    return one.equal(other)


def digest(tensor: Tensor) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a tensor's little-endian bytes."""
    return hashlib.sha256(raw_bytes(tensor).data).hexdigest()[:16]


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """Return a tensor's values as a flat array of bytes, without a copy where it is contiguous on CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def row_blocks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return where blocks of rows (of dimension 0) start and stop, each of about 2 ** 24 numbers."""
    height = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    return [(start, min(start + height, shape[0])) for start in range(0, shape[0], height)]


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,99})", name)]


def write_safetensors(
    path: Path,
    layout: Mapping[str, TensorSpec],
    data: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file tensor by tensor; the same input gives the same bytes.

    Args:
        path: appears whole or not at all.
        layout: what the file holds, in this order.
        data: gives the bytes of a tensor when its turn comes (flat uint8).
        metadata: the file's `__metadata__`, in this order.
    """
    with whole_file(path) as file:
        file.write(safetensors_opening(layout, metadata))
        for name, spec in layout.items():
            chunk = data(name)
            if chunk.nbytes != spec.nbytes:
                raise ValueError(f"{name}: expected {spec.nbytes} bytes, found {chunk.nbytes}")
            file.write(chunk.data)


def safetensors_opening(layout: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return what a safetensors file begins with: the length of a JSON text, and the text, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in layout.items():
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
