"""How far one live model's next-token distributions are from another's, on texts that both read."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.rendering import learned_positions

_TEXTS, _LENGTH = 16, 64


@torch.inference_mode()
def written_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> list[list[int]]:
    """Return token ids of texts that a model writes when it is given nothing but a first token."""
    first = next(one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if one is not None)
    torch.manual_seed(seed)
    ids = torch.full((_TEXTS, 1), cast(int, first), device=model.device)
    length = min(_LENGTH, (learned_positions(model) or 1 + _LENGTH) - 1)
    rows = cast(Any, model).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
        min_new_tokens=length, max_new_tokens=length, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return cast(list[list[int]], rows.tolist())


@torch.inference_mode()
def read_logits(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return a model's logits for each text, shape (tokens, vocabulary), on CPU."""
    found = []
    for text in texts:
        ids = torch.tensor([list(text)], device=model.device)
        found.append(cast(Any, model)(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return found


def divergence(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the mean KL(reference || found) in nats per token, of logits as `read_logits` gives them."""
    total, tokens = 0.0, 0
    for one, other in zip(reference, found, strict=True):
        log_p, log_q = one.double().log_softmax(1), other.double().log_softmax(1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(one)
    return max(total / tokens, 0.0)
