"""The delta (task vector): tuned minus base, one parameter at a time, never a whole model.

The two may differ in floating-point dtype and the tuned model may have added vocabulary rows.
`align` brings a base value to the tuned shape and dtype, here and wherever a delta is added back;
it is the one place that knows how.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftllm.checkpoint import Checkpoint, check_opened
from graftllm.companions import Companion, changed_companions
from graftllm.errors import CheckpointError
from graftllm.tensors import DTYPES, LARGE, TensorSpec, raw_bytes, row_blocks

MAX_GROWTH = 8  # a vocabulary may become this many times as long; bounds what a pack can allocate
_BLOCK = 1 << 20  # bytes that are compared at a time
LARGEST = 2.0**48  # of a difference: rows of larger ones may have no norm in float32
_MOST_IDS = 4096  # in a list of token ids
_PART = 1 << 18  # elements that are subtracted at a time: what they take stays in the cache


@dataclass(frozen=True)
class Delta(Mapping[str, Tensor]):
    """A lazy mapping from parameter name to tuned - base in float32.

    Raises:
        CheckpointError: at construction, when the two do not have the same parameters, or shapes or dtypes
            that `align` cannot bring together.
    """

    base: Checkpoint
    tuned: Checkpoint

    def __post_init__(self) -> None:
        check_opened(base=self.base, tuned=self.tuned)
        for name in [*self.base.specs, *self.tuned.specs]:
            self._check(name)

    def __getitem__(self, name: str) -> Tensor:
        """Return tuned - base in float32.

        Raises:
            CheckpointError: the difference holds NaN, infinity or values above 2 ** 48.
        """
        base, tuned = self.pair(name)
        return difference(base, tuned, where=self.where(name))

    def __iter__(self) -> Iterator[str]:
        """Yield the names, `layers.2` before `layers.10`."""
        return iter(self.base.specs)

    def __len__(self) -> int:
        """Return how many parameters the checkpoints have."""
        return len(self.base.specs)

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Output heads that both checkpoints save although they are, bit for bit, their embedding; with its name."""
        others = [name for name in self if not _is_head(name)]
        found = {
            head: _repeated(self.tuned, head, _repeated(self.base, head, others)) for head in self if _is_head(head)
        }
        return {head: same[0] for head, same in found.items() if same}

    @property
    def distinct(self) -> list[str]:
        """The names but for those of `tied`: what there is to be coded."""
        return [name for name in self if name not in self.tied]

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the base value, brought to the tuned shape and dtype, and the tuned value as it is stored."""
        return align(self.base.tensor(name), self.tuned.specs[name]), self.tuned.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return what `pair` does, of some rows (of dimension 0) alone."""
        known, dtype = self.base.specs[name].shape[0], DTYPES[self.tuned.specs[name].dtype]
        base = self.base.rows(name, min(start, known), min(stop, known)).to(dtype)
        return _with_zeros(base, stop - start), self.tuned.rows(name, start, stop)

    def unchanged(self, name: str) -> bool:
        """Return whether base and tuned value have the same bits; a large tensor is read block by block."""
        spec = self.tuned.specs[name]
        if spec.parameters <= LARGE or len(spec.shape) < 2:
            return _same_bits(*self.pair(name))
        return all(_same_bits(*self.rows(name, start, stop)) for start, stop in row_blocks(spec.shape))

    def base_digest(self, name: str) -> str:
        """Return the digest of the base value as it is stored."""
        return self.base.digest(name)

    def where(self, name: str) -> str:
        """Return what an error message about one parameter begins with."""
        return f"{self.tuned.path}: tensor {name!r}"

    def config_changes(self) -> dict[str, Any]:
        """Return vocabulary size and token ids of the tuned `config.json` that are not the base's, by dotted key.

        A vocabulary size is only one where rows were added.

        Raises:
            CheckpointError: one of them is neither an integer, a list of integers nor null.
        """
        base, tuned = dict(_settings(self.base.config)), dict(_settings(self.tuned.config))
        found = {key: value for key, value in tuned.items() if key in base and base[key] != value}
        for key, value in found.items():
            numbers = value if isinstance(value, list) else [value]
            whole = len(numbers) <= _MOST_IDS and all(type(one) is int and abs(one) < 1 << 63 for one in numbers)
            if not whole and value is not None:
                raise CheckpointError(
                    f"{self.tuned.path / 'config.json'}: expected an integer of 64 bits, a list of at most {_MOST_IDS} "
                    f"or null for {key!r}, found {value!r:.60}. Correct it."
                )
        rows = {spec.shape[0] for name, spec in self.tuned.specs.items() if self._grown(name, spec)}
        return {key: value for key, value in found.items() if not key.endswith("vocab_size") or value in rows}

    def companions(self) -> dict[Companion, bytes | None]:
        """Return what stands beside the tuned weights and is not the base's; see `changed_companions`.

        Raises:
            CheckpointError: as there.
        """
        ends = any(key.endswith("eos_token_id") for key in self.config_changes())
        return changed_companions(self.base.path, self.tuned.path, ends_changed=ends)

    def _grown(self, name: str, tuned: TensorSpec) -> bool:
        return name in self.base.specs and self.base.specs[name].shape != tuned.shape

    def _check(self, name: str) -> None:
        base, tuned = self.base.specs.get(name), self.tuned.specs.get(name)
        if base is None or tuned is None:
            lacking, having = (self.base, self.tuned) if base is None else (self.tuned, self.base)
            if _is_head(name) and _repeated(having, name, lacking.specs):
                if base is None:
                    return
                raise CheckpointError(
                    f"{having.path}: saves its embedding once more as {name!r}, to which it is tied, and "
                    f"{lacking.path} does not. Load the base in transformers and save_pretrained() it: that keeps one."
                )
            if _is_head(name):
                raise CheckpointError(
                    f"{lacking.path}: ties the output head to its embedding, but {having.path} has its own, {name!r}. "
                    "A delta needs both tied or both untied; save both with the same tie_word_embeddings."
                )
            raise CheckpointError(
                f"{lacking.path}: has no tensor {name!r}, which {having.path} has. "
                "A delta needs the same parameters on both sides; check that one was trained from the other."
            )
        if base.shape != tuned.shape and not self._grows(base, tuned):
            vocabulary = len(base.shape) == 2 and base.shape[1:] == tuned.shape[1:]
            mend = (
                f"Their vocabularies differ ({_told(self.base)} and {_told(self.tuned)} tokens by config.json); "
                f"a tuned model may only add tokens, at most {MAX_GROWTH} times as many rows in all."
                if vocabulary
                else "They are not the same architecture; check that one was trained from the other."
            )
            raise CheckpointError(
                f"{self.tuned.path}: tensor {name!r} has shape {list(tuned.shape)}, "
                f"but {self.base.path} has {list(base.shape)}. {mend}"
            )
        if not convertible(base.dtype, tuned.dtype):
            raise CheckpointError(
                f"{self.tuned.path}: tensor {name!r} is {tuned.dtype}, but {self.base.path} has {base.dtype}. "
                "Save both in the same dtype, or both in dtypes of F64, F32, F16 and BF16."
            )

    def _grows(self, base: TensorSpec, tuned: TensorSpec) -> bool:
        """Return whether a tensor has one row per token on both sides, and more of them in the tuned model."""
        known = growable(base.shape, tuned.shape)
        return known and base.shape[0] in _rows(self.base) and tuned.shape[0] in _rows(self.tuned)


