"""How faithful a pack is to the fine-tune that it replaces.

KL divergence of the packed model's next-token distribution from the tuned model's, agreement of
the most probable token, how probable both find the expected answers, and the relative error of the
weights by role. One model is in memory at a time: the tuned model's distributions wait in a
temporary file.
"""

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.adapters import tuned_model
from graftllm.checkpoint import Checkpoint, check_opened
from graftllm.compression.prices import MAX_LENGTH, SEQUENCES
from graftllm.delta import Delta
from graftllm.errors import CheckpointError
from graftllm.fusion.grafting import plug
from graftllm.loading import load_model, load_tokenizer
from graftllm.packing_options import PackOptions
from graftllm.progress import track
from graftllm.records import Prompt, check_rows, read_prompts
from graftllm.rendering import Answered, context_length, cut, pad, render_answered
from graftllm.skillpack import Layer, SkillPack
from graftllm.storage import writing
from graftllm.streaming import check_language_model

ROWS = 512  # prompts that KL is measured on
_LOGITS = 8 << 30  # bytes of the tuned model's logits that are kept in a temporary file; further prompts are left out
FAITHFUL_KL = 0.01  # nats per token; docs/method.md says where these come from
FAITHFUL_TOP1 = 0.99
CLOSE_KL = 0.1
_BATCH, _BATCH_TOKENS = 16, 4096  # the most of both
_TOKENS = 64  # that are compared at a time
_BLOCK = 1 << 22  # values that are compared at a time

Verdict = Literal["faithful", "close", "not faithful"]


@dataclass(frozen=True)
class Fidelity:
    """Distance between tuned and packed model.

    Attributes:
        kl: mean KL(tuned || packed) in nats per token.
        top1_agreement: share of tokens where both find the same one most probable.
        nll_tuned: mean negative log-likelihood of the prompts' answers under the tuned model, nats per token.
        nll_packed: the same under the packed model.
        tokens: how many positions were compared.
    """

    kl: float
    top1_agreement: float
    nll_tuned: float
    nll_packed: float
    tokens: int

    @property
    def verdict(self) -> Verdict:
        """Whether the pack can stand for the tuned model, by fixed thresholds of KL divergence and agreement."""
        if self.kl <= FAITHFUL_KL and self.top1_agreement >= FAITHFUL_TOP1:
            return "faithful"
        return "close" if self.kl <= CLOSE_KL else "not faithful"


