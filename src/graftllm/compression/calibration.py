"""Calibration rows -> the second moments of every linear layer's input.

H = mean of x x^T over the tokens of the rows, as the tuned model sees them. Layers are found by
their class (nn.Linear), not by architecture; layers that get the same tensor share one H.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from graftllm.errors import CompressionError
from graftllm.generation import load_model, load_tokenizer, pad, render_answered
from graftllm.progress import track
from graftllm.records import Message, Prompt, read_prompts

SEQUENCES = 128  # as published; more changes little
_BATCH = 8


@dataclass(frozen=True)
class Calibration:
    """Second moments by parameter name, each of shape (d_in, d_in), and how many tokens made them."""

    moments: Mapping[str, Tensor]
    tokens: int


def read_calibration(path: Path) -> list[Prompt]:
    """Read prompt rows from JSONL, or paragraphs (parted by blank lines) from any other text file.

    Raises:
        RecordError: a JSONL row is malformed, or the file is missing.
        CompressionError: the text file has no paragraph.
    """
    if path.suffix == ".jsonl" or not path.exists():
        return read_prompts(path)
    paragraphs = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    if not paragraphs:
        raise CompressionError(f"{path}: expected paragraphs of text or JSONL rows, found an empty file.")
    return [Prompt(str(i), (Message(role="user", content=text),)) for i, text in enumerate(paragraphs)]


@torch.inference_mode()
def collect_moments(
    tuned: Path, rows: Sequence[Prompt], *, device: str = "auto", max_length: int = 2048
) -> Calibration:
    """Run the tuned model over the first 128 rows and return what its linear layers saw.

    Args:
        tuned: checkpoint directory of the tuned model.
        rows: conversations; an answer, where there is one, is part of the text.
        device: `auto` takes a GPU when there is one.
        max_length: longer rows are cut to this many tokens.

    Raises:
        CheckpointError: transformers cannot load the model or its tokenizer.
    """
    model, tokenizer = load_model(tuned, device=device), load_tokenizer(tuned)
    sequences = [render_answered(tokenizer, row)[0][:max_length] for row in rows[:SEQUENCES]]
    watcher = _Watcher(model)
    tokens = 0
    for start in track(range(0, len(sequences), _BATCH), label="calibrating"):
        ids, watcher.mask = pad(sequences[start : start + _BATCH], tokenizer, model.device)
        model(input_ids=ids, attention_mask=watcher.mask, use_cache=False)
        tokens += int(watcher.mask.sum())
    means = {name: total.div_(tokens).cpu() for name, total in watcher.sums.items()}
    return Calibration({name: means[leader] for name, leader in watcher.leaders.items()}, tokens)


class _Watcher:
    """Sums x x^T of every linear layer's input, once for layers that get the same tensor in a row."""

    def __init__(self, model: nn.Module) -> None:
        self.mask = torch.empty(0)  # (rows, length) of the running forward pass
        self.sums: dict[str, Tensor] = {}
        self.leaders: dict[str, str] = {}  # parameter name -> the name that its H is summed under
        self._last: tuple[Tensor | None, str] = (None, "")
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(partial(self._watch, f"{name}.weight"))

    def _watch(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shared = inputs[0] is self._last[0]
        leader = self.leaders.setdefault(name, self._last[1] if shared else name)
        self._last = (inputs[0], leader)
        if leader != name:
            return
        padded = inputs[0].shape[:2] == self.mask.shape
        x = (inputs[0][self.mask.bool()] if padded else inputs[0].flatten(0, -2)).float()  # (tokens, d_in)
        self.sums[name] = self.sums[name].addmm_(x.T, x) if name in self.sums else x.T @ x
