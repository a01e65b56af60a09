"""What calibration measured of a model, and that as a file, so that no process needs it all in memory."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from graftllm.checkpoint import DTYPE_NAMES, TensorSpec, raw_bytes, write_safetensors
from graftllm.compression.calibration import Calibration
from graftllm.compression.matrix import DOUBLE, matrix_shape
from graftllm.compression.metric import Metric
from graftllm.compression.sensitivity import Sensitivity, input_metric


@dataclass(frozen=True)
class Measures:
    """What was measured on calibration rows; without it every matrix's errors count alike."""

    calibration: Calibration | None = None
    sensitivity: Sensitivity | None = None

    def moments(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Return the second moments of the layer's input, where they are known and fit the parameter's shape."""
        found = self.calibration.moments.get(name) if self.calibration is not None else None
        if found is not None and found.shape[0] != matrix_shape(shape)[0 if self.transposed(name) else 1]:
            return None
        return found

    def metric(self, name: str, shape: tuple[int, ...]) -> Metric:
        """Return what errors in a parameter cost."""
        moments = self.moments(name, shape)
        found = input_metric(moments) if self.sensitivity is None else self.sensitivity.metric(name, moments)
        if found.right is None or len(found.right) > DOUBLE:
            return found
        return Metric(found.scale, None if found.rows is None else found.rows.double(), found.right.double())

    def transposed(self, name: str) -> bool:
        """Return whether a parameter's input side is dimension 0."""
        return self.calibration is not None and name in self.calibration.transposed


def save_measures(measures: Measures, path: Path) -> None:
    """Write measures as one safetensors file, a tensor in memory at a time."""
    known, sensitivity = measures.calibration, measures.sensitivity
    facts: dict[str, object] = {"sensitivity": sensitivity is not None}
    parts: dict[str, tuple[Mapping[str, Tensor], str]] = {}  # name in the file -> where the tensor is, and its name
    if known is not None:
        keys = {name: known.shared.get(name, name) for name in known.moments}
        first = {key: name for name, key in reversed(keys.items())}
        parts |= {f"moments/{key}": (known.moments, name) for key, name in first.items()}
        facts |= {"tokens": known.tokens, "keys": keys}
        facts |= {"transposed": sorted(known.transposed), "unseen": sorted(known.unseen)}
    if sensitivity is not None:
        facts["reached"] = dict(sensitivity.reached)
        for kind in _KINDS:
            found: Mapping[str, Tensor] = getattr(sensitivity, kind)
            parts |= {f"{kind}/{name}": (found, name) for name in found}

    def tensor(part: str) -> Tensor:
        found, name = parts[part]
        return found[name]

    layout: dict[str, TensorSpec] = {}
    for part in parts:
        value = tensor(part)
        layout[part] = TensorSpec(DTYPE_NAMES[value.dtype], tuple(value.shape))
    write_safetensors(path, layout, lambda part: raw_bytes(tensor(part)), metadata={"facts": json.dumps(facts)})


def load_measures(path: Path) -> Measures:
    """Return the measures that `save_measures` wrote; tensors are mapped when they are asked for."""
    with safe_open(path, framework="pt") as file:
        facts, stored = json.loads((file.metadata() or {})["facts"]), list(file.keys())

    def mapped(kind: str) -> "_Mapped":
        names = [name.removeprefix(f"{kind}/") for name in stored if name.startswith(f"{kind}/")]
        return _Mapped(path, kind, {name: name for name in names})

    calibration = None
    if "tokens" in facts:
        calibration = Calibration(
            _Mapped(path, "moments", facts["keys"]),
            facts["tokens"],
            frozenset(facts["transposed"]),
            frozenset(facts["unseen"]),
            facts["keys"],
        )
    sensitivity = Sensitivity(*map(mapped, _KINDS), reached=facts["reached"]) if facts["sensitivity"] else None
    return Measures(calibration, sensitivity)


_KINDS = ("outputs", "reads", "read_outputs")


@dataclass(frozen=True)
class _Mapped(Mapping[str, Tensor]):
    """Tensors of a file by name."""

    path: Path
    kind: str
    keys_in_file: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(f"{self.kind}/{self.keys_in_file[name]}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_in_file)

    def __len__(self) -> int:
        return len(self.keys_in_file)
