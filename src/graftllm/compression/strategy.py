"""The strategies: which operator compresses which parameter, and how hard.

`auto` takes for every matrix the operator that is cheapest at one step for the whole model. `paper`
is the module-aware adaptive compression of arXiv 2505.18502: embedding and head pruned by magnitude,
attention and MLP by truncated SVD with quantised factors. `exact` keeps every bit. Norms, biases and
whatever is not a matrix are exact in all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftllm.checkpoint import TensorSpec, raw_bytes
from graftllm.compression.allocation import Outlook, outlook, step_for
from graftllm.compression.automatic import Measures, encode_matrix, next_step, source_of
from graftllm.compression.encoded import EncodedTensor, Operator, Unchanged
from graftllm.compression.exact import encode_exact
from graftllm.compression.lowrank import (
    encode_lowrank,
    leading_svd,
    lowrank_nbytes,
    rank_for_energy,
    singular_values,
    truncated_svd,
)
from graftllm.compression.matrix import MatrixOperator, Source, matrix_shape
from graftllm.compression.pruning import encode_sparse
from graftllm.compression.roles import Role, is_matrix, role_of
from graftllm.delta import Delta, difference
from graftllm.errors import CompressionError
from graftllm.generation import resolve_device
from graftllm.progress import track
from graftllm.recipe import PackOptions

PRUNED: tuple[Role, ...] = ("embedding", "head")
SERVED: tuple[Role, ...] = ("attention", "mlp", "expert")
_DEFAULT_SHARE = 0.05  # of the tuned checkpoint's bytes, where no budget is given
_PASSES = 4


@dataclass(frozen=True)
class Compressed:
    """One parameter of a delta, encoded, with what a pack's header says of it."""

    name: str
    role: Role
    spec: TensorSpec
    base_digest: str
    encoded: EncodedTensor
    error: float = 0.0  # ||decoded - delta|| / ||delta||


def encode_delta(
    delta: Delta,
    options: PackOptions,
    *,
    measures: Measures | None = None,
    payload_budget: int | None = None,
    entry_bytes: Callable[[Compressed], int] | None = None,
    device: str = "auto",
) -> Iterator[Compressed]:
    """Yield every parameter of a delta in compressed form, one at a time.

    Args:
        delta: what to compress.
        options: the strategy and its knobs.
        measures: second moments of layer inputs and of gradients at their outputs; without the former
            rounding is to nearest, without the latter all errors count alike.
        payload_budget: bytes that all payloads together may take, and in the strategy `auto` what is said of
            each parameter beside its payload, too.
        entry_bytes: how many bytes the latter is.
        device: where matrices are decomposed; `auto` takes a GPU when there is one.

    Raises:
        CompressionError: the budget cannot be met.
        CheckpointError: the delta holds NaN or infinity.
    """
    where, measures = resolve_device(device), measures or Measures()
    if options.strategy == "auto":
        with _one_thread():
            parts = _automatic(delta, options, measures, payload_budget, entry_bytes or _nothing, where)
        yield from parts
        return
    ranks: dict[str, int] = {}
    if payload_budget is not None:
        ranks = _ranks_for_budget(delta, options, payload_budget, where)
    for name in track(list(delta), label="packing"):
        base, tuned = delta.pair(name)
        change = difference(base, tuned, where=f"{delta.tuned.path}: tensor {name!r}")
        hessian = measures.calibration.moments.get(name) if measures.calibration is not None else None
        role = role_of(name, tuple(base.shape))
        encoded = EncodedTensor(*_encode(base, tuned, change.to(where), role, options, ranks.get(name), hessian))
        norm = float(change.norm())
        error = float((encoded.decode(base) - change).norm()) / norm if norm else 0.0
        yield Compressed(name, role, delta.base.specs[name], delta.base_digest(name), encoded, error)


def _automatic(
    delta: Delta,
    options: PackOptions,
    measures: Measures,
    payload_budget: int | None,
    entry_bytes: Callable[[Compressed], int],
    device: torch.device,
) -> list[Compressed]:
    """Return every parameter in compressed form at the step that fills the budget."""
    parts: dict[str, Compressed] = {}
    outlooks: dict[str, Outlook] = {}
    for name in track(list(delta), label="looking"):
        base, tuned = delta.pair(name)
        if _same_bits(base, tuned):
            encoded = EncodedTensor(Unchanged(), np.empty(0, np.uint8))
        elif min(matrix_shape(tuple(base.shape))) == 1 or not base.is_floating_point():
            encoded = EncodedTensor(*encode_exact(base, tuned))
        else:
            rank = _most_rank(name, tuple(base.shape), options)
            metric = measures.metric(name, tuple(base.shape))
            outlooks[name] = outlook(_source(delta, name, measures, device), metric, rank)
            continue
        parts[name] = Compressed(
            name, role_of(name, tuple(base.shape)), delta.base.specs[name], delta.base_digest(name), encoded
        )
    fixed = sum(part.encoded.nbytes + entry_bytes(part) for part in parts.values())
    if payload_budget is None:
        room = round(_DEFAULT_SHARE * sum(delta.tuned.specs[name].nbytes for name in outlooks))
        entry_bytes = _nothing
    else:
        room = payload_budget - fixed
    step: float | None = step_for(outlooks.values(), 8 * max(room, 0)) if outlooks else None
    fullest, least = -1, 0
    for _ in range(_PASSES):
        if step is None:
            break
        tried = {}
        for name in track(list(outlooks), label="packing"):
            tried[name] = _at_step(delta, name, measures, outlooks[name], step, device)
        total = sum(part.encoded.nbytes + entry_bytes(part) for part in tried.values())
        least = min(least or total, total)
        if fullest < total <= room:
            parts, fullest = {**parts, **tried}, total
        step = next_step(outlooks, total, room, step)
    if outlooks and fullest < 0:
        raise CompressionError(
            f"budget: expected at least {fixed + least:,} bytes for this delta, {fixed:,} of them for norms and "
            f"biases, which are kept exactly; found {payload_budget:,}. Raise the budget."
        )
    return [parts[name] for name in delta]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch calculate with one thread: more would change last bits, and small matrices gain nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _most_rank(name: str, shape: tuple[int, ...], options: PackOptions) -> int | None:
    """Return the rank that a servable matrix may have; None where any operator will do."""
    return options.servable if role_of(name, shape) in SERVED and len(shape) == 2 else None


