"""A SkillPack as a PEFT LoRA adapter, as other engines serve it; what cannot travel is named and measured.

Only matrices of linear layers travel: their deltas become factors, exact up to the dtype where the
rank is allowed, else the nearest of the largest rank allowed. Everywhere alpha == rank, so that every
reader scales by 1, and patterns are anchored to whole names.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graftllm.checkpoint import Checkpoint
from graftllm.companions import TOKENIZER
from graftllm.errors import ServingError, StorageError
from graftllm.evaluation.fidelity import CLOSE_KL
from graftllm.exporting.divergence import divergence, read_logits, written_texts
from graftllm.fusion.decoding import decode, touched_bindings
from graftllm.fusion.voices import Voices
from graftllm.live import named_values
from graftllm.loading import load_model, load_tokenizer
from graftllm.records import read_prompts
from graftllm.rendering import context_length, cut, render_answered
from graftllm.skillpack import SkillPack
from graftllm.storage import check_apart, check_replaceable, whole_directory, write_text
from graftllm.tensors import DTYPES, MADE_HERE, is_made_here

LEGAL_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank
FILES = ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER)  # of an adapter
_ROWS = 64


class NoAdapter(ServingError):
    """A pack of which no adapter can hold all: why, and what to do instead."""

    def __init__(self, source: str, why: str, mend: str) -> None:
        """Keep both apart, for several packs to be told of at once."""
        super().__init__(f"{source}: {why}. {mend}")
        self.why, self.mend = why, mend


@dataclass(frozen=True)
class Loss:
    """A part of a pack that the adapter does not have.

    Attributes:
        what: a role, or `truncation` of matrices to the largest rank.
        tensors: how many it concerns.
        kl: KL divergence of the model without this part from the model with the pack, nats per token.
    """

    what: str
    tensors: int
    kl: float


@dataclass(frozen=True)
class Adapter:
    """An adapter that was written.

    Attributes:
        rank: the largest in it.
        nbytes: size of its tensors' file.
        energy: share of the travelling matrices' squared norm that is in it.
        losses: what is not in it.
        kl: divergence of base and adapter, run by PEFT, from base and pack, nats per token.
        tokens: how many tokens that was measured on.
        own_voice: the pack has a tokenizer, chat template or end tokens of its own.
    """

    rank: int
    nbytes: int
    energy: float
    losses: Sequence[Loss]
    kl: float
    tokens: int
    own_voice: bool = False

    @property
    def vllm_rank(self) -> int:
        """The `--max-lora-rank` that vLLM needs for it."""
        return legal_rank(self.rank)

    def sentences(self) -> list[str]:
        """Return what was written, a line each."""
        lines = [
            f"Rank {self.rank}, {self.nbytes:,} bytes, {self.energy:.2%} of the energy of the layers' matrices.",
            f"Through PEFT, KL divergence {self.kl:.6f} nats per token from base + pack, on {self.tokens:,} tokens.",
        ]
        if self.own_voice:
            mend = "see that the engine takes these, not the base's"
            lines.append(f"The pack has a tokenizer, chat template or end tokens of its own; {mend}.")
        lines += [f"Left out: {_told(loss)}." for loss in self.losses]
        if self.kl > CLOSE_KL:
            lines.append(
                f"The skill is damaged: KL divergence is {self.kl:.4g}, not at most {CLOSE_KL}. A checkpoint "
                "(`graftllm apply`) and `graftllm serve` leave nothing out."
            )
        return lines


def legal_rank(rank: int) -> int:
    """Return the smallest rank that vLLM takes for adapters of this one.

    Raises:
        ServingError: there is none.
    """
    if not 1 <= rank <= LEGAL_RANKS[-1]:
        raise ServingError(f"--max-rank: expected 1 to {LEGAL_RANKS[-1]}, which engines take at most; found {rank}.")
    return next(one for one in LEGAL_RANKS if one >= rank)


def export_adapter(
    pack: SkillPack,
    base: Path,
    out: Path,
    *,
    max_rank: int = LEGAL_RANKS[-1],
    allow_drop: bool = False,
    prompts: Path | None = None,
    device: str = "auto",
) -> Adapter:
    """Write a pack as a PEFT adapter, and measure it by loading it with PEFT.

    Args:
        pack: a SkillPack.
        base: its base's checkpoint directory.
        out: adapter directory; appears whole or not at all, with the pack's tokenizer where that has its own.
        max_rank: raised to the next one that vLLM takes.
        allow_drop: write the adapter also where it lacks something of the pack.
        prompts: JSONL rows to measure on; without them the packed model writes its own texts.
        device: `auto` takes a GPU when there is one.

    Raises:
        NoAdapter: something of the pack cannot travel and `allow_drop` is not given, it adds vocabulary rows, or there
            is nothing to travel.
        ServingError: the rank is too large.
        PackError: the pack is damaged or was made for another base.
        CheckpointError: the base cannot be loaded.
    """
    highest = legal_rank(max_rank)
    checkpoint = Checkpoint.open(base)
    check_apart(out, [Path(pack.source), checkpoint.path, *([] if prompts is None else [prompts])])
    _check_vacant(out)
    pack.check_base(checkpoint)
    if grown := next((name for name, one in pack.header.tensors.items() if one.tuned_spec.shape != one.shape), None):
        raise NoAdapter(
            pack.source,
            f"adds vocabulary rows to {grown!r}, which no adapter holds",
            "Write a checkpoint with `graftllm apply` and serve that.",
        )
    model, words = load_model(checkpoint.path, device=device), load_tokenizer(checkpoint.path)
    voices = Voices(model, words, {pack.source: pack})
    tokenizer = voices[pack.source].tokenizer
    full = decode(model, pack).values
    places, dropped = _places(model, pack)
    with _holding(model, full):
        if prompts is None:
            texts = written_texts(model, tokenizer)
        else:
            rows = [render_answered(tokenizer, row) for row in read_prompts(prompts)[:_ROWS]]
            texts = [ids for ids, _ in cut(rows, context_length(model))]
        reference = read_logits(model, texts)
    factors, kept, total = {}, 0.0, 0.0
    for name, (module, _) in places.items():
        delta = pack.delta(name, checkpoint.tensor(name))
        found = _factors(pack, name, delta, highest)
        dtype = DTYPES[pack.header.tensors[name].dtype]
        factors[module] = left, right = cast(tuple[Tensor, Tensor], tuple(one.to(dtype).contiguous() for one in found))
        total += float(delta.double().square().sum())
        kept += float(delta.double().square().sum() - (delta - left.float() @ right.float()).double().square().sum())
    if not factors:
        raise NoAdapter(
            pack.source,
            "touches no matrix of a linear layer, so there is nothing an adapter could hold",
            "Write a checkpoint with `graftllm apply` and serve that.",
        )
    with whole_directory(out) as partial:
        if tokenizer is not words:  # engines look for it beside the adapter
            tokenizer.save_pretrained(partial)
        rank = _write(partial, model, factors, checkpoint)
        losses = _losses(model, full, places, dropped, factors, texts, reference)
        adapted = _adapted(model, partial)
        adapter = Adapter(
            rank=rank,
            nbytes=(partial / FILES[1]).stat().st_size,
            energy=kept / total if total else 1.0,
            losses=losses,
            kl=divergence(reference, read_logits(adapted, texts)),
            tokens=sum(map(len, texts)),
            own_voice=voices[pack.source] is not voices.base,
        )
        if losses and not allow_drop:
            raise NoAdapter(
                pack.source,
                f"an adapter cannot hold all of it: {'; '.join(map(_told, losses))}; together KL {adapter.kl:.4g}",
                "Give --allow-drop to leave this out, or write a checkpoint with `graftllm apply`.",
            )
    return adapter


def _adapted(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Return a model with an adapter, as PEFT reads it; the model's modules are replaced."""
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers by a name that 5.23 deprecates
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing", category=FutureWarning)
        return cast(PreTrainedModel, PeftModel.from_pretrained(model, str(directory)).eval())