def measure_fidelity(
    base: Checkpoint, pack: SkillPack, tuned: Checkpoint, prompts: Sequence[Prompt], *, device: str = "auto"
) -> Fidelity:
    """Compare the packed with the tuned model on the answers of prompts (or, without answers, on the prompts).

    Raises:
        PackError: the pack is damaged or was made for another base.
        CheckpointError: a model or tokenizer cannot be loaded.
        RecordError: the prompts are none.
    """
    check_opened(base=base, tuned=tuned)
    check_rows("prompts", prompts)
    tokenizer = load_tokenizer(tuned.path)
    model = load_model(tuned.path, device=device)
    rendered = cut([render_answered(tokenizer, prompt) for prompt in prompts[:ROWS]], MAX_LENGTH, context_length(model))
    rows = _within([_compared(*row) for row in rendered], _LOGITS // (4 * model.config.get_text_config().vocab_size))
    targets = torch.tensor([token for ids, start in rows for token in ids[start:]])
    with tempfile.TemporaryFile() as file:
        for logits in _logits(model, rows, tokenizer, "tuned model"):
            with writing(Path(tempfile.gettempdir())):
                file.write(logits.numpy().data)
                file.flush()
        del model
        file.seek(0)
        totals = torch.zeros(4, dtype=torch.float64)
        count = 0
        model = load_model(base.path, device=device)
        with plug(model, pack):
            for logits in _logits(model, rows, tokenizer, "packed model"):
                tuned_logits = np.frombuffer(bytearray(file.read(logits.nbytes)), np.float32)
                expected = torch.from_numpy(tuned_logits).view_as(logits)
                here = targets[count : count + len(logits)]
                parts = zip(*(one.split(_TOKENS) for one in (expected, logits, here)), strict=True)
                totals += sum(_distances(*part) for part in parts)
                count += len(logits)
    if not count:
        raise CheckpointError(
            f"{tuned.path}: expected prompts whose answers have tokens to compare, found none in {len(prompts)}. "
            "Give prompts with text in them."
        )
    kl, agreement, nll_tuned, nll_packed = (totals / count).tolist()
    return Fidelity(max(kl, 0.0), agreement, nll_tuned, nll_packed, count)


def _distances(tuned: Tensor, packed: Tensor, targets: Tensor) -> Tensor:
    """Return sums over tokens: KL divergence, agreements, and the negative log-likelihoods of both.

    Args:
        tuned: logits of the tuned model, shape (tokens, vocabulary).
        packed: the same of the packed model.
        targets: the tokens that are there, shape (tokens,).
    """
    log_p, log_q = tuned.double().log_softmax(1), packed.double().log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    agreement = (log_p.argmax(1) == log_q.argmax(1)).sum()
    nll = [-one.gather(1, targets[:, None]).sum() for one in (log_p, log_q)]
    return torch.stack([kl, agreement.double(), *nll])


def divergence_on(
    delta: Delta, rows: Sequence[Prompt], options: PackOptions, *, device: str
) -> Callable[[SkillPack], float] | None:
    """Return a function that measures a pack's KL divergence, on rows that calibration does not see where there are.

    None where the budget asks for no divergence, or there are no rows.

    Raises:
        CheckpointError: the budget asks for one of models that are no language models.
    """
    if options.divergence is None or not rows:
        return None
    check_language_model(delta.base, asked=f"budget: {options.budget}", mend="Give a size, such as 5%.")
    held_out = rows[SEQUENCES:] or rows
    return lambda pack: measure_fidelity(delta.base, pack, delta.tuned, held_out, device=device).kl


@dataclass(frozen=True)
class Verification:
    """What `graftllm verify` found; the later parts need a tuned model and prompts.

    Attributes:
        parameters: how many tensors were checked.
        error_by_role: relative errors of the delta; infinite where the tuned model does not change what the pack does.
        fidelity: distance of the answers.
        layer: the one that was checked, if one was asked for.
        rank: the highest that the pack's linear layers were allowed, if that was limited.
        foreign: a parameter of which the pack keeps every bit, and the tuned model has others: it is not the one that
            the pack was made of.
    """

    parameters: int
    error_by_role: Mapping[str, float] | None = None
    fidelity: Fidelity | None = None
    layer: Layer | None = None
    rank: int | None = None
    foreign: str | None = None

    def figures(self) -> dict[str, Any]:
        """Return what `graftllm verify --json` prints."""
        found: dict[str, Any] = {"intact": True, "parameters": self.parameters}
        if self.error_by_role is not None:
            known = {role: error if error < math.inf else None for role, error in self.error_by_role.items()}
            found |= {"error_by_role": known, "foreign": self.foreign}
        if self.fidelity is not None:
            found |= asdict(self.fidelity) | {"verdict": self.fidelity.verdict}
        return found

    def sentences(self) -> list[str]:
        """Return the findings, a line each."""
        what = f"{self.layer} layer" if self.layer else "pack"
        lines = [f"The {what} is intact and fits its base: {self.parameters} tensors checked and decoded."]
        if self.error_by_role is not None:
            errors = ", ".join(
                f"{role} {error:.2%}" if error < math.inf else f"{role} infinite (this tuned model does not change it)"
                for role, error in self.error_by_role.items()
            )
            lines.append(f"Relative error of the delta: {errors}.")
        if self.foreign is not None:
            lines.append(
                f"The pack was made of another tuned model: it keeps every bit of {self.foreign}, and this one has "
                "others. Give --tuned that model."
            )
        if self.fidelity is not None:
            found = self.fidelity
            lines += [
                f"Against the tuned model on {found.tokens:,} tokens: KL divergence {found.kl:.5f} nats per token, "
                f"same most probable token for {found.top1_agreement:.2%}.",
                f"Negative log-likelihood of the answers: {found.nll_tuned:.5f} nats per token under the tuned model, "
                f"{found.nll_packed:.5f} under the packed one.",
                f"{_verdict(found)}{'' if self.foreign else _mend(found, self.rank)}",
            ]
        return lines


def _verdict(found: Fidelity) -> str:
    """Return the verdict with the thresholds that decided it."""
    if found.verdict == "faithful":
        return f"Verdict: faithful; KL divergence at most {FAITHFUL_KL}, agreement at least {FAITHFUL_TOP1:.0%}."
    if found.verdict == "not faithful":
        return f"Verdict: not faithful; KL divergence is {found.kl:.5f}, not at most {CLOSE_KL}."
    missed = []
    if found.kl > FAITHFUL_KL:
        missed.append(f"KL divergence is {found.kl:.5f}, not at most {FAITHFUL_KL}")
    if found.top1_agreement < FAITHFUL_TOP1:
        missed.append(f"agreement is {found.top1_agreement:.2%}, not at least {FAITHFUL_TOP1:.0%}")
    return f"Verdict: close, but not faithful; {', and '.join(missed)}."


def _mend(found: Fidelity, rank: int | None) -> str:
    """Return what brings a pack that is not faithful nearer to the model that it was made of."""
    if found.verdict == "faithful":
        return ""
    if rank is not None:
        return f" Its ranks end at {rank}: a larger --servable and a larger budget together bring it nearer."
    if found.verdict == "close":
        return " A larger budget brings it nearer."
    return " If it was made of this model, pack again with a larger budget, calibrated on the skill's own rows."


def verify_pack(
    base: Path,
    pack: Path,
    tuned: Path | None,
    prompts: Path | None,
    *,
    layer: Layer | None = None,
    device: str = "auto",
) -> Verification:
    """Check a pack file, or one layer of it, against its base and, where they are given, a tuned model and prompts.

    Raises:
        PackError: the pack is damaged or was made for another base, or has no such layer.
        CheckpointError: a model cannot be read, or prompts are given without a tuned model or for no language model.
    """
    if prompts is not None and tuned is None:
        raise CheckpointError("--prompts: the answers are compared with those of a tuned model; give --tuned as well.")
    checkpoint, opened = Checkpoint.open(base), SkillPack.load(pack, layer)
    opened.check_base(checkpoint)
    opened.check_companions()
    if prompts is not None:
        check_language_model(
            checkpoint,
            asked="--prompts",
            mend="Leave it out to compare the weights alone; to compare what the models say, write the packed one with "
            "graftllm apply and run both on your own task.",
        )
    if tuned is None:
        for name in track(checkpoint.names(), label="checking"):
            value = checkpoint.tensor(name)
            opened.check_tensor(name, value)
            opened.restore(name, value)
        return Verification(len(checkpoint.specs), layer=layer)
    with tuned_model(tuned, checkpoint, live=prompts is not None) as fine_tune:
        errors = error_by_role(Delta(checkpoint, fine_tune), opened)
        kept = ((name, entry.tuned_digest) for name, entry in opened.header.tensors.items() if entry.tuned_digest)
        foreign = next((name for name, expected in kept if fine_tune.digest(name) != expected), None)
        fidelity = None
        if prompts is not None:
            fidelity = measure_fidelity(checkpoint, opened, fine_tune, read_prompts(prompts), device=device)
    return Verification(len(checkpoint.specs), errors, fidelity, layer, opened.header.options.servable, foreign)


def error_by_role(delta: Delta, pack: SkillPack) -> Mapping[str, float]:
    """Return ||decoded - delta|| / ||delta|| over all parameters of each role; reads every tensor once.

    Of whole numbers each counts as 1 that is not the same.

    Raises:
        PackError: the pack is damaged or was made for another base.
    """
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name in track(list(delta), label="comparing weights"):
        base = delta.base.tensor(name)
        pack.check_tensor(name, base)
        sums = squares[pack.header.tensors[name].role]
        if not base.is_floating_point():
            before, tuned = delta.pair(name)
            sums[0] += int((pack.restore(name, base) != tuned).sum())
            sums[1] += int((before != tuned).sum())
            continue
        decoded = pack.delta(name, base).reshape(-1)
        change = torch.zeros_like(decoded) if delta.unchanged(name) else delta[name].reshape(-1)
        for true, found in zip(change.split(_BLOCK), decoded.split(_BLOCK), strict=True):
            sums[0] += float((found.double() - true).square().sum())
            sums[1] += float(true.double().square().sum())
    return {role: _relative(error, norm) for role, (error, norm) in squares.items()}


def _relative(error: float, norm: float) -> float:
    """Return the root of a ratio of squares; infinity where the tuned model does not differ, but the pack does."""
    return math.sqrt(error / norm) if norm else math.inf if error else 0.0


def _compared(ids: list[int], answer_start: int) -> Answered:
    """Return a row and from where on its tokens are predicted and compared."""
    return ids, answer_start if answer_start < len(ids) else 1


def _batches(rows: Sequence[Answered]) -> list[list[Answered]]:
    """Return rows in batches of few tokens, padding included."""
    batches: list[list[Answered]] = []
    for row in rows:
        longest = max(len(ids) for ids, _ in [*(batches[-1] if batches else []), row])
        if not batches or len(batches[-1]) == _BATCH or (len(batches[-1]) + 1) * longest > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def _within(rows: Sequence[Answered], tokens: int) -> list[Answered]:
    """Return the first rows, those that have at most so many compared tokens together, but one at least."""
    kept: list[Answered] = []
    for ids, first in rows:
        tokens -= len(ids) - first
        if tokens < 0 and kept:
            break
        kept.append((ids, first))
    return kept


@torch.inference_mode()
def _logits(
    model: PreTrainedModel, rows: Sequence[Answered], tokenizer: PreTrainedTokenizerBase, label: str
) -> Iterator[Tensor]:
    """Yield the logits that predict the compared tokens of each batch, shape (tokens, vocabulary), float32 on CPU."""
    for batch in track(_batches(rows), label=label):
        ids, mask = pad([row for row, _ in batch], tokenizer, model)
        logits = cast(Any, model)(input_ids=ids, attention_mask=mask, use_cache=False).logits
        kept = [logits[i, first - 1 : len(row) - 1] for i, (row, first) in enumerate(batch)]
        yield torch.cat(kept).float().cpu()
