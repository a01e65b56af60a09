"""What calibration measured of a model, and that as a file, so that no process needs it all in memory."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from graftllm.compression.matrix import DOUBLE, matrix_shape
from graftllm.compression.metric import Metric, shrunk
from graftllm.compression.prices import DAMPING, Calibration, Sensitivity, input_metric, normal
from graftllm.tensors import DTYPE_NAMES, TensorSpec, raw_bytes, write_safetensors


@dataclass(frozen=True)
class Measures:
    """What was measured on calibration rows; without it every matrix's errors count alike."""

    calibration: Calibration | None = None
    sensitivity: Sensitivity | None = None
    known_prices: Mapping[str, float] | None = None  # `prices`, where they were computed before

    @cached_property
    def prices(self) -> Mapping[str, float]:
        """What an error costs on average in matrices of a kind, those whose names differ in numbers alone.

        Of all matrices together it is under the empty name.
        """
        if self.known_prices is not None or self.sensitivity is None:
            return self.known_prices or {}
        found: dict[str, list[float]] = {}
        moments = {} if self.calibration is None else self.calibration.moments
        for name in self.sensitivity.measured:
            price = self.sensitivity.price(name, moments.get(name))
            if price is not None:
                for kind in ("", _kind(name)):
                    found.setdefault(kind, []).append(price)
        return {kind: sum(scales) / len(scales) for kind, scales in found.items()}

    def moments(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Return the second moments of the layer's input, where they are known and fit the parameter's shape.

        They are estimated from those of the tokens that reached the layer, see `shrunk`.
        """
        found = self.calibration.moments.get(name) if self.calibration is not None else None
        if found is None or found.shape[0] != matrix_shape(shape)[0 if self.transposed(name) else 1]:
            return None
        tokens = self.calibration.reached.get(name) if self.calibration is not None else None
        return found if tokens is None else shrunk(found, tokens)

    def metric(self, name: str, shape: tuple[int, ...]) -> Metric:
        """Return what errors in a parameter cost."""
        moments = self.moments(name, shape)
        if self.sensitivity is None:
            found = input_metric(moments)
        else:
            found = self.sensitivity.metric(name, moments)
            if found is None or not found.scale:
                found = self._unmeasured(name, moments, idle=found is not None)
        if found.right is None or len(found.right) > DOUBLE:
            return found
        return Metric(found.scale, None if found.rows is None else found.rows.double(), found.right.double())

    def _unmeasured(self, name: str, moments: Tensor | None, *, idle: bool) -> Metric:
        """Return what errors cost that nothing was measured of: as much as in others of its kind, or in all.

        What is `idle`, as an expert that only tokens reached which foretell nothing, and an expert that no token
        reached, are worth as little as the rows that none needed.
        """
        price = self.prices.get(_kind(name), self.prices.get("", 1.0))
        if idle or (self.calibration is not None and name in self.calibration.unseen):
            price *= DAMPING
        return Metric(price, None, None if moments is None else normal(moments))

    def transposed(self, name: str) -> bool:
        """Return whether a parameter's input side is dimension 0."""
        return self.calibration is not None and name in self.calibration.transposed


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def save_measures(measures: Measures, path: Path) -> None:
    """Write measures as one safetensors file, a tensor in memory at a time."""
    known, sensitivity = measures.calibration, measures.sensitivity
    facts: dict[str, object] = {"sensitivity": sensitivity is not None}
    parts: dict[str, tuple[Mapping[str, Tensor], str]] = {}  # name in the file -> where the tensor is, and its name
    if known is not None:
        keys = {name: known.shared.get(name, name) for name in known.moments}
        first = {key: name for name, key in reversed(keys.items())}
        parts |= {f"moments/{key}": (known.moments, name) for key, name in first.items()}
        facts |= {"tokens": known.tokens, "keys": keys, "reached_tokens": dict(known.reached)}
        facts |= {"transposed": sorted(known.transposed), "unseen": sorted(known.unseen)}
    if sensitivity is not None:
        facts |= {"reached": dict(sensitivity.reached), "prices": dict(measures.prices)}
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
            facts["reached_tokens"],
        )
    if not facts["sensitivity"]:
        return Measures(calibration)
    sensitivity = Sensitivity(**{kind: mapped(kind) for kind in _KINDS}, reached=facts["reached"])
    return Measures(calibration, sensitivity, facts["prices"])


_KINDS = ("outputs", "reads", "read_outputs", "rows")


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
