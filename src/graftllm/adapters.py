"""A PEFT adapter on a base, read as the checkpoint that merging it would give, one block of rows at a time.

LoRA with its rank and alpha patterns, rsLoRA and DoRA, and modules saved whole. The formulas are those
of PEFT's `merge_and_unload` (arXiv 2106.09685, 2312.03732, 2402.09353), in float32, rounded once.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from graftllm.adapter_settings import CONFIG, MERGE, AdapterSettings, read_settings
from graftllm.checkpoint import Checkpoint, write_checkpoint
from graftllm.companions import TOKENIZER, changed_companions
from graftllm.downloads import download_all, repository
from graftllm.errors import CheckpointError
from graftllm.tensors import DTYPES, TensorSpec, open_shard, row_blocks, tensor_specs

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Product:
    """What is added to one stored tensor: scaling * B A, of the names of A (rank, in) and B (out, rank).

    Attributes:
        turned: the tensor is stored as (in, out).
        magnitude: name of DoRA's norms of the rows (out,), where it has them.
    """

    a: str
    b: str
    scaling: float
    turned: bool
    magnitude: str | None


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """A base with an adapter merged into it, that exists nowhere: tensors are made when they are asked for.

    `path` is the adapter's directory, and `shards` name the file in it.
    """

    base: Checkpoint = field(kw_only=True)
    products: Mapping[str, Product] = field(kw_only=True)
    biases: Mapping[str, tuple[str, float]] = field(kw_only=True)  # stored name -> what is added, and how often
    whole: Mapping[str, str] = field(kw_only=True)  # stored name -> what stands in its place
    rank: int = field(kw_only=True)
    _norms: dict[str, Tensor] = field(kw_only=True, repr=False, default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor of the merged model, in the base's dtype."""
        if name not in self.products:
            return self._simple(name)
        blocks = [self._block(name, *block) for block in row_blocks(self.specs[name].shape)]
        return torch.cat(blocks) if len(blocks) > 1 else blocks[0]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of a tensor; calculated in the same blocks as the whole, so with the same bits."""
        if name not in self.products:
            return self._simple(name)[start:stop] if name in self.whole else self.base.rows(name, start, stop)
        blocks = [(low, high) for low, high in row_blocks(self.specs[name].shape) if low < stop and high > start]
        made = [self._block(name, low, high)[max(start - low, 0) : stop - low] for low, high in blocks]
        return torch.cat(made) if made else self.base.rows(name, 0, 0)

    @property
    def nbytes(self) -> int:
        """Size that the merged weights would have as files, in bytes, without headers."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def files(self) -> list[Path]:
        """The adapter's files and the base's."""
        return [self.path / CONFIG, self.path / WEIGHTS, *self.base.files]

    def _simple(self, name: str) -> Tensor:
        dtype = DTYPES[self.specs[name].dtype]
        value = self._own(self.whole[name]) if name in self.whole else self.base.tensor(name)
        if name in self.biases:
            own, scaling = self.biases[name]
            value = value.float() + scaling * self._own(own).float()
        return value.to(dtype)

    def _own(self, name: str) -> Tensor:
        with open_shard(self.path / WEIGHTS) as file:
            return file.get_tensor(name)

    def _block(self, name: str, start: int, stop: int) -> Tensor:
        value, product = self._added(name, start, stop), self.products[name]
        if product.magnitude is not None:
            if name not in self._norms:
                self._norms[name] = self._row_norms(name)
            factor = self._own(product.magnitude).float().flatten() / self._norms[name]  # (out,)
            value *= factor if product.turned else factor[start:stop, None]
        return value.to(DTYPES[self.specs[name].dtype])

    def _added(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of W + scaling * B A in float32, as they are stored."""
        product = self.products[name]
        a, b = self._own(product.a).float(), self._own(product.b).float()
        low_rank = a[:, start:stop].T @ b.T if product.turned else b[start:stop] @ a
        return self.base.rows(name, start, stop).float().add_(low_rank, alpha=product.scaling)

    def _row_norms(self, name: str) -> Tensor:
        """Return the norm of each row of W + scaling * B A, shape (out,); columns of what is stored turned."""
        blocks, turned = row_blocks(self.specs[name].shape), self.products[name].turned
        squares = [self._added(name, *block).square().sum(0 if turned else 1) for block in blocks]
        return (torch.stack(squares).sum(0) if turned else torch.cat(squares)).sqrt()


@contextmanager
def tuned_model(path: str | Path, base: Checkpoint, *, live: bool) -> Iterator[Checkpoint]:
    """Yield what `open_tuned` gives; where it shall be `live`, as files that transformers can load.

    Raises:
        CheckpointError: as for `open_tuned`.
    """
    opened = open_tuned(path, base)
    if not (live and isinstance(opened, AdaptedCheckpoint)):
        yield opened
        return
    with TemporaryDirectory(prefix="merged-") as scratch:
        out = Path(scratch) / opened.name
        _write_merged(opened, out)
        yield replace(Checkpoint.open(out), made_of=tuple(opened.sources))


def open_tuned(path: str | Path, base: Checkpoint) -> Checkpoint:
    """Open a tuned checkpoint, or a PEFT adapter on `base` as the checkpoint that it makes of it; a Hub id will do.

    Raises:
        CheckpointError: neither is there, it is damaged, or the adapter cannot be merged into this base.
    """
    directory = _located(path)
    return open_adapter(directory, base) if (directory / CONFIG).is_file() else Checkpoint.open(path)


def origin(path: str | Path) -> tuple[str, ...]:
    """Return what a pack's card says of a tuned model that is an adapter; nothing for a checkpoint."""
    directory = _located(path)
    if not (directory / CONFIG).is_file():
        return ()
    settings = read_settings(directory)
    kind = "DoRA" if settings.use_dora else "rsLoRA" if settings.use_rslora else "LoRA"
    name = directory.resolve().name if Path(path).is_dir() else str(path)
    return (f"the PEFT adapter {name} ({kind} of rank {settings.r}), merged",)


def open_adapter(directory: Path, base: Checkpoint) -> AdaptedCheckpoint:
    """Open a directory of PEFT's as the checkpoint that merging it into `base` would give; reads headers only.

    Raises:
        CheckpointError: it is not a whole LoRA adapter, was trained on another model, or does what no change of
            the base's weights can do.
    """
    config = read_settings(directory)
    if not (directory / WEIGHTS).is_file():
        found = sorted(file.name for file in directory.glob("adapter_model*"))
        raise CheckpointError(
            f"{directory}: expected {WEIGHTS}, found {', '.join(found) or 'no weights'}. "
            "Only safetensors is read: load the adapter with PEFT and save_pretrained() it."
        )
    reader = _Reader(directory, base, config, tensor_specs(directory / WEIGHTS))
    specs = dict(base.specs) | {name: reader.replaced(name, own) for name, own in reader.whole.items()}
    if not (config.ensure_weight_tying or reader.tied):
        _check_tied(directory, base, {*reader.products, *reader.whole})
    grown = {specs[name].shape[0] for name in reader.whole if specs[name].shape[0] != base.specs[name].shape[0]}
    return AdaptedCheckpoint(
        directory,
        directory.resolve().name,
        specs,
        dict.fromkeys(specs, WEIGHTS),
        _with_vocabulary(base.config, max(grown)) if grown else base.config,
        base=base,
        products=reader.products,
        biases=reader.biases,
        whole=reader.whole,
        rank=max((reader.found[one.a].shape[0] for one in reader.products.values()), default=0),
    )


class _Reader:
    """Sorts an adapter's tensors by what they do to those of a base."""

    def __init__(
        self, directory: Path, base: Checkpoint, config: AdapterSettings, found: Mapping[str, TensorSpec]
    ) -> None:
        self.directory, self.base, self.config, self.found = directory, base, config, found
        self.products: dict[str, Product] = {}
        self.biases: dict[str, tuple[str, float]] = {}
        self.whole: dict[str, str] = {}
        self.tied = False  # whether a head is there that is the embedding
        self._live: dict[str, str] | None = None
        modules: dict[str, dict[str, str]] = {}
        for own in found:
            place = own.removeprefix("base_model.model.")
            part = re.fullmatch(
                r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|lora_embedding_[AB])(\.weight|\.bias|)", place
            )
            if part is None:
                place = place.replace(".base_layer.", ".")
                if place not in base.specs and self._has_twin(own):
                    self.tied = True
                else:
                    self.whole[self._stored(place)] = own
            else:
                module, kind, last = part.groups()
                bias = ".bias" if last == ".bias" else ""
                modules.setdefault(module, {})[kind.replace("embedding_", "") + bias] = own
        turned = config.fan_in_fan_out or any(self._is_turned(*one) for one in modules.items())
        for module, parts in modules.items():
            self._add(module, parts, turned=turned)

    def replaced(self, name: str, own: str) -> TensorSpec:
        """Return shape and dtype of a tensor that the adapter has whole."""
        spec, shape = self.base.specs[name], self.found[own].shape
        if shape[1:] != spec.shape[1:] or (shape != spec.shape and len(shape) != 2):
            raise self._misfit(own, list(spec.shape), list(shape))
        return TensorSpec(spec.dtype, shape)

    def _add(self, module: str, parts: Mapping[str, str], *, turned: bool) -> None:
        name = self._stored(f"{module}.weight")
        if (
            "lora_A" not in parts
            or "lora_B" not in parts
            or (self.config.use_dora != ("lora_magnitude_vector" in parts))
        ):
            raise CheckpointError(
                f"{self.directory / WEIGHTS}: expected lora_A and lora_B{' and a magnitude' * self.config.use_dora} "
                f"for {module!r}, found {', '.join(sorted(parts))}. The adapter is incomplete; save it again."
            )
        a, b, stored = (*(self.found[parts[key]].shape for key in ("lora_A", "lora_B")), self.base.specs[name].shape)
        rank = self.config.rank(module)
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise self._misfit(parts["lora_A"], f"factors of rank {rank}", f"shapes {list(a)} and {list(b)}")
        embedding = ".lora_embedding_" in parts["lora_A"]
        if stored not in ((b[0], a[1]), (a[1], b[0])) or (embedding and stored != (a[1], b[0])):
            raise self._misfit(parts["lora_A"], f"a layer of shape {list(stored)}", f"one of {[b[0], a[1]]}")
        turned = embedding or stored != (b[0], a[1]) or (turned and a[1] == b[0])
        scaling = self.config.scaling(module)
        magnitude = parts.get("lora_magnitude_vector")
        if magnitude is not None and math.prod(self.found[magnitude].shape) != b[0]:
            raise self._misfit(magnitude, f"{b[0]} numbers", f"shape {list(self.found[magnitude].shape)}")
        self.products[name] = Product(parts["lora_A"], parts["lora_B"], scaling, turned, magnitude)
        if "lora_B.bias" in parts:
            bias = self._stored(f"{module}.bias")
            if self.found[parts["lora_B.bias"]].shape != self.base.specs[bias].shape:
                raise self._misfit(parts["lora_B.bias"], list(self.base.specs[bias].shape), "another shape")
            self.biases[bias] = parts["lora_B.bias"], scaling

    def _is_turned(self, module: str, parts: Mapping[str, str]) -> bool:
        """Return whether the shapes alone say that the base stores this linear layer as (in, out)."""
        a, b = parts.get("lora_A"), parts.get("lora_B")
        if a is None or b is None or ".lora_embedding_" in a:
            return False
        if not (self.found[a].shape and self.found[b].shape):
            return False  # numbers alone, which are refused where they are read
        shape = (self.found[a].shape[-1], self.found[b].shape[0])
        return shape[0] != shape[1] and self.base.specs[self._stored(f"{module}.weight")].shape == shape

    def _has_twin(self, own: str) -> bool:
        """Return whether another tensor of the adapter has the same values: a head that is tied to its embedding."""
        with open_shard(self.directory / WEIGHTS) as file:
            alike = [name for name, spec in self.found.items() if name != own and spec == self.found[own]]
            return any(torch.equal(file.get_tensor(own), file.get_tensor(name)) for name in alike)

    def _stored(self, place: str) -> str:
        """Return the name under which the base stores a parameter of the live model."""
        if place in self.base.specs:
            return place
        if self._live is None:  # rare, so transformers, which takes seconds to import, is asked for here
            from graftllm.live import bindings
            from graftllm.loading import bare_model

            found = bindings(bare_model(self.base.path), self.base.specs)
            self._live = {one.live[0]: one.stored[0] for one in found if one.plain and len(one.live) == 1}
        if place not in self._live:
            raise CheckpointError(
                f"{self.directory / WEIGHTS}: is for {place!r}, but {self.base.path} stores no such tensor. "
                f"Give the base that the adapter was trained on; if this is that, then: {MERGE}"
            )
        return self._live[place]

    def _misfit(self, own: str, expected: Any, found: Any) -> CheckpointError:
        return CheckpointError(
            f"{self.directory / WEIGHTS}: {own!r}: expected {expected}, found {found}. "
            f"The adapter was trained on another model than {self.base.path}, or is damaged."
        )