def _nothing(part: Compressed) -> int:
    return 0


def _source(delta: Delta, name: str, measures: Measures, device: torch.device) -> Source:
    where = f"{delta.tuned.path}: tensor {name!r}"
    return source_of(*delta.pair(name), transposed=measures.transposed(name), device=device, where=where)


def _at_step(
    delta: Delta, name: str, measures: Measures, known: Outlook, step: float, device: torch.device
) -> Compressed:
    base, tuned = delta.pair(name)
    shape = tuple(base.shape)
    source = _source(delta, name, measures, device)
    operator, payload, error = encode_matrix(base, tuned, source, measures.metric(name, shape), known, step)
    if measures.transposed(name) and isinstance(operator, MatrixOperator):
        operator = operator.model_copy(update={"transposed": True})
    encoded = EncodedTensor(operator, payload)
    return Compressed(name, role_of(name, shape), delta.base.specs[name], delta.base_digest(name), encoded, error)


def _encode(
    base: Tensor,
    tuned: Tensor,
    change: Tensor,
    role: Role,
    options: PackOptions,
    rank: int | None,
    hessian: Tensor | None,
) -> tuple[Operator, np.ndarray]:
    if _same_bits(base, tuned):
        return Unchanged(), np.empty(0, np.uint8)
    if options.strategy == "exact" or not is_matrix(tuple(base.shape)):
        return encode_exact(base, tuned)
    if role in PRUNED:
        return encode_sparse(change.cpu(), options.density, options.group_size)
    factors = leading_svd(change, options.energy) if rank is None else truncated_svd(change, rank)
    hessian = None if hessian is None else hessian.to(change.device)
    return encode_lowrank(factors, options.bit_bands, options.group_size, hessian)


def _same_bits(base: Tensor, tuned: Tensor) -> bool:
    return np.array_equal(raw_bytes(base), raw_bytes(tuned))


@dataclass(frozen=True)
class _Sizes:
    """What is known of one parameter before its energy is: its bytes if that is all, else its spectrum."""

    shape: tuple[int, ...]
    known: int
    spectrum: Tensor | None

    def nbytes(self, energy: float, options: PackOptions) -> int:
        if self.spectrum is None:
            return self.known
        return lowrank_nbytes(self.shape, rank_for_energy(self.spectrum, energy), options.bit_bands, options.group_size)


def _ranks_for_budget(delta: Delta, options: PackOptions, budget: int, device: torch.device) -> dict[str, int]:
    """Return the ranks at the largest energy that fits the budget, by bisection over known spectra."""
    if options.strategy == "exact":
        raise CompressionError(
            "budget: the strategy 'exact' keeps every bit, so it takes no budget; leave it out or use auto."
        )
    sizes = {name: _sizes(delta, name, options, device) for name in track(list(delta), label="reading spectra")}

    def total(energy: float) -> int:
        return sum(size.nbytes(energy, options) for size in sizes.values())

    low, high = 1e-6, 1.0
    if total(low) > budget:
        raise CompressionError(
            f"budget: expected at least {total(low):,} bytes of payload for this delta, found {max(budget, 0):,} "
            f"left of the budget after the header. Raise the budget or lower the density (now {options.density})."
        )
    if total(high) <= budget:
        low = high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= budget else (low, middle)
    return {name: rank_for_energy(size.spectrum, low) for name, size in sizes.items() if size.spectrum is not None}


def _sizes(delta: Delta, name: str, options: PackOptions, device: torch.device) -> _Sizes:
    base, tuned = delta.pair(name)
    shape = tuple(base.shape)
    if _same_bits(base, tuned):
        return _Sizes(shape, 0, None)
    change = difference(base, tuned, where=f"{delta.tuned.path}: tensor {name!r}")
    if not is_matrix(shape):
        return _Sizes(shape, encode_exact(base, tuned)[1].nbytes, None)
    if role_of(name, shape) in PRUNED:
        return _Sizes(shape, encode_sparse(change, options.density, options.group_size)[1].nbytes, None)
    return _Sizes(shape, 0, singular_values(change.to(device)).cpu())
