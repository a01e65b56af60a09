"""The units that packing is made of: one look at one tensor, or one coding of it.

A unit is a function of the checkpoints, the options, what calibration measured and the unit itself, and
of nothing else. Its result is a file in the workspace, so any process can do it, and none does it
twice. Which units there are, and what is made of them, is for `strategy` to say.
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

from graftllm.checkpoint import DTYPE_NAMES, DTYPES, TensorSpec, raw_bytes, write_safetensors
from graftllm.compression.allocation import encode_as
from graftllm.compression.automatic import Way, source_of
from graftllm.compression.encoded import EncodedTensor, ExactLayer, Operator, Refinement, Unchanged
from graftllm.compression.exact import Exact, encode_exact
from graftllm.compression.layered import encode_closest, refine
from graftllm.compression.matrix import MatrixOperator, Source, matrix_shape
from graftllm.compression.measures import Measures, load_measures
from graftllm.compression.metric import frobenius
from graftllm.compression.outlook import Outlook, Sides, outlook
from graftllm.compression.published import Sizes, encode_published, sizes
from graftllm.compression.roles import Role, role_of
from graftllm.compression.workspace import Workspace
from graftllm.delta import Delta, check_difference, difference
from graftllm.devices import resolve_device
from graftllm.packing_options import PackOptions

_FOUND = ("places", "bits", "cost", "strengths", *Sides._fields)  # arrays of an outlook
_KNOWN = ("shape", "energy", "changed", "altered", "stepped", "servable", "partial")  # what else is known of it
_WIDE = 1e6  # largest values above this are not reached by errors: those of float32 and bfloat16
SERVED: tuple[Role, ...] = ("attention", "mlp", "expert")


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


def carry_out(job: Job, unit: Unit) -> None:
    """Do a unit unless it is done.

    Raises:
        CheckpointError: the delta holds NaN, infinity or values above 2 ** 48.
    """
    if not unit.file(job).exists():
        _KINDS[unit.kind](job, unit)


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
    role: Role
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
    return Sizes(job.delta.tuned.specs[name].shape, known, spectrum)


def found_code(job: Job, unit: Unit) -> Compressed:
    """Return a coded parameter."""
    with safe_open(unit.file(job), framework="np") as file:
        facts = Facts.model_validate_json((file.metadata() or {})["facts"])
    spec = job.delta.base.specs[unit.name]
    return Compressed(unit.name, role_of(unit.name, job.delta.tuned.specs[unit.name].shape), spec, facts, job, unit)


def _look(job: Job, unit: Unit) -> None:
    """Settle what is unchanged or no matrix; find the outlook of all else."""
    delta, name = job.delta, unit.name
    spec = delta.tuned.specs[name]
    if delta.unchanged(name):
        write_code(job, unit, Unchanged(), np.empty(0, np.uint8), 0.0)
    elif _is_small(name, spec.shape) or not _is_floating(job, name):
        write_code(job, unit, *encode_exact(*_pair(job, name)), 0.0)
    else:
        served = role_of(name, spec.shape) in SERVED and len(spec.shape) == 2
        measures = job.measures()
        rank = job.options.servable if served else None
        found = outlook(_source(job, name, measures), measures.metric(name, spec.shape), rank, unit.directions)
        _write_outlook(job, unit, found)


def _code(job: Job, unit: Unit) -> None:
    """Code a matrix in a way, at a step."""
    if unit.way == "exact":
        return write_code(job, unit, *encode_closest(*_pair(job, unit.name), resolve_device(job.device)), 0.0)
    known, measures = found_outlook(job, _look_of(unit), directions=unit.way != "zero"), job.measures()
    assert known is not None and unit.way is not None
    if unit.way == "zero":
        return write_code(job, unit, Unchanged(), np.empty(0, np.uint8), 1.0, known.energy)
    assert unit.at is not None
    source = _source(job, unit.name, measures)
    metric = measures.metric(unit.name, job.delta.tuned.specs[unit.name].shape)
    coded = encode_as(unit.way, source, metric, known, unit.at)
    if coded is None:
        return write_code(job, unit, Unchanged(), np.empty(0, np.uint8), 1.0, known.energy)
    operator, payload, error, cost = coded.operator, coded.payload, coded.error, coded.cost
    if measures.transposed(unit.name) and isinstance(operator, MatrixOperator):
        operator = operator.model_copy(update={"transposed": True})
    if overflows(job, unit.name, operator, payload):
        operator, payload, error, cost = *encode_closest(*_pair(job, unit.name), source.device), 0.0, 0.0
    write_code(job, unit, operator, payload, error, cost)


def _refine(job: Job, unit: Unit) -> None:
    """Put an exact layer on a coded matrix."""
    lossy = found_code(job, replace(unit, kind="code"))
    encoded = refine(lossy.encoded, *job.delta.pair(unit.name), resolve_device(job.device))
    _write_encoded(job, unit, encoded, lossy.facts.error)


def _source(job: Job, name: str, measures: Measures) -> Source:
    return source_of(job.delta, name, transposed=measures.transposed(name), device=resolve_device(job.device))


def _spectrum(job: Job, unit: Unit) -> None:
    """Find how many bytes a parameter takes in the strategy `paper`, or on what that depends."""
    found = Sizes((), 0)
    if not job.delta.unchanged(unit.name):
        if _is_floating(job, unit.name):
            base, tuned, change, role = _changed(job, unit.name)
            found = sizes(base, tuned, change, role, job.options)
        else:
            found = Sizes((), encode_exact(*_pair(job, unit.name))[1].nbytes)
    arrays = {} if found.spectrum is None else {"spectrum": found.spectrum}
    _write(unit.file(job), arrays, "known", json.dumps(found.known))


def _publish(job: Job, unit: Unit) -> None:
    """Code a parameter in the strategy `paper` or `exact`."""
    if job.delta.unchanged(unit.name):
        return write_code(job, unit, Unchanged(), np.empty(0, np.uint8), 0.0)
    if job.options.strategy == "exact":
        closest = encode_closest(*_pair(job, unit.name), resolve_device(job.device))
        return write_code(job, unit, *closest, 0.0)
    if not _is_floating(job, unit.name):
        return write_code(job, unit, *encode_exact(*_pair(job, unit.name)), 0.0)
    base, tuned, change, role = _changed(job, unit.name)
    measures, rank = job.measures(), None if unit.at is None else int(unit.at)
    moments, transposed = measures.moments(unit.name, tuple(base.shape)), measures.transposed(unit.name)
    operator, payload = encode_published(
        base, tuned, change, role, job.options, rank, moments, transposed=transposed and moments is not None
    )
    if overflows(job, unit.name, operator, payload):
        return write_code(job, unit, *encode_exact(base, tuned), 0.0)
    change = change.cpu()
    error, norm = frobenius(operator.delta(payload, base).sub_(change)), frobenius(change)
    return write_code(job, unit, operator, payload, error / norm if norm else 0.0)


def _is_small(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a parameter is no matrix: a vector, or the biases of a stack of experts."""
    return min(matrix_shape(shape)) == 1 or role_of(name, shape) in ("norm", "bias")


