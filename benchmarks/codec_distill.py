"""Gains of a decoded delta's matrices, trained so that the model answers as the tuned one does.

BitDelta trains its scales so (arXiv 2402.10193, section 3.2). It costs no bytes where a matrix has
scales of its own anyway.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.records import Prompt
from graftllm.rendering import pad, render_answered

_STEPS = 100
_BATCH = 32
_RATE = 0.02


def distill_gains(
    model: PreTrainedModel,
    tuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Prompt],
    base: Mapping[str, Tensor],
    decoded: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the decoded deltas times their trained gains.

    Args:
        model: of the base's architecture; its own weights do not matter.
        tuned: the teacher.
        tokenizer: of both.
        rows: answered prompts to train on.
        base: the base's values of the parameters in `decoded`.
        decoded: deltas of matrices, float32; or parts that add up to them, (parts, d_out, d_in), with a gain each.
    """
    decoded = {name: parts if parts.ndim == 3 else parts[None] for name, parts in decoded.items()}
    answered = [render_answered(tokenizer, row) for row in rows]
    gains = {name: torch.ones(len(parts), requires_grad=True) for name, parts in decoded.items()}
    optimizer = torch.optim.Adam(gains.values(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    draw = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        batch = [answered[int(i)] for i in torch.randint(len(answered), (_BATCH,), generator=draw)]
        ids, mask = pad([row for row, _ in batch], tokenizer, model, "left")
        places = torch.stack(
            [torch.arange(ids.shape[1]) >= ids.shape[1] - len(row) + first - 1 for row, first in batch]
        )
        places[:, -1] = False  # nothing comes after the last token
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        with torch.no_grad():
            teacher = cast(Any, tuned)(**inputs).logits[places].log_softmax(1)
        weights = {name: base[name].float() + torch.tensordot(gains[name], decoded[name], 1) for name in decoded}
        student = functional_call(model, weights, (), inputs).logits[places].log_softmax(1)
        loss = torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # A scale is stored in bfloat16, so a gain is worth as many bits.
    return {name: torch.tensordot(gains[name].detach().bfloat16().float(), decoded[name], 1) for name in decoded}