def _told(loss: Loss) -> str:
    return f"{loss.what} ({loss.tensors} tensors, KL {loss.kl:.4g} nats per token)"


_Places = dict[str, tuple[str, str]]


def _places(model: PreTrainedModel, pack: SkillPack) -> tuple[_Places, dict[str, list[str]]]:
    """Return stored name -> (module, live name) of the matrices that travel; live names of the others by role."""
    values = named_values(model)
    modules = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, _Linear)}
    vocabulary = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part}
    places: _Places = {}
    dropped: dict[str, list[str]] = {}
    for binding in touched_bindings(model, [(pack, 1.0)]):
        value = values[binding.live[0]]
        entry = pack.header.tensors[binding.stored[0]]
        if binding.plain and id(value) in modules and id(value) not in vocabulary and entry.tuned_spec == entry.spec:
            places[binding.stored[0]] = modules[id(value)], binding.live[0]
        else:
            dropped.setdefault(entry.role, []).extend(binding.live)
    return places, dropped


_Linear = nn.Linear | Conv1D


def _factors(pack: SkillPack, name: str, delta: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """Return factors of a delta, (rows, rank) and (rank, columns): the pack's own, or its largest directions."""
    rows, columns = delta.shape
    own = pack.encoded(name).factors((rows, columns))
    if own is not None and own[0].shape[1] <= highest:
        return own[0].float(), own[1].float()
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = min(highest, max(int((s > s[0] * 1e-7).sum()), 1))
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()


def _check_vacant(out: Path) -> None:
    """Check that an adapter may be written at a place: nothing is there, or one that was written here."""
    check_replaceable(out, over=FILES[:1], holds=FILES)
    if (out / FILES[0]).exists() and not is_made_here(out / FILES[1]):
        raise StorageError(
            f"{out}: expected nothing there, or an adapter that graftllm wrote, found another one, which would be "
            "lost; choose another place, or take that away."
        )


def _write(
    directory: Path, model: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]], base: Checkpoint
) -> int:
    """Write an adapter's two files; return its largest rank."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, _Linear)}
    turned = {name for name in factors if isinstance(linears[name], Conv1D)}  # stored as (inputs, outputs)
    tensors: dict[str, Tensor] = {}
    for name, (left, right) in factors.items():
        a, b = (left.T, right.T) if name in turned else (right, left)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, directory / FILES[1], metadata=MADE_HERE)
    ranks = {name: left.shape[1] for name, (left, _) in factors.items()}
    highest = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != highest}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base.path),
        r=highest,
        lora_alpha=highest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(_targets(factors, linears)),
        fan_in_fan_out=bool(turned),
        inference_mode=True,
    )
    known = {key: sorted(one) if isinstance(one, set) else one for key, one in config.to_dict().items()}
    write_text(directory / FILES[0], json.dumps(known, indent=1, default=str))
    return highest


def _targets(factors: Mapping[str, Any], linears: Mapping[str, Any]) -> Iterator[str]:
    """Yield last names of modules where all of that name have factors, as engines like them best, else whole names."""
    leaves: dict[str, list[str]] = {}
    for name in linears:
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    for leaf, names in leaves.items():
        mine = [name for name in names if name in factors]
        yield from [leaf] if mine == names else mine


def _losses(
    model: PreTrainedModel,
    full: Mapping[str, Tensor],
    places: _Places,
    dropped: Mapping[str, Sequence[str]],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    texts: Sequence[Sequence[int]],
    reference: Sequence[Tensor],
) -> list[Loss]:
    """Return what an adapter lacks, each with the divergence that it alone causes."""
    losses = []
    for role, names in sorted(dropped.items()):
        with _holding(model, {name: value for name, value in full.items() if name not in names}):
            losses.append(Loss(role, len(names), divergence(reference, read_logits(model, texts))))
    values, cut = named_values(model), {}
    for module, live in places.values():
        left, right = factors[module]
        base = values[live].detach()
        product = left.float() @ right.float()
        delta = full[live].float() - base.float()
        rounding = 8 * torch.finfo(left.dtype).eps * (base.float().norm() + delta.norm())  # of factors and of sums
        if (delta - product.to(delta.device)).norm() > 1e-3 * delta.norm() + rounding:
            cut[live] = (base.float() + product.to(base.device)).to(base.dtype)
    if cut:
        with _holding(model, {**full, **cut}):
            losses.append(Loss("truncation", len(cut), divergence(reference, read_logits(model, texts))))
    return losses


@contextmanager
def _holding(model: PreTrainedModel, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model have these parameters inside the block."""
    live = named_values(model)
    before = {name: live[name].data for name in values}
    try:
        for name, value in values.items():
            live[name].data = value
        yield
    finally:
        for name, value in before.items():
            live[name].data = value
