"""The units that packing is made of, by name, and what they leave in the workspace.

A unit is one thing to do with one tensor; `units` says how it is done. Its result is a file, so any process can do it,
and none does it twice. What the strategies make of results is read from here.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor

from graftllm.compression.automatic import Way
from graftllm.compression.encoded import EncodedTensor, ExactLayer, Operator, Refinement, payload_digest
from graftllm.compression.exact import Exact
from graftllm.compression.matrix import matrix_shape
from graftllm.compression.measures import Measures, load_measures
from graftllm.compression.outlook import Outlook, Sides
from graftllm.compression.published import Sizes
from graftllm.compression.workspace import Workspace
from graftllm.delta import Delta
from graftllm.packing_options import PackOptions
from graftllm.tensors import DTYPE_NAMES, TensorSpec, raw_bytes, write_safetensors

_FOUND = ("places", "bits", "cost", "strengths", *Sides._fields)  # arrays of an outlook
_KNOWN = ("shape", "energy", "changed", "altered", "stepped", "servable", "partial")  # what else is known of it


@dataclass(frozen=True)
class Job:
    """What all units of a packing share. It is small: workers read tensors from the checkpoints themselves."""

    delta: Delta
    options: PackOptions
    device: str
    workspace: Workspace

    @property
    def measures_file(self) -> Path:
        """Where what calibration measured is."""
        return self.workspace.directory / "measures.safetensors"

    def measures(self) -> Measures:
        """Return what calibration measured; tensors are mapped when they are asked for."""
        return load_measures(self.measures_file) if self.measures_file.exists() else Measures()


@dataclass(frozen=True)
class Unit:
    """One thing to do with one tensor.

    Attributes:
        name: of the tensor.
        kind: `look` and `code` for the strategy `auto`, `refine` for an exact layer on what `code` made,
            `distill` for what training makes of that, `spectrum` and `publish` for the other strategies.
        at: the step that `code`, `refine` and `distill` use, or the rank of `publish`.
        directions: how many a `look` takes at most; of what is coded, those of the look that it goes by.
        way: how `code`, `refine` and `distill` code; `zero`, which leaves the matrix out, and `exact` have no step.
    """

    name: str
    kind: Literal["look", "code", "refine", "distill", "spectrum", "publish"]
    at: float | None = None
    directions: int | None = None
    way: Way | None = None

    def file(self, job: Job) -> Path:
        """Return where the result is, or will be."""
        place = "" if self.directions is None else f".{self.directions}"
        place += "" if self.way is None else f".{self.way}"
        place += "" if self.at is None else f".{float(self.at).hex()}"
        return job.workspace.directory / f"{hashlib.sha256(self.name.encode()).hexdigest()[:24]}.{self.kind}{place}"


class Facts(BaseModel):
    """What is said of a coded parameter; its payloads are in the same file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    operator: Operator
    base_digest: str
    nbytes: int
    payload_digest: str
    error: float  # ||decoded - delta|| / ||delta||, of the lossy layer where there is an exact one on top
    cost: float = 0.0  # of that error, where a budget goes by it
    refinement: Refinement | None = None
    tuned_digest: str | None = None  # where the tuned bits are coded


@dataclass(frozen=True)
class Compressed:
    """One parameter of a delta, encoded; its payload stays in the workspace until it is asked for."""

    name: str
    spec: TensorSpec
    facts: Facts
    job: Job
    unit: Unit

    @property
    def payload(self) -> np.ndarray:
        """The payload, flat uint8."""
        return self._stored("payload", self.facts.nbytes)

    @property
    def refinement(self) -> np.ndarray:
        """The payload of the exact layer on top, flat uint8; empty where there is none."""
        return self._stored("refinement", self.facts.refinement.nbytes if self.facts.refinement else 0)

    @property
    def encoded(self) -> EncodedTensor:
        """The operators and the payloads."""
        on_top = self.facts.refinement
        layer = None if on_top is None else ExactLayer(on_top.weight, on_top.how, self.refinement)
        return EncodedTensor(self.facts.operator, self.payload, layer)

    def _stored(self, part: str, nbytes: int) -> np.ndarray:
        with safe_open(self.unit.file(self.job), framework="np") as file:
            return file.get_tensor(part) if nbytes else np.empty(0, np.uint8)