def align(base: Tensor, tuned: TensorSpec) -> Tensor:
    """Return a base value in the tuned shape and dtype: rounded to nearest, with rows of zeros appended.

    Raises:
        ValueError: the shape has not more rows alone, or the dtype is not of the same kind.
    """
    shape, dtype = tuple(base.shape), DTYPES[tuned.dtype]
    if shape != tuned.shape and not growable(shape, tuned.shape):
        raise ValueError(
            f"expected a shape of {list(shape)} and at most {MAX_GROWTH} times its rows, found {tuned.shape}"
        )
    value = base.to(dtype)
    return value if shape == tuned.shape else _with_zeros(value, tuned.shape[0])


def _with_zeros(value: Tensor, rows: int) -> Tensor:
    """Return a value with rows of zeros appended up to a number of rows."""
    return value if len(value) == rows else torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])])


def _same_bits(base: Tensor, tuned: Tensor) -> bool:
    left, right = raw_bytes(base), raw_bytes(tuned)
    blocks = range(0, left.nbytes, _BLOCK)  # most tensors differ in the first one
    return all(np.array_equal(left[at : at + _BLOCK], right[at : at + _BLOCK]) for at in blocks)


def growable(base: tuple[int, ...], tuned: tuple[int, ...]) -> bool:
    """Return whether one shape is the other with rows added, within bounds."""
    return len(base) == len(tuned) > 0 and base[1:] == tuned[1:] and base[0] < tuned[0] <= MAX_GROWTH * base[0]


