"""What the router sees of a prompt: hidden states of the bare base model, pooled to one vector.

The forward pass ends after the layer that is asked for, so that routing costs a small share of a
prompt's prefill. This file knows nothing of packs or decisions.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.errors import FusionError
from graftllm.fusion.examples import WIDEST
from graftllm.progress import track
from graftllm.records import Message
from graftllm.rendering import pad, render

_BATCH = 32


@torch.inference_mode()
def prompt_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    layer: int = 1,
    label: str = "routing",
) -> Tensor:
    """Return what the router sees of each prompt.

    Every token's state is first scaled to length 1, because the first tokens' are often a thousand times as long as
    the others'. Then come, side by side: the mean of the embeddings, the mean after `layer`, the last token's state
    after `layer`. More than 512 numbers are folded to 512 with random signs (a count sketch).

    Args:
        model: the bare base model.
        tokenizer: the model's own.
        conversations: each up to and including the last user message.
        layer: after how many layers the states are taken.
        label: shown beside the progress bar.

    Returns:
        Shape (prompts, min(3 * hidden size, 512)), float32 on CPU.

    Raises:
        FusionError: the model has fewer layers, or none that can be found.
    """
    blocks = _blocks(model, layer)
    rows: list[Tensor] = []
    for start in track(range(0, len(conversations), _BATCH), label=label):
        sequences = [
            render(tokenizer, messages, answer_next=True) for messages in conversations[start : start + _BATCH]
        ]
        ids, mask = pad(sequences, tokenizer, model)
        embedded, hidden = (_unit(states) for states in _states(model, blocks, layer, ids, mask))
        weights = (mask / mask.sum(dim=1, keepdim=True))[:, :, None].cpu()  # (rows, length, 1)
        pooled = [
            (embedded * weights).sum(dim=1),
            (hidden * weights).sum(dim=1),
            hidden[torch.arange(len(hidden)), mask.sum(dim=1).cpu() - 1],
        ]
        rows.append(folded(torch.cat(pooled, dim=1)))
    return torch.cat(rows) if rows else torch.empty(0, 0)


def folded(vectors: Tensor) -> Tensor:
    """Return vectors of at most 512 numbers that keep inner products nearly: a count sketch.

    Args:
        vectors: shape (rows, any width).
    """
    width = vectors.shape[1]
    if width <= WIDEST:
        return vectors
    draw = torch.Generator().manual_seed(0)
    place = torch.randint(WIDEST, (width,), generator=draw)
    sign = torch.randint(2, (width,), generator=draw) * 2.0 - 1
    return torch.zeros(len(vectors), WIDEST).index_add_(1, place, vectors * sign)


class _Reached(Exception):
    """Ends a forward pass that has gone far enough."""


def _states(
    model: PreTrainedModel, blocks: nn.ModuleList, layer: int, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return hidden states before the first layer and after `layer` of them, each (rows, length, hidden size)."""
    seen: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])
        raise _Reached

    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if _takes_positions(type(model)):  # positions count from the first real token
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    hooks = (
        blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        blocks[layer - 1].register_forward_hook(leave),
    )
    try:
        cast(Any, model)(**inputs)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0], seen[1]


@cache
def _takes_positions(kind: type[PreTrainedModel]) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


def _blocks(model: PreTrainedModel, layer: int) -> nn.ModuleList:
    """Return the list of the model's layers."""
    count = cast(Any, model.config).get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            if layer > count:
                raise FusionError(f"router.layer: expected 1 to {count}, the layers of this base; found {layer}.")
            return module
    raise FusionError(
        f"router: found no list of {count} layers in {type(model).__name__}, whose hidden states it could read; "
        "name the pack, or write rules."
    )


def _unit(states: Tensor) -> Tensor:
    return nn.functional.normalize(states.float(), dim=-1).cpu()