def _is_floating(job: Job, name: str) -> bool:
    return DTYPES[job.delta.tuned.specs[name].dtype].is_floating_point


def overflows(job: Job, name: str, operator: Operator, payload: np.ndarray) -> bool:
    """Return whether an encoding's errors lead beyond a narrow dtype's largest value, which tuned ones may be near."""
    largest = torch.finfo(DTYPES[job.delta.tuned.specs[name].dtype]).max
    if largest > _WIDE or isinstance(operator, Exact | Unchanged):
        return False
    return not bool(EncodedTensor(operator, payload).restore(job.delta.pair(name)[0]).float().isfinite().all())


def _pair(job: Job, name: str) -> tuple[Tensor, Tensor]:
    """Return base and tuned value.

    Raises:
        CheckpointError: the difference holds NaN, infinity or values above 2 ** 48.
    """
    base, tuned = job.delta.pair(name)
    if tuned.is_floating_point():
        check_difference(base, tuned, where=job.delta.where(name))
    return base, tuned


def _changed(job: Job, name: str) -> tuple[Tensor, Tensor, Tensor, Role]:
    base, tuned = job.delta.pair(name)
    change = difference(base, tuned, where=job.delta.where(name)).to(resolve_device(job.device))
    return base, tuned, change, role_of(name, tuple(base.shape))


_KINDS = {"look": _look, "code": _code, "refine": _refine, "spectrum": _spectrum, "publish": _publish}


def write_code(job: Job, unit: Unit, operator: Operator, payload: np.ndarray, error: float, cost: float = 0.0) -> None:
    """Keep what a unit made of its parameter; `error` is ||decoded - delta|| / ||delta||."""
    _write_encoded(job, unit, EncodedTensor(operator, payload), error, cost)


def _write_encoded(job: Job, unit: Unit, encoded: EncodedTensor, error: float, cost: float = 0.0) -> None:
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
    with safe_open(_look_of(unit).file(job), framework="np") as file:
        return json.loads((file.metadata() or {})["outlook"])["base_digest"]


def _look_of(unit: Unit) -> Unit:
    """Return the look that what is coded goes by."""
    return replace(unit, kind="look", at=None, way=None)


def _write_outlook(job: Job, unit: Unit, found: Outlook) -> None:
    arrays = dict(zip(_FOUND, (*found.sampled, found.strengths, *found.sides), strict=True))
    known = {name: getattr(found, name) for name in _KNOWN}
    facts = {"known": known, "base_digest": job.delta.base_digest(unit.name)}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    tensors["directions"] = found.directions.cpu().contiguous()
    _write(unit.file(job), tensors, "outlook", json.dumps(facts))


def _write(path: Path, tensors: dict[str, Tensor], name: str, facts: str) -> None:
    layout = {part: TensorSpec(DTYPE_NAMES[value.dtype], tuple(value.shape)) for part, value in tensors.items()}
    write_safetensors(path, layout, lambda part: raw_bytes(tensors[part]), metadata={name: facts})


def payload_digest(payload: np.ndarray) -> str:
    """Return the first 16 hexadecimal digits of a payload's SHA-256."""
    return hashlib.sha256(payload.data).hexdigest()[:16]