def found_outlook(job: Job, look: Unit, *, directions: bool = False) -> Outlook | None:
    """Return what a look found, if asked for with the directions; None where it settled the matter."""
    with safe_open(look.file(job), framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("outlook", "null"))
        if facts is None:
            return None
        places, bits, cost, strengths, *sides = (file.get_tensor(part).numpy() for part in _FOUND)
        known = facts["known"] | {part: tuple(facts["known"][part]) for part in ("shape", "stepped")}
        known |= {"directions": file.get_tensor("directions")} if directions else {}
    return Outlook(sampled=(places, bits, cost), strengths=strengths, sides=Sides(*sides), **known)


def found_sizes(job: Job, name: str) -> Sizes:
    """Return what a `spectrum` unit found."""
    with safe_open(Unit(name, "spectrum").file(job), framework="pt") as file:
        known = json.loads((file.metadata() or {})["known"])
        spectrum = file.get_tensor("spectrum") if "spectrum" in file.keys() else None
    return Sizes(matrix_shape(job.delta.tuned.specs[name].shape), known, spectrum)


def found_code(job: Job, unit: Unit) -> Compressed:
    """Return a coded parameter."""
    with safe_open(unit.file(job), framework="np") as file:
        facts = Facts.model_validate_json((file.metadata() or {})["facts"])
    spec = job.delta.base.specs[unit.name]
    return Compressed(unit.name, spec, facts, job, unit)


def write_code(job: Job, unit: Unit, operator: Operator, payload: np.ndarray, error: float, cost: float = 0.0) -> None:
    """Keep what a unit made of its parameter; `error` is ||decoded - delta|| / ||delta||."""
    write_encoded(job, unit, EncodedTensor(operator, payload), error, cost)


def write_encoded(job: Job, unit: Unit, encoded: EncodedTensor, error: float, cost: float = 0.0) -> None:
    """Keep an encoding and its exact layer, where it has one; `error` is of the lossy layer."""
    arrays, on_top = {"payload": encoded.payload}, None
    if encoded.refinement is not None:
        arrays["refinement"] = encoded.refinement.payload
        on_top = Refinement(
            weight=encoded.refinement.weight,
            how=encoded.refinement.how,
            nbytes=arrays["refinement"].nbytes,
            payload_digest=payload_digest(arrays["refinement"]),
        )
    exact = on_top is not None or isinstance(encoded.operator, Exact)
    facts = Facts(
        operator=encoded.operator,
        base_digest=_base_digest(job, unit),
        nbytes=encoded.payload.nbytes,
        payload_digest=payload_digest(encoded.payload),
        error=error,
        cost=cost,
        refinement=on_top,
        tuned_digest=job.delta.tuned.digest(unit.name) if exact else None,
    )
    layout = {name: TensorSpec("U8", array.shape) for name, array in arrays.items()}
    metadata = {"facts": facts.model_dump_json()}
    write_safetensors(unit.file(job), layout, lambda name: arrays[name], metadata=metadata)


def _base_digest(job: Job, unit: Unit) -> str:
    """Return the digest of the base value; the look at a matrix has found it already."""
    if unit.kind not in ("code", "refine", "distill"):
        return job.delta.base_digest(unit.name)
    with safe_open(look_of(unit).file(job), framework="np") as file:
        return json.loads((file.metadata() or {})["outlook"])["base_digest"]


def look_of(unit: Unit) -> Unit:
    """Return the look that what is coded goes by."""
    return replace(unit, kind="look", at=None, way=None)


def write_outlook(job: Job, unit: Unit, found: Outlook) -> None:
    """Keep what a look found."""
    arrays = dict(zip(_FOUND, (*found.sampled, found.strengths, *found.sides), strict=True))
    known = {name: getattr(found, name) for name in _KNOWN}
    facts = {"known": known, "base_digest": job.delta.base_digest(unit.name)}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    tensors["directions"] = found.directions.cpu().contiguous()
    _write(unit.file(job), tensors, "outlook", json.dumps(facts))


def write_sizes(job: Job, unit: Unit, found: Sizes) -> None:
    """Keep what a `spectrum` found."""
    arrays = {} if found.spectrum is None else {"spectrum": found.spectrum}
    _write(unit.file(job), arrays, "known", json.dumps(found.known))


def _write(path: Path, tensors: dict[str, Tensor], name: str, facts: str) -> None:
    layout = {part: TensorSpec(DTYPE_NAMES[value.dtype], tuple(value.shape)) for part, value in tensors.items()}
    write_safetensors(path, layout, lambda part: raw_bytes(tensors[part]), metadata={name: facts})
