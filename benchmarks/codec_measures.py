"""One fine-tune as a yardstick: what a compressed delta of it costs and loses.

A base model stays loaded in float32; the weights that a method restores are put into it in the
checkpoint's dtype, measured, and taken out again. Everything expensive waits until it is asked for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from codec_distill import distill_gains
from codec_models import Subject
from torch import Tensor
from transformers import PreTrainedModel

from graftllm.checkpoint import Checkpoint
from graftllm.compression.calibration import collect_moments
from graftllm.compression.exact import encode_exact
from graftllm.compression.measures import Measures
from graftllm.compression.sensitivity import measure_sensitivity
from graftllm.delta import Delta
from graftllm.evaluation.scores import evaluate
from graftllm.generation import generate
from graftllm.live import bindings
from graftllm.loading import load_model, load_tokenizer
from graftllm.recipe import SamplingOptions
from graftllm.records import Prompt, read_prompts
from graftllm.rendering import pad, render_answered

PROMPTS = 200  # held-out prompts that KL and score are measured on
_BATCH = 100
_GREEDY = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=16, batch_size=200)
_LONG = _GREEDY.model_copy(update={"max_new_tokens": 80})  # answers to sentences


@dataclass(frozen=True)
class Loss:
    """What is lost when decoded deltas stand for the true one.

    Attributes:
        relative_error: ||D' - D|| / ||D|| over all parameters.
        calibrated_error: tr(E H E^T) / tr(D H D^T), both summed over the matrices that have an H.
        kl: mean KL(tuned || restored) in nats per token of the held-out answers.
        top1_agreement: share of those tokens where both find the same one most probable.
        score: share of held-out prompts that the restored model answers right.
    """

    relative_error: float
    calibrated_error: float
    kl: float
    top1_agreement: float
    score: float


class Yardstick:
    """A subject, opened lazily."""

    def __init__(self, subject: Subject, prompts: int = PROMPTS) -> None:
        """Take a subject, and how many of its test prompts to measure on."""
        self.subject = subject
        self.prompts = prompts

    @cached_property
    def delta(self) -> Delta:
        """Tuned - base, on disk."""
        return Delta(Checkpoint.open(self.subject.base), Checkpoint.open(self.subject.tuned))

    @cached_property
    def changes(self) -> Mapping[str, Tensor]:
        """The delta in memory, float32."""
        return {name: self.delta[name] for name in self.delta}

    @cached_property
    def matrices(self) -> Mapping[str, Tensor]:
        """The deltas of all matrices."""
        return {name: change for name, change in self.changes.items() if change.ndim == 2 and min(change.shape) > 1}

    @cached_property
    def vectors(self) -> Mapping[str, Tensor]:
        """The deltas of everything else."""
        return {name: change for name, change in self.changes.items() if name not in self.matrices}

    @cached_property
    def vector_sizes(self) -> Mapping[str, int]:
        """The bytes of everything else, exact, by the library's own code."""
        return {name: encode_exact(*self.delta.pair(name))[1].nbytes for name in self.vectors}

    @cached_property
    def rows(self) -> Sequence[Prompt]:
        """What it was tuned on."""
        return read_prompts(self.subject.rows)

    @cached_property
    def moments(self) -> Mapping[str, Tensor]:
        """Second moments of the inputs by parameter; a tied embedding gets its head's."""
        found = dict(collect_moments(self.subject.tuned, self.rows).moments)
        if "lm_head.weight" in found and "lm_head.weight" not in self.delta:
            found["model.embed_tokens.weight"] = found["lm_head.weight"]
        return {name: found[name] for name in found if name in self.matrices}

    @cached_property
    def measures(self) -> Measures:
        """What the library measures of the tuned model before it packs."""
        sensitivity, weights = measure_sensitivity(self.subject.tuned, self.rows, device="cpu")
        return Measures(collect_moments(self.subject.tuned, self.rows, weights=weights), sensitivity)

    def distilled(self, decoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return decoded deltas of matrices with one trained gain each, as BitDelta does."""
        self._put(self.changes)  # norms and the like are exact
        return distill_gains(self._model, self._tuned, self._tokenizer, self.rows, self._base, decoded)

    def measure(self, decoded: Mapping[str, Tensor], restored: Callable[[str], Tensor] | None = None) -> Loss:
        """Put restored weights into the live base and compare it with the tuned model.

        Args:
            decoded: every parameter's delta, float32.
            restored: gives a parameter in the checkpoint's dtype; base + delta by default.
        """
        self._put(decoded, restored)
        kl, agreement = self._divergence(self._log_probabilities(self._model))
        return Loss(
            relative_error=math.sqrt(_ratio(decoded, self.changes, {})),
            calibrated_error=_ratio(decoded, {name: self.changes[name] for name in self.moments}, self.moments),
            kl=kl,
            top1_agreement=agreement,
            score=self._score(self._model),
        )

    def ends(self) -> Mapping[str, float]:
        """Return the scores of base and tuned model, and the base's KL to the tuned model."""
        nothing = self.measure({name: torch.zeros_like(change) for name, change in self.changes.items()})
        everything = self.measure(self.changes)
        return {"base": nothing.score, "base_kl": nothing.kl, "tuned": everything.score, "tuned_kl": everything.kl}

    @cached_property
    def _base(self) -> Mapping[str, Tensor]:
        return {name: self.delta.pair(name)[0] for name in self.delta}  # with rows for added tokens

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_model(self.subject.tuned, device="cpu")  # its shapes; the weights are put into it

    @cached_property
    def _test(self) -> Sequence[Prompt]:
        return read_prompts(self.subject.test)[: self.prompts]

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.subject.tuned)

    @cached_property
    def _expected(self) -> Tensor:
        return self._log_probabilities(self._tuned)

    @cached_property
    def _tuned(self) -> PreTrainedModel:
        return load_model(self.subject.tuned, device="cpu")

    @torch.inference_mode()
    def _log_probabilities(self, model: PreTrainedModel) -> Tensor:
        """Return the model's prediction of each answer token, shape (tokens, vocabulary), float64."""
        answered = [render_answered(self._tokenizer, prompt) for prompt in self._test]
        found = []
        for start in range(0, len(answered), _BATCH):
            batch = answered[start : start + _BATCH]
            ids, mask = pad([row for row, _ in batch], self._tokenizer, model, "left")
            logits = cast(Any, model)(input_ids=ids, attention_mask=mask, use_cache=False).logits
            width = ids.shape[1]
            found += [logits[i, width - len(row) + first - 1 : width - 1] for i, (row, first) in enumerate(batch)]
        return torch.cat(found).double().log_softmax(1)

    @torch.no_grad()
    def _put(self, decoded: Mapping[str, Tensor], restored: Callable[[str], Tensor] | None = None) -> None:
        def value(name: str) -> Tensor:
            base = self._base[name]
            return (base.float() + decoded[name]).to(base.dtype) if restored is None else restored(name)

        for binding in bindings(self._model, self.delta.tuned.specs):  # experts are stacked in the live model
            for live, made in binding.to_live({name: value(name) for name in binding.stored}).items():
                self._model.get_parameter(live).copy_(made)

    def _divergence(self, found: Tensor) -> tuple[float, float]:
        expected = self._expected
        kl = float((expected.exp() * (expected - found)).sum() / len(found))
        return max(kl, 0.0), float((expected.argmax(1) == found.argmax(1)).double().mean())

    def _score(self, model: PreTrainedModel) -> float:
        def answer(prompts: Sequence[Prompt]) -> list[str]:
            questions, options = (
                [prompt.question for prompt in prompts],
                _LONG if self.subject.target == "large" else _GREEDY,
            )
            return [texts[0] for texts in generate(model, self._tokenizer, questions, options)]

        return evaluate(answer, self._test, "exact").value


def squared_norm(matrix: Tensor, moments: Tensor | None) -> float:
    """Return tr(M H M^T), or the squared norm where there is no H."""
    return float((matrix * (matrix if moments is None else matrix @ moments)).sum(dtype=torch.float64))


def _ratio(decoded: Mapping[str, Tensor], delta: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> float:
    error = sum(squared_norm(decoded[name] - delta[name], moments.get(name)) for name in delta)
    return error / sum(squared_norm(delta[name], moments.get(name)) for name in delta)