def _located(path: str | Path) -> Path:
    """Return the directory of a local model, or where the Hub's files of an adapter are."""
    source = repository(str(path))
    return Path(path) if source is None else download_all(source, (CONFIG, WEIGHTS, *TOKENIZER))


def _write_merged(checkpoint: AdaptedCheckpoint, out: Path) -> None:
    """Write the merged checkpoint block by block, with the adapter's tokenizer where it has one."""
    grown = dict(set(_vocabularies(checkpoint.config)) - set(_vocabularies(checkpoint.base.config)))
    write_checkpoint(
        checkpoint.base,
        out,
        checkpoint.tensor,
        specs=checkpoint.specs,
        config=grown,
        companions=changed_companions(checkpoint.base.path, checkpoint.path),
    )


def _check_tied(directory: Path, base: Checkpoint, touched: set[str]) -> None:
    """Refuse to change an embedding that is the head as well: merged, the adapter would act in both places."""
    vocabulary = _vocabulary(base.config)
    found = [name for name, spec in base.specs.items() if len(spec.shape) == 2 and spec.shape[0] == vocabulary]
    if len(found) == 1 and found[0] in touched:
        raise CheckpointError(
            f"{directory}: changes {found[0]!r} alone, which {base.path} uses as the output head as well, so no "
            "checkpoint of this base does what the adapter does. Train it with ensure_weight_tying=True, or on a base "
            "with tie_word_embeddings=False."
        )


def _vocabularies(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield how many tokens a model knows by its config, wherever that says so, with the dotted key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _vocabularies(value, f"{prefix}{key}.")
        elif key == "vocab_size":
            yield f"{prefix}{key}", value


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    return next((rows for _, rows in _vocabularies(config)), None)


def _with_vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a config for another number of tokens."""
    return {
        key: _with_vocabulary(value, rows) if isinstance(value, Mapping) else rows if key == "vocab_size" else value
        for key, value in config.items()
    }
