"""A source by its options: a transformers checkpoint on this machine, or a model behind a URL.

A source shares nothing with the target but text, so any causal language model will do.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.generation import generate_answers
from graftllm.loading import load_model, load_tokenizer
from graftllm.progress import track
from graftllm.records import Prompt, Response
from graftllm.sampling.endpoint import EndpointSource
from graftllm.sampling.reasoning import without_reasoning
from graftllm.sampling.responses import File, Key, Source
from graftllm.transfer_options import SamplingOptions, SourceOptions


@dataclass(frozen=True)
class LocalSource:
    """A live transformers model."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reasoning: Literal["strip", "keep"] = "strip"

    def answer(
        self, prompts: Sequence[Prompt], done: Collection[Key], options: SamplingOptions, *, seed: int, file: File
    ) -> int:
        """Answer as `Source` says; prompts go in batches, and draws depend on the seed, name and batch."""
        size = options.batch_size
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        missing = [
            (number, batch)
            for number, batch in enumerate(batches)
            if any((prompt.id, sample) not in done for prompt in batch for sample in range(options.samples))
        ]
        for number, batch in track(missing, label=f"sampling {self.name}"):
            draw = int.from_bytes(hashlib.sha256(f"{seed} {self.name} {number}".encode()).digest()[:6], "big")
            conversations = [prompt.question for prompt in batch]
            answers = generate_answers(self.model, self.tokenizer, conversations, options, seed=draw)
            file(
                [
                    Response(
                        prompt.id,
                        self.name,
                        sample,
                        self._kept(answer.text),
                        truncated=answer.truncated,
                        input_tokens=answer.input_tokens if sample == 0 else 0,  # read once for all samples
                        output_tokens=answer.output_tokens,
                    )
                    for prompt, found in zip(batch, answers, strict=True)
                    for sample, answer in enumerate(found)
                    if (prompt.id, sample) not in done
                ]
            )
        return 0

    def _kept(self, text: str) -> str:
        return text if self.reasoning == "keep" else without_reasoning(text)


def open_source(options: SourceOptions, *, device: str = "auto") -> Source:
    """Load a local source, or check that the key of one behind a URL is there.

    Raises:
        CheckpointError: transformers cannot load it, or the options' chat template is none.
        RecipeError: the environment lacks its key.
    """
    if options.url is not None:
        return EndpointSource(options)
    model = load_model(options.model, device=device, device_map=options.device_map)
    tokenizer = load_tokenizer(options.model, chat_template=options.chat_template)
    return LocalSource(options.name, model, tokenizer, options.reasoning)
