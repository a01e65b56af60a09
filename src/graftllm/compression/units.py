"""What is done to one tensor at a time: a look at it, or a coding of it.

A result is a function of the checkpoints, the options, what calibration measured and the unit itself, and of nothing
else. Which units there are, and what is made of them, is for `strategy` to say.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from graftllm.compression.allocation import encode_as
from graftllm.compression.automatic import source_of
from graftllm.compression.encoded import EncodedTensor, Operator, Unchanged
from graftllm.compression.exact import Exact, encode_exact
from graftllm.compression.jobs import (
    Job,
    Unit,
    found_code,
    found_outlook,
    look_of,
    write_code,
    write_encoded,
    write_outlook,
    write_sizes,
)
from graftllm.compression.layered import encode_closest, refine
from graftllm.compression.matrix import MatrixOperator, Source, is_matrix
from graftllm.compression.measures import Measures
from graftllm.compression.metric import frobenius
from graftllm.compression.outlook import outlook
from graftllm.compression.published import Sizes, encode_published, sizes
from graftllm.compression.roles import Role, role_of
from graftllm.delta import check_difference, difference
from graftllm.devices import resolve_device
from graftllm.tensors import DTYPES

_WIDE = 1e6  # largest values above this are not reached by errors: those of float32 and bfloat16
SERVED: tuple[Role, ...] = ("attention", "mlp", "expert", "other")


def carry_out(job: Job, unit: Unit) -> None:
    """Do a unit unless it is done.

    Raises:
        CheckpointError: the delta holds NaN, infinity or values above 2 ** 48.
    """
    if not unit.file(job).exists():
        _KINDS[unit.kind](job, unit)


def _look(job: Job, unit: Unit) -> None:
    """Settle what is unchanged or no matrix; find the outlook of all else."""
    delta, name = job.delta, unit.name
    spec = delta.tuned.specs[name]
    if delta.unchanged(name):
        write_code(job, unit, Unchanged(), np.empty(0, np.uint8), 0.0)
    elif not is_matrix(spec.shape, role_of(name, spec.shape)) or not _is_floating(job, name):
        write_code(job, unit, *encode_exact(*_pair(job, name)), 0.0)
    else:
        served = role_of(name, spec.shape) in SERVED and len(spec.shape) == 2
        measures = job.measures()
        rank = job.options.servable if served else None
        found = outlook(_source(job, name, measures), measures.metric(name, spec.shape), rank, unit.directions)
        write_outlook(job, unit, found)


def _code(job: Job, unit: Unit) -> None:
    """Code a matrix in a way, at a step."""
    if unit.way == "exact":
        return write_code(job, unit, *encode_closest(*_pair(job, unit.name), resolve_device(job.device)), 0.0)
    known, measures = found_outlook(job, look_of(unit), directions=unit.way != "zero"), job.measures()
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
    write_encoded(job, unit, encoded, lossy.facts.error)


def _source(job: Job, name: str, measures: Measures) -> Source:
    return source_of(job.delta, name, transposed=measures.transposed(name), device=resolve_device(job.device))


def _spectrum(job: Job, unit: Unit) -> None:
    """Find how many bytes a parameter takes in the strategy `paper`, or on what that depends."""
    found = Sizes((0, 0), 0)
    if not job.delta.unchanged(unit.name):
        if _is_floating(job, unit.name):
            base, tuned, change, role = _changed(job, unit.name)
            found = sizes(base, tuned, change, role, job.options)
        else:
            found = Sizes((0, 0), encode_exact(*_pair(job, unit.name))[1].nbytes)
    write_sizes(job, unit, found)


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
