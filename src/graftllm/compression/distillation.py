"""Codes trained so that the packed model answers as the tuned one does.

Rounding takes one matrix after the other, and an estimate of what its errors cost. Here all codes learn at once, by
Adam on

    KL(tuned || packed) + sum_l ||h_l' - h_l||^2 / ||h_l||^2 + price * bits

over calibration rows, where h_l is what layer l gives for all tokens: from the answers alone, codes learn the rows
by heart (TinyBERT, arXiv 1909.10351, learns from both). Codes are real numbers that are rounded on the way forward;
gradients pass as if they were not (straight-through estimator, arXiv 1308.3432). They start where rounding left them.
Operators, ranks and steps stay, so a pack is read as before. The price is what a bit is worth at the start, 3 loss a
bit of the pack, since divergence falls with about the cube of its size; then it keeps the pack as large as it was.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.compression.factored import MatrixCode
from graftllm.compression.jobs import Compressed, Job, found_code, write_code
from graftllm.compression.matrix import matrix_shape
from graftllm.compression.metric import frobenius
from graftllm.compression.prices import MAX_LENGTH
from graftllm.compression.sensitivity import answered, fits_in_memory, predicting
from graftllm.compression.units import overflows
from graftllm.devices import resolve_device
from graftllm.errors import CompressionError
from graftllm.live import Binding, bindings, named_values
from graftllm.loading import load_model, load_tokenizer
from graftllm.progress import progress
from graftllm.records import Prompt
from graftllm.rendering import Answered, context_length, cut, pad
from graftllm.streaming import check_language_model
from graftllm.tensors import DTYPE_NAMES, TensorSpec, raw_bytes, write_safetensors

_BATCH = 32
_WAY = 6.0  # codes that Adam could move one in all steps, if its rate did not fall: about twice what it can
_APART = 0.45  # codes, either way, that they are moved before
_BETAS = (0.9, 0.99)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_LOOKS = 4  # batches that the loss at the start is measured on
_KEPT = 50  # steps between two savings
_WEIGHED = 24  # times that a training looks at how many bytes the codes take
_FULL = 0.9925  # of the bytes at the start: what the price is to bring about
_GAIN = 8  # power of what the codes will take, as a share of that, by which the price changes
_AHEAD = 2  # looks: what they will take goes on changing as it did since the last look
_MOST = 2.0  # by which the price changes at most, either way
_LAST = 0.85  # of the steps; then the price falls no more
_TRIES = 3  # each beginning at twice the price, until the pack is not larger
_COPIES = 16  # of the weights, that training needs memory for: codes and what Adam keeps of them are float32


def distill_job(job: Job, parts: Sequence[Compressed], rows: Sequence[Prompt]) -> list[Compressed]:
    """Return what `encode_job` gave with trained codes; all together take no more bytes than before.

    Matrices that transformers stacks or splits when it loads them (the experts of a layer) keep their codes.

    Args:
        job: its options say for how many steps.
        parts: of the strategy `auto`.
        rows: conversations to train on; what models say is compared at the tokens of answers, where there are any.

    Raises:
        CompressionError: there are no rows, the model is too large to be trained, or the steps are too few.
        CheckpointError: transformers cannot load the model or its tokenizer.
    """
    units = {part.name: replace(part.unit, kind="distill") for part in parts if _is_coded(part)}
    if any(not unit.file(job).exists() for unit in units.values()):
        codes = _trained(job, parts, rows)
        for part in parts:
            if part.name in units:
                operator, payload, error = part.facts.operator, part.payload, part.facts.error
                if part.name in codes and not overflows(job, part.name, *codes[part.name]):
                    operator, payload = codes[part.name]
                    base, change = job.delta.pair(part.name)[0], job.delta[part.name]
                    error = frobenius(operator.delta(payload, base) - change) / frobenius(change)
                write_code(job, units[part.name], operator, payload, error)
    return [found_code(job, units[part.name]) if part.name in units else part for part in parts]


def check_distillable(job: Job, rows: Sequence[Prompt]) -> None:
    """Check what can be checked before anything is coded; arguments and errors are those of `distill_job`."""
    check_language_model(job.delta.tuned, asked="distill", mend="Leave it out.")
    _to_train_on(job, load_tokenizer(job.delta.tuned.path), rows)


def _to_train_on(job: Job, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Prompt]) -> list[Answered]:
    """Return tokens of the rows, and from where on they are compared."""
    found = [row for row in answered(tokenizer, rows) if len(row[0]) > 1]
    if not found:
        raise CompressionError(
            "distill: codes are trained on calibration rows, but there are none. Give some (--calibration), best "
            "all that the model was tuned on."
        )
    tuned = job.delta.tuned
    if not fits_in_memory(tuned, resolve_device(job.device), copies=_COPIES):
        raise CompressionError(
            f"distill: codes are trained with {_COPIES} times the model's {tuned.nbytes / 1e9:.1f} GB in memory, "
            "which is more than there is. Leave it out, or take a larger device."
        )
    return found


def _is_coded(part: Compressed) -> bool:
    return isinstance(part.facts.operator, MatrixCode)


def _trained(
    job: Job, parts: Sequence[Compressed], rows: Sequence[Prompt]
) -> Mapping[str, tuple[MatrixCode, np.ndarray]]:
    """Return operators and payloads by parameter; nothing where there is nothing to gain."""
    student = _Student(job, parts, rows)
    start = student.loss_at_start() if student.matrices else 0.0
    if start <= 0:
        return {}
    for attempt in range(student.attempt, _TRIES):
        student.train(attempt, 2**attempt * 3 * start / (8 * student.room))
        if student.nbytes() <= student.room:
            return {matrix.part.name: matrix.recoded() for matrix in student.matrices}
    raise CompressionError(
        f"distill: after {_TRIES} trainings of {job.options.distill} steps the codes still take more bytes than "
        "rounding left them. Take more steps, or leave it out."
    )


@dataclass
class _Matrix:
    """A parameter whose codes are trained.

    Attributes:
        part: how it is coded.
        operator: of the part.
        live: its name in the model.
        base: its base value, on the device and in the dtype of the model.
    """

    part: Compressed
    operator: MatrixCode
    live: str
    base: Tensor

    def __post_init__(self) -> None:
        shape = matrix_shape(tuple(self.base.shape))
        self.shape = (shape[1], shape[0]) if self.operator.transposed else shape
        levels, device = self.operator.levels(self.part.payload, self.shape), self.base.device
        self.levels = [replace(one, rows=one.rows.to(device), columns=one.columns.to(device)) for one in levels]
        self.start()

    def start(self) -> None:
        """Put the codes to where rounding left them.

        Within what rounds to the same: of codes that start at the same place many cross a threshold in the same step.
        """
        draw = torch.Generator().manual_seed(zlib.crc32(self.live.encode()))
        self.codes = [
            (torch.from_numpy(one.codes).float() + _APART * (2 * torch.rand(one.codes.shape, generator=draw) - 1))
            .to(self.base.device)
            .requires_grad_()
            for one in self.levels
        ]

    def bits(self) -> Tensor:
        """Return about how many bits the codes take, up to a constant."""
        each = zip(self.codes, self._bits_each, strict=True)
        return torch.stack([(codes.abs() * bits).sum() for codes, bits in each]).sum()

    @cached_property
    def _bits_each(self) -> list[Tensor]:
        """What a code that is one further from 0 takes, by rows: log2((1 + m) / m), m being their mean magnitude."""
        means = [np.abs(one.codes).mean(axis=1).clip(1 / max(1, one.codes.shape[1])) for one in self.levels]
        return [torch.from_numpy(np.log2(1 + 1 / mean)).to(self.base.device).float()[:, None] for mean in means]

    def value(self) -> Tensor:
        """Return base + delta."""
        rounded = [codes + (codes.round() - codes).detach() for codes in self.codes]
        matrix = self.operator.joined([one.values(codes) for one, codes in zip(self.levels, rounded, strict=True)])
        matrix = matrix.T if self.operator.transposed else matrix
        return (self.base.float() + matrix.reshape(self.base.shape)).to(self.base.dtype)

    def recoded(self) -> tuple[MatrixCode, np.ndarray]:
        """Return operator and payload with the codes as they are now."""
        codes = [codes.detach().round().to(torch.int32).cpu().numpy() for codes in self.codes]
        return self.operator.recoded(self.part.payload, self.shape, codes)


@dataclass(frozen=True)
class _At:
    """How far a training is: its number, steps, the price, and the share of the room filled at the last look."""

    attempt: int
    step: int
    price: float
    share: float


def _correction(share: float, before: float, falls: bool) -> float:
    """Return by what the price is to be multiplied, so that the codes fill the room.

    Args:
        share: of the room that they fill.
        before: what they filled at the look before this one.
        falls: whether it may fall.
    """
    foreseen = max(0.0, share + _AHEAD * (share - before))
    return min(max((foreseen / _FULL) ** _GAIN, 1 / _MOST if falls else 1.0), _MOST)


class _Student:
    """The tuned model, which teaches, and what the packed one has in place of its weights."""

    def __init__(self, job: Job, parts: Sequence[Compressed], rows: Sequence[Prompt]) -> None:
        tuned, self.steps = job.delta.tuned, job.options.distill or 0
        self.tokenizer = load_tokenizer(tuned.path)
        self.rows = _to_train_on(job, self.tokenizer, rows)
        self.model: PreTrainedModel = load_model(tuned.path, device=job.device)
        self.rows = cut(self.rows, MAX_LENGTH, context_length(self.model))
        self.model.requires_grad_(False)
        self.matrices: list[_Matrix] = []
        self.fixed: dict[str, Tensor] = {}  # live parameters that are neither trained nor the tuned model's own
        by_name = {part.name: part for part in parts}
        for binding in bindings(self.model, {name: tuned.specs[name] for name in by_name}):
            own = [by_name[name] for name in binding.stored]
            if any(part.facts.error for part in own):
                self._bind(job, binding, own)
        self.room = sum(matrix.part.facts.nbytes for matrix in self.matrices)
        begun = repr(sorted((part.name, part.facts.payload_digest) for part in parts))
        self._file = job.workspace.directory / f"distilling.{hashlib.sha256(begun.encode()).hexdigest()[:24]}"

    def _bind(self, job: Job, binding: Binding, own: Sequence[Compressed]) -> None:
        """Say what stands for a live parameter that the pack does not restore bit for bit."""
        bases, live = {part.name: job.delta.pair(part.name)[0] for part in own}, named_values(self.model)
        operator = own[0].facts.operator
        if binding.plain and isinstance(operator, MatrixCode):
            name = binding.live[0]
            base = bases[own[0].name].to(live[name])
            self.matrices.append(_Matrix(own[0], operator, name, base))
            return
        values = {part.name: part.encoded.restore(bases[part.name]) for part in own}
        for name, value in binding.to_live(values).items():
            self.fixed[name] = value.to(live[name])

    @torch.no_grad()
    def loss_at_start(self) -> float:
        """Return the loss on a few batches, without bits."""
        return sum(float(self._loss(-1 - number)) for number in range(_LOOKS)) / _LOOKS

    def nbytes(self) -> int:
        """Return the bytes that the codes take as they are now; at the start, `room`."""
        return sum(matrix.recoded()[1].nbytes for matrix in self.matrices)

    @property
    def attempt(self) -> int:
        """The training that was stopped, or the first one."""
        return self._stopped().attempt

    def train(self, attempt: int, price: float) -> None:
        """Train the codes from their start, or from where this attempt was stopped.

        Args:
            attempt: its number.
            price: what a bit counts in the loss, to begin with.
        """
        for matrix in self.matrices:
            matrix.start()
        codes = [codes for matrix in self.matrices for codes in matrix.codes]
        rate = _WAY / self.steps
        optimizer = torch.optim.Adam(codes, lr=rate, betas=_BETAS)
        at = self._stopped()
        if (at.attempt, at.step) > (attempt, 0):
            self._load(codes, optimizer, at.step)
        else:
            at = _At(attempt, 0, price, 1.0)
        price, share = at.price, at.share
        with progress("distilling") as show:
            for step in range(at.step, self.steps):
                if step % max(1, self.steps // _WEIGHED) == 0:
                    before, share = share, self.nbytes() / self.room
                    price *= _correction(share, before, step < _LAST * self.steps)
                optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / self.steps)) / 2
                loss = self._loss(step) + price * torch.stack([matrix.bits() for matrix in self.matrices]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                show(step + 1, self.steps)
                if (step + 1) % _KEPT == 0:
                    self._save(codes, optimizer, _At(attempt, step + 1, price, share))

    def _loss(self, number: int) -> Tensor:
        """Return the loss on a batch, by its number, without bits; divergence is in nats a predicted token."""
        draw = torch.Generator().manual_seed(number % (1 << 32))
        batch = [self.rows[i] for i in torch.randint(len(self.rows), (_BATCH,), generator=draw).tolist()]
        ids, mask = pad([row for row, _ in batch], self.tokenizer, self.model)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "output_hidden_states": True}
        places, seen = predicting(batch, mask), mask.bool()
        with torch.no_grad():
            tuned = cast(Any, self.model)(**inputs)
        weights = self.fixed | {matrix.live: matrix.value() for matrix in self.matrices}
        packed = functional_call(self.model, weights, (), inputs)
        expected, found = (one.logits[places].float().log_softmax(-1) for one in (tuned, packed))
        loss = kl_div(found, expected, reduction="batchmean", log_target=True)
        for ours, theirs in zip(packed.hidden_states or (), tuned.hidden_states or (), strict=True):
            target = theirs[seen].float()
            loss = loss + (ours[seen].float() - target).square().sum() / target.square().sum()
        return loss

    def _stopped(self) -> _At:
        """Return where the last attempt was saved."""
        if not self._file.exists():
            return _At(0, 0, 0.0, 1.0)
        with safe_open(self._file, framework="pt") as file:
            return _At(*json.loads((file.metadata() or {})["at"]))

    def _save(self, codes: Sequence[Tensor], optimizer: torch.optim.Adam, at: _At) -> None:
        tensors = {f"{i}.codes": one.detach().cpu() for i, one in enumerate(codes)}
        for i, one in enumerate(codes):
            tensors |= {f"{i}.{kind}": optimizer.state[one][kind].cpu() for kind in _MOMENTS}
        layout = {name: TensorSpec(DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
        write_safetensors(
            self._file, layout, lambda name: raw_bytes(tensors[name]), metadata={"at": json.dumps(astuple(at))}
        )

    def _load(self, codes: Sequence[Tensor], optimizer: torch.optim.Adam, step: int) -> None:
        with safe_open(self._file, framework="pt") as file:
            for i, one in enumerate(codes):
                one.data.copy_(file.get_tensor(f"{i}.codes"))
                moments = {kind: file.get_tensor(f"{i}.{kind}").to(one.device) for kind in _MOMENTS}
                optimizer.state[one] = moments | {"step": torch.tensor(float(step))}
