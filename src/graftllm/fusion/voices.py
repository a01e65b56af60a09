"""Voices: how a model is spoken to, and which tokens end its answer. A pack may bring one of its own.

A fine-tune with another tokenizer, chat template or end token than its base answers badly when it is
asked in the base's. What its pack holds of these makes a voice; all other packs have the base's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.companions import GENERATION, TOKENIZER, Companions, put_companions
from graftllm.errors import CheckpointError, PackError
from graftllm.fusion.routes import BASE
from graftllm.loading import load_tokenizer
from graftllm.rendering import ends_of
from graftllm.skillpack import SkillPack

_ENDS = ("eos_token_id", "text_config.eos_token_id")


@dataclass(frozen=True, eq=False)
class Voice:
    """A tokenizer with its chat template, and the tokens that end an answer."""

    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]


class Voices:
    """The voices of a base and its packs, loaded when they are first asked for; packs with equal files share one."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, packs: Mapping[str, SkillPack]
    ) -> None:
        """Load nothing yet.

        Args:
            model: the live base.
            tokenizer: the base's.
            packs: by name.
        """
        self.base = Voice(tokenizer, ends_of(model, tokenizer))
        self._model, self._packs = model, packs
        self._found: dict[Any, Voice] = {}

    def __getitem__(self, name: str) -> Voice:
        """Return the voice of a pack; that of the base for any other name.

        Raises:
            PackError: what the pack holds makes none.
        """
        key = self._key(name)
        if key is None:
            return self.base
        if key not in self._found:
            self._found[key] = _own_voice(self._model, self.base, self._packs[name])
        return self._found[key]

    def of(self, weights: Mapping[str, float]) -> Voice:
        """Return the voice of several packs at once: that of the strongest."""
        return self[max(weights, key=lambda name: abs(weights[name]), default=BASE)]

    @property
    def own(self) -> list[str]:
        """The packs that have another voice than the base."""
        return [name for name in self._packs if self._key(name) is not None]

    def _key(self, name: str) -> Any:
        """Return what a pack's voice depends on; None where it is the base's."""
        if name not in self._packs:
            return None
        header = self._packs[name].header
        files = tuple((file, one and one.digest) for file, one in header.companions.items())
        ends = tuple((key, header.config[key]) for key in _ENDS if key in header.config)
        return (files, ends) if files or ends else None


def _own_voice(model: PreTrainedModel, base: Voice, pack: SkillPack) -> Voice:
    companions, tokenizer = pack.companions(), base.tokenizer
    if companions.keys() & set(TOKENIZER):
        tokenizer = _own_tokenizer(model, base.tokenizer, companions, pack.source)
    config = pack.header.config
    if (content := companions.get(GENERATION)) is not None:
        return Voice(tokenizer, _told_ends(content, pack.source) or ends_of(None, tokenizer))
    changed = next((config[key] for key in _ENDS if config.get(key) is not None), None)
    if changed is not None and getattr(model.generation_config, "_from_model_config", False):
        return Voice(tokenizer, changed if isinstance(changed, tuple) else (changed,))
    return Voice(tokenizer, ends_of(model, tokenizer))


def _own_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, companions: Companions, source: str
) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer with a pack's files in the place of its own."""
    with TemporaryDirectory(prefix="voice-") as scratch:
        tokenizer.save_pretrained(scratch)
        model.config.to_json_file(Path(scratch) / "config.json")
        put_companions(companions, Path(scratch))
        try:
            own = load_tokenizer(scratch)
        except CheckpointError as error:
            raise PackError(f"{source}: its tokenizer does not load{str(error).partition('tokenizer')[2]}") from error
    own.name_or_path = source
    return own


def _told_ends(content: bytes, source: str) -> tuple[int, ...]:
    """Return the end tokens that a generation config tells of; none where it tells of none."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        told = None
    ends = told.get("eos_token_id") if isinstance(told, dict) else "none"
    numbers: list[Any] = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(one) is int for one in numbers):
        raise PackError(f"{source}: expected {GENERATION} to hold end tokens by number, found others; pack it again.")
    return tuple(numbers)
