"""The strategies: which operator compresses which parameter, and how hard.

`paper` is the module-aware adaptive compression of arXiv 2505.18502: embedding and head pruned by
magnitude, attention and MLP by truncated SVD with quantised factors. `exact` keeps every bit.
`auto` takes per parameter whichever of the two needs fewer bytes. Norms, biases and whatever is
not a matrix are exact in all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftllm.checkpoint import TensorSpec, digest, raw_bytes
from graftllm.compression.calibration import Calibration
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
from graftllm.compression.pruning import encode_sparse
from graftllm.compression.roles import Role, is_matrix, role_of
from graftllm.delta import Delta, difference
from graftllm.errors import CompressionError
from graftllm.generation import resolve_device
from graftllm.progress import track
from graftllm.recipe import PackOptions

PRUNED: tuple[Role, ...] = ("embedding", "head")


@dataclass(frozen=True)
class Compressed:
    """One parameter of a delta, encoded, with what a pack's header says of it."""

    name: str
    role: Role
    spec: TensorSpec
    base_digest: str
    encoded: EncodedTensor
    error: float  # ||decoded - delta|| / ||delta||, 0 when exact


def encode_delta(
    delta: Delta,
    options: PackOptions,
    *,
    calibration: Calibration | None = None,
    payload_budget: int | None = None,
    device: str = "auto",
) -> Iterator[Compressed]:
    """Yield every parameter of a delta in compressed form, one at a time.

    Args:
        delta: what to compress.
        options: the strategy and its knobs.
        calibration: second moments of layer inputs; without them rounding is to nearest.
        payload_budget: bytes that all payloads together may take; the energy is chosen to fill it.
        device: where matrices are decomposed; `auto` takes a GPU when there is one.

    Raises:
        CompressionError: the budget cannot be met.
        CheckpointError: the delta holds NaN or infinity.
    """
    where = resolve_device(device)
    ranks: dict[str, int] = {}
    if payload_budget is not None:
        ranks = _ranks_for_budget(delta, options, payload_budget, where)
    for name in track(list(delta), label="packing"):
        base, tuned = delta.pair(name)
        change = difference(base, tuned, where=f"{delta.tuned.path}: tensor {name!r}")
        hessian = calibration.moments.get(name) if calibration is not None else None
        role = role_of(name, tuple(base.shape))
        encoded = EncodedTensor(*_encode(base, tuned, change.to(where), role, options, ranks.get(name), hessian))
        yield Compressed(
            name, role, delta.base.specs[name], digest(base), encoded, _relative_error(encoded, base, change)
        )


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
    exact = None if options.strategy == "paper" and is_matrix(tuple(base.shape)) else encode_exact(base, tuned)
    if exact is not None and (options.strategy == "exact" or not is_matrix(tuple(base.shape))):
        return exact
    if role in PRUNED:
        lossy = encode_sparse(change.cpu(), options.density, options.group_size)
    else:
        factors = leading_svd(change, options.energy) if rank is None else truncated_svd(change, rank)
        hessian = None if hessian is None else hessian.to(change.device)
        lossy = encode_lowrank(factors, options.bit_bands, options.group_size, hessian)
    return exact if exact is not None and exact[1].nbytes <= lossy[1].nbytes else lossy


def _same_bits(base: Tensor, tuned: Tensor) -> bool:
    return np.array_equal(raw_bytes(base), raw_bytes(tuned))


def _relative_error(encoded: EncodedTensor, base: Tensor, change: Tensor) -> float:
    norm = float(change.norm())
    return float((encoded.decode(base) - change).norm()) / norm if norm else 0.0


@dataclass(frozen=True)
class _Sizes:
    """What is known of one parameter before its energy is: its bytes if that is all, else its spectrum."""

    shape: tuple[int, ...]
    at_most: int | None  # bytes of the exact encoding, where that is allowed
    spectrum: Tensor | None

    def nbytes(self, energy: float, options: PackOptions) -> int:
        if self.spectrum is None:
            return self.at_most or 0
        size = lowrank_nbytes(self.shape, rank_for_energy(self.spectrum, energy), options.bit_bands, options.group_size)
        return size if self.at_most is None else min(size, self.at_most)


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
    exact = None
    if options.strategy != "paper" or not is_matrix(shape):
        exact = encode_exact(base, tuned)[1].nbytes
    if not is_matrix(shape):
        return _Sizes(shape, exact, None)
    if role_of(name, shape) in PRUNED:
        sparse = encode_sparse(change, options.density, options.group_size)[1].nbytes
        return _Sizes(shape, sparse if exact is None else min(sparse, exact), None)
    return _Sizes(shape, exact, singular_values(change.to(device)).cpu())
