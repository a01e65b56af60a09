"""Voices: how a model is spoken to, and which tokens end its answer. A pack may bring one of its own.

A fine-tune with another tokenizer, chat template or end token than its base answers badly when it is
asked in the base's. What its pack holds of these makes a voice; all other packs have the base's.
"""

import json
import shutil
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.checkpoint import Checkpoint
from graftllm.companions import GENERATION, TOKENIZER, put_companions
from graftllm.errors import CheckpointError, PackError
from graftllm.fusion.grafts import rows_without_packs
from graftllm.fusion.routes import BASE
from graftllm.loading import load_tokenizer
from graftllm.rendering import ends_of, input_embedding
from graftllm.skillpack import SkillPack

_ENDS = ("eos_token_id", "text_config.eos_token_id")
_MOST_ENDS = 4096
_NO_LIMIT = 1 << 62  # rows of a model that is fed by no embedding


@dataclass(frozen=True, eq=False)
class Voice:
    """A tokenizer with its chat template, the tokens that end an answer, and how many tokens the model has rows for."""

    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    rows: int


class Voices:
    """The voices of a base and its packs, loaded when they are first asked for; packs with equal ones share one."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, packs: Mapping[str, SkillPack]
    ) -> None:
        """Load nothing yet.

        Args:
            model: the live base.
            tokenizer: the base's; where it was loaded from a directory, packs change what that holds.
            packs: by name.
        """
        words = input_embedding(model)
        rows, self._width = _NO_LIMIT, 0
        if isinstance(words, nn.Embedding):  # somebody may be using a pack now
            rows, self._width = rows_without_packs(model, words.weight), words.weight.shape[1]
        self.base = Voice(tokenizer, ends_of(model, tokenizer), rows)
        self._model, self._packs = model, packs
        self._tokenizers: dict[Any, PreTrainedTokenizerBase] = {}
        self._found: dict[Any, Voice] = {}
        self._of: dict[str, Voice] = {}

    def of_others(self, packs: Mapping[str, SkillPack]) -> "Voices":
        """Return the voices of the same base and other packs; tokenizers that these need, too, are not loaded again."""
        voices = copy(self)
        voices._packs, voices._of = packs, {}
        needed = {_told(pack) for pack in packs.values()}
        voices._tokenizers = {key: one for key, one in self._tokenizers.copy().items() if key in needed}
        kept = [self.base.tokenizer, *voices._tokenizers.values()]
        found = self._found.copy().items()
        voices._found = {key: one for key, one in found if any(one.tokenizer is words for words in kept)}
        return voices

    def __getitem__(self, name: str) -> Voice:
        """Return the voice of a pack; that of the base for any other name.

        Raises:
            PackError: what the pack holds makes none.
        """
        if name not in self._packs:
            return self.base
        if name not in self._of:
            self._of[name] = self._voice(self._packs[name])
        return self._of[name]

    def of(self, weights: Mapping[str, float]) -> Voice:
        """Return the voice of several packs at once: that of the strongest."""
        return self[max(weights, key=lambda name: abs(weights[name]), default=BASE)]

    def _voice(self, pack: SkillPack) -> Voice:
        tokenizer = self._tokenizer(pack)
        ends = _own_ends(self._model, tokenizer, self.base.tokenizer, pack)
        entries = pack.header.tensors.values()
        grown = [one.tuned_shape[0] for one in entries if one.tuned_shape and one.shape[1:] == (self._width,)]
        rows = max([self.base.rows, *grown])
        key = (id(tokenizer), ends, rows)
        if key == (id(self.base.tokenizer), self.base.ends, self.base.rows):
            return self.base
        return self._found.setdefault(key, Voice(tokenizer, ends, rows))

    def _tokenizer(self, pack: SkillPack) -> PreTrainedTokenizerBase:
        if not (key := _told(pack)):
            return self.base.tokenizer
        if key not in self._tokenizers:
            self._tokenizers[key] = _own_tokenizer(self._model.config.to_json_string(), self.base.tokenizer, pack)
        return self._tokenizers[key]


def check_voice(base: Checkpoint, pack: SkillPack) -> None:
    """Check that a pack has no voice of its own, or one that can be used with its base.

    Raises:
        PackError: its tokenizer does not load, or it names no end tokens.
        CheckpointError: the base's tokenizer does not load.
    """
    if pack.header.companions.keys() & set(TOKENIZER):
        _own_tokenizer((base.path / "config.json").read_text(encoding="utf-8"), load_tokenizer(base.path), pack)
    if (content := pack.companion(GENERATION)) is not None:
        _told_ends(content, pack.source)


def _told(pack: SkillPack) -> tuple[Any, ...]:
    """Return what a pack's tokenizer is known by: its files' names and digests; nothing where it has the base's."""
    files = pack.header.companions.items()
    return tuple((name, one and one.digest) for name, one in files if name in TOKENIZER)


def _own_tokenizer(config: str, tokenizer: PreTrainedTokenizerBase, pack: SkillPack) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer with a pack's files in the place of its own, beside the `config.json` of both."""
    with TemporaryDirectory(prefix="voice-") as scratch:
        home = Path(scratch)
        for file in TOKENIZER:
            if (_home(tokenizer) / file).is_file():
                shutil.copyfile(_home(tokenizer) / file, home / file)
        if not list(home.iterdir()):
            tokenizer.save_pretrained(scratch)
        (home / "config.json").write_text(config, encoding="utf-8")
        put_companions({name: pack.companion(name) for name in pack.header.companions if name in TOKENIZER}, home)
        try:
            own = load_tokenizer(scratch)
        except CheckpointError as error:
            told = str(error).partition("tokenizer")[2]
            raise PackError(f"{pack.source}: its tokenizer does not load{told}") from error
    own.name_or_path = Path(pack.source).name
    return own


def _home(tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return the directory that a tokenizer was loaded from; one that is not there if it was from elsewhere."""
    return Path(tokenizer.name_or_path or "nowhere")


def _own_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase, pack: SkillPack
) -> tuple[int, ...]:
    """Return the tokens that end a pack's answers, as transformers would take them from the tuned model's files."""
    if (content := pack.companion(GENERATION)) is not None:
        return _told_ends(content, pack.source) or ends_of(None, tokenizer)
    config = pack.header.config
    changed = next((config[key] for key in _ENDS if config.get(key) is not None), None)
    home = _home(base)
    hidden = (home / GENERATION).exists() if home.is_dir() else not _is_derived(model)
    if changed is not None and (GENERATION in pack.header.companions or not hidden):
        return changed if isinstance(changed, tuple) else (changed,)
    return ends_of(model, tokenizer)


def _is_derived(model: PreTrainedModel) -> bool:
    """Return whether the model's generation config was made of its config, as where it had none of its own."""
    return bool(getattr(model.generation_config, "_from_model_config", False))


def _told_ends(content: bytes, source: str) -> tuple[int, ...]:
    """Return the end tokens that a generation config tells of; none where it tells of none."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        told = None
    ends = told.get("eos_token_id") if isinstance(told, dict) else "none"
    numbers: list[Any] = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if len(numbers) > _MOST_ENDS or not all(type(one) is int and 0 <= one < 1 << 31 for one in numbers):
        raise PackError(f"{source}: expected {GENERATION} to hold end tokens by number, found others; pack it again.")
    return tuple(numbers)
