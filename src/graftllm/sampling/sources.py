"""A source: conversations in, several answers each out.

A source shares nothing with the target but text, so any causal language model will do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.generation import generate, load_model, load_tokenizer
from graftllm.recipe import SamplingOptions
from graftllm.records import Message


class Source(Protocol):
    """Whatever can answer; `name` is what its responses are filed under."""

    @property
    def name(self) -> str:
        """The source's name, the same whenever it is opened."""
        ...

    def answer(
        self, conversations: Sequence[Sequence[Message]], options: SamplingOptions, *, seed: int
    ) -> list[list[str]]:
        """Return `options.samples` answers per conversation; the same seed gives the same answers."""
        ...


@dataclass(frozen=True)
class LocalSource:
    """A transformers checkpoint on this machine."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def answer(
        self, conversations: Sequence[Sequence[Message]], options: SamplingOptions, *, seed: int
    ) -> list[list[str]]:
        """Return `options.samples` answers per conversation; the same seed gives the same answers."""
        return generate(self.model, self.tokenizer, conversations, options, seed=seed)


def open_source(path: str, *, device: str = "auto") -> Source:
    """Load a source by directory or Hub id; its name is the last part of that.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    return LocalSource(path.rstrip("/").split("/")[-1], load_model(path, device=device), load_tokenizer(path))
