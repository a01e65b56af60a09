"""Calibration rows -> the second moments of every linear layer's input.

H = sum of w x x^T over the tokens of the rows, as the tuned model sees them, over their number; w tells how much a
token counts, and is 1 on average.
Layers are found by what they are (nn.Linear, Conv1D, products with a slice of stacked experts), not by
architecture. Neither the model nor its moments have to fit in memory.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftllm.checkpoint import Checkpoint
from graftllm.compression.experts import ExpertWatcher, Slice, slices_of
from graftllm.compression.moments import Moments, Sums
from graftllm.compression.prices import Calibration
from graftllm.compression.sensitivity import Weights, to_calibrate
from graftllm.devices import resolve_device
from graftllm.errors import CompressionError
from graftllm.loading import load_tokenizer
from graftllm.progress import progress
from graftllm.records import Prompt
from graftllm.rendering import pad
from graftllm.streaming import StreamedModel, WeightsAbsent, check_reads_text, stream_model

MEMORY_BYTES = 1 << 30  # of moments; further ones are summed in files
_BATCH_TOKENS = 4096  # padding included; the weights are read once a batch


@torch.inference_mode()
def collect_moments(
    tuned: Path,
    rows: Sequence[Prompt],
    *,
    weights: Weights | None = None,
    device: str = "auto",
    spool: Path | None = None,
) -> Calibration:
    """Run the tuned model over the first 512 rows, at most 262,144 tokens, and return what its linear layers saw.

    The weights stream from disk, layer by layer, in float32.

    Args:
        tuned: checkpoint directory of the tuned model.
        rows: conversations; an answer, where there is one, is part of the text.
        weights: how much each token of these rows counts; equally where nothing is said.
        device: `auto` takes a GPU when there is one.
        spool: directory for moments beyond 1 GB, until the calibration is let go; the system's temporary one
            by default.

    Raises:
        CheckpointError: transformers cannot load the model or its tokenizer.
        CompressionError: as for `check_reads_text`, or the model cannot be streamed.
    """
    checkpoint = Checkpoint.open(tuned)
    check_reads_text(checkpoint)
    streamed = stream_model(checkpoint, device=resolve_device(device))
    text = streamed.model.config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # as rows are padded; classifiers refuse several rows otherwise
    tokenizer = load_tokenizer(checkpoint.path)
    sequences = [ids for ids, _ in to_calibrate(tokenizer, streamed.model, rows)]
    watcher = _Watcher(streamed, checkpoint, Sums(spool, MEMORY_BYTES), weights or {})
    tokens = 0
    with progress("calibrating") as show, watcher.experts:
        for batch in _batches(sequences):
            ids, attended = pad([sequences[i] for i in batch], tokenizer, streamed.model, device=streamed.device)
            mask = attended.bool()
            watcher.batch, watcher.mask, watcher.experts.mask = batch, mask, mask
            try:
                streamed.model(input_ids=ids, attention_mask=attended)
            except _HeadReached:
                pass
            except WeightsAbsent as error:
                raise CompressionError(
                    f"{checkpoint.path}: {type(streamed.model).__name__} uses weights of a module without running it, "
                    f"so they cannot be streamed ({error}). Pack it without calibration."
                ) from error
            tokens += int(mask.sum())
            show(tokens, sum(map(len, sequences)))
    return watcher.calibration(tokens)


def _batches(sequences: Sequence[list[int]]) -> Iterator[list[int]]:
    """Yield the numbers of rows of like lengths together, so that there is little padding."""
    batch: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if batch and (len(batch) + 1) * len(sequences[i]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class _HeadReached(Exception):
    """Ends a forward pass: the logits would be its largest tensor, and nobody reads them."""


class _Watcher:
    """Sums x x^T of the input of every matrix that multiplies tokens, once for those that get the same tensor."""

    def __init__(self, streamed: StreamedModel, checkpoint: Checkpoint, sums: Sums, weights: Weights) -> None:
        self.mask = torch.empty(0)  # (rows, length) of the running forward pass
        self.batch: Sequence[int] = ()  # the numbers of its rows
        self.sums, self.weights = sums, weights
        self.shared: dict[str, str] = {}  # stored name -> the key that its H is summed under
        self.transposed: set[str] = set()
        self._reached = Counter[str]()  # of how many tokens each sum is
        self._last: tuple[Tensor | None, str] = (None, "")
        specs, head = checkpoint.specs, streamed.model.get_output_embeddings()
        self.experts = ExpertWatcher(streamed.model, streamed.bindings, specs, self._add_expert)
        for name, module in streamed.model.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not head:
                binding = streamed.bindings[f"{name}.weight"]
                stored = binding.stored if binding.plain else slices_of(binding, f"{name}.weight", specs)[0].stored
                if isinstance(module, Conv1D):
                    self.transposed |= set(stored)
                module.register_forward_pre_hook(partial(self._watch, stored))
        if head is not None:
            # Before the hook that would load the head's weights: nobody needs them any more.
            head.register_forward_pre_hook(_stop, prepend=True)
            if isinstance(head, nn.Linear):
                stored = streamed.bindings[_name_of(streamed.model, head)].stored
                head.register_forward_pre_hook(partial(self._watch, stored), prepend=True)

    def calibration(self, tokens: int) -> Calibration:
        shared = {name: key for name, key in self.shared.items() if key in self.sums}
        moments = Moments(self.sums, shared, tokens)
        reached = {name: self._reached[key] for name, key in shared.items()}
        return Calibration(moments, tokens, frozenset(self.transposed), self.experts.unreached, shared, reached)

    def _watch(self, stored: tuple[str, ...], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if not stored:
            return
        key = self._last[1] if x is self._last[0] else stored[0]
        self._last = (x, key)
        if self.shared.get(stored[0], key) == stored[0]:
            self._add(stored, self._tokens(x))
        for name in stored:
            self.shared.setdefault(name, key)

    def _add_expert(self, part: Slice, x: Tensor, output: Tensor) -> None:
        self._add(part.stored, x)  # padding is zeros, which add nothing

    def _tokens(self, x: Tensor) -> Tensor:
        """Return what a layer sees of the rows' tokens, of shape (tokens, d_in)."""
        if x.shape[:2] == self.mask.shape:
            return x[self.mask].flatten(0, -2)
        return x[self.mask.flatten()].flatten(0, -2) if len(x) == self.mask.numel() else x.flatten(0, -2)

    def _add(self, stored: tuple[str, ...], x: Tensor) -> None:
        if stored and len(x) and bool(x.any()):
            self.sums.add(stored[0], self._weighted(stored[0], x.float()))
            self._reached[stored[0]] += int(x.any(1).sum())
            for name in stored:
                self.shared.setdefault(name, stored[0])

    def _weighted(self, name: str, x: Tensor) -> Tensor:
        """Return x sqrt(w): its second moments count each token as much as it matters."""
        if name not in self.weights:
            return x
        return x * torch.cat([self.weights[name][i] for i in self.batch]).to(x).sqrt()[:, None]


def _stop(module: nn.Module, inputs: Any) -> None:
    raise _HeadReached


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(f"{name}.weight" for name, found in model.named_modules() if found is module)