def convertible(base: str, tuned: str) -> bool:
    """Return whether a base value can be brought to the tuned dtype: the same, or both floating-point."""
    return base == tuned or {base, tuned} <= {"F64", "F32", "F16", "BF16"}


def difference(base: Tensor, tuned: Tensor, *, where: str) -> Tensor:
    """Return tuned - base in float32.

    Raises:
        CheckpointError: it holds NaN, infinity or values above 2 ** 48; the message begins with `where`.
    """
    delta = torch.empty(tuned.shape, dtype=torch.float32, device=tuned.device)
    parts = (delta.view(-1), tuned.reshape(-1), base.reshape(-1))
    for part, after, before in zip(*(flat.split(_PART) for flat in parts), strict=True):
        part.copy_(after).sub_(before.float())
    if not _is_sane(delta):
        count = int((~(delta.abs() <= LARGEST)).sum())
        raise CheckpointError(
            f"{where}: {count} of {delta.numel()} differences to the base are NaN, infinite or above 2 ** 48. "
            "The training diverged or a file is damaged; pack an earlier checkpoint."
        )
    return delta


def check_difference(base: Tensor, tuned: Tensor, *, where: str) -> None:
    """Refuse what `difference` refuses, in little memory; but what is the same on both sides may be any value.

    Raises:
        CheckpointError: as there.
    """
    parts = zip(tuned.reshape(-1).split(_PART), base.reshape(-1).split(_PART), strict=True)
    for after, before in ((after.float(), before.float()) for after, before in parts):
        if not _is_sane(after - before):
            same = (after == before) | (after.isnan() & before.isnan())
            if not _is_sane((after - before).masked_fill(same, 0)):
                difference(base, tuned, where=where)  # which counts them


def _is_sane(delta: Tensor) -> bool:
    return not delta.numel() or all(abs(float(end)) <= LARGEST for end in delta.aminmax())  # NaN is both ends


def is_setting(key: str) -> bool:
    """Return whether a config key (dotted where it is nested) may differ between base and tuned model."""
    last = key.rpartition(".")[2]
    return last == "vocab_size" or last.endswith(("_token_id", "_token_ids"))


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        elif is_setting(key):
            yield f"{prefix}{key}", value


def _is_head(name: str) -> bool:
    return any(word in name for word in ("lm_head", "embed_out", "output_layer"))


def _repeated(checkpoint: Checkpoint, head: str, names: Iterable[str]) -> list[str]:
    """Return those of some names whose tensors an output head is once more, bit for bit: it is tied, but saved."""
    spec = checkpoint.specs[head]
    if not spec.shape or spec.shape[0] not in _rows(checkpoint):
        return []

    def is_same(name: str) -> bool:
        pairs = ((checkpoint.rows(one, *block) for one in (head, name)) for block in row_blocks(spec.shape))
        return all(_same_bits(*pair) for pair in pairs)

    return [name for name in names if checkpoint.specs.get(name) == spec and is_same(name)]


def _rows(checkpoint: Checkpoint) -> list[Any]:
    """Return how many tokens a model knows, by its config; one that also hears or sees may tell of several kinds."""
    return [value for key, value in _settings(checkpoint.config) if key.endswith("vocab_size")]


def _told(checkpoint: Checkpoint) -> str:
    return " or ".join(map(str, _rows(checkpoint))) or "None"
