"""FuseLLM and FuseChat's first step: a target learns from the fused token distributions of foreign models.

Every answered row is read by each source; their distributions are carried over to the target's tokens
(`token_alignment`), those of the model that finds the row's answer most probable are taken (MinCE), and the target is
trained on  weight * CE(answer) + (1 - weight) * CE(taken distribution)  with weight 0.9 (arXiv 2401.10491). Weight 1
is plain fine-tuning by the same loop: the control. FuseChat (arXiv 2408.07990) does so with one source at a time and
merges the results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from token_alignment import carry_over, token_texts, vocabulary_map
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.checkpoint import Checkpoint, copy_companions
from graftllm.loading import load_model, load_tokenizer
from graftllm.records import Prompt
from graftllm.rendering import render_answered
from graftllm.storage import whole_directory
from graftllm.training_options import SftOptions

PUBLISHED_WEIGHT = 0.9  # of the cross-entropy with the answer
_BATCH = 128  # rows read at once


@dataclass(frozen=True)
class Taught:
    """A row's target tokens and the distributions to learn at its answer.

    Attributes:
        ids: the row by the target's chat template.
        start: where the answer begins in them.
        distributions: shape (answer tokens, target vocabulary); None for nothing but the answer.
        teacher: which model they are of; the target itself is the last.
    """

    ids: list[int]
    start: int
    distributions: Tensor | None = None
    teacher: int = -1


def teach(target: Path, sources: Sequence[Path], rows: Sequence[Prompt], *, device: str = "auto") -> list[Taught]:
    """Return the rows with the distributions of the model that finds each row's answer most probable.

    Args:
        target: checkpoint directory; it is one of the models to choose from.
        sources: checkpoint directories, with their own tokenizers.
        rows: answered.
        device: `auto` takes a GPU when there is one.
    """
    tokenizer = load_tokenizer(target)
    own = [render_answered(tokenizer, row) for row in rows]
    target_texts = token_texts(tokenizer)
    best: list[Taught] = [Taught(ids, start) for ids, start in own]
    least = [math.inf] * len(rows)
    for teacher, path in enumerate([*sources, target]):
        foreign, model = load_tokenizer(path), load_model(path, device=device)
        read = [render_answered(foreign, row) for row in rows]
        source_texts = token_texts(foreign)
        answers = [ids[start:] for ids, start in read], [ids[start:] for ids, start in own]
        words = vocabulary_map(source_texts, target_texts, zip(*answers, strict=True))
        for row, found in enumerate(_distributions(model, foreign, read)):
            source_ids, target_ids = answers[0][row], answers[1][row]
            nll = -float(found.gather(1, torch.tensor(source_ids)[:, None]).clamp_min(1e-30).log().mean())
            if nll < least[row]:
                least[row] = nll
                carried = carry_over(
                    found[:, : len(words)],
                    [source_texts[i] for i in source_ids],
                    [target_texts[i] for i in target_ids],
                    target_ids,
                    words,
                    len(target_texts),
                )
                best[row] = Taught(*own[row], carried, teacher)
    return best


@torch.inference_mode()
def _distributions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, read: Sequence[tuple[list[int], int]]
) -> list[Tensor]:
    """Return each row's next-token distributions at its answer, shape (answer tokens, vocabulary)."""
    found = []
    for first in range(0, len(read), _BATCH):
        batch = read[first : first + _BATCH]
        ids, mask = _padded([row for row, _ in batch], tokenizer, model.device)
        probabilities = cast(Any, model)(input_ids=ids, attention_mask=mask).logits.float().softmax(-1).cpu()
        found += [probabilities[row, start - 1 : len(tokens) - 1].clone() for row, (tokens, start) in enumerate(batch)]
    return found


def train_fused(
    start: Path, out: Path, rows: Sequence[Taught], options: SftOptions, *, weight: float, seed: int, device: str
) -> None:
    """Train a checkpoint on rows and their distributions; AdamW, cosine decay and clipping as in the library's SFT.

    Args:
        start: checkpoint directory.
        out: checkpoint directory to write.
        rows: at least one.
        options: of the training.
        weight: of the cross-entropy with the answer; the rest is that with the distributions.
        seed: of the order of the rows.
        device: `auto` takes a GPU when there is one.
    """
    model, tokenizer = load_model(start, device=device), load_tokenizer(start)
    model.train().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    each = math.ceil(len(rows) / options.batch_size)
    steps = math.ceil(options.epochs * each)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, options.warmup))
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.randperm(len(rows), generator=draw).tolist()
        batch, order = order[: options.batch_size], order[options.batch_size :]
        loss = fused_loss(model, tokenizer, [rows[i] for i in batch], weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    base = Checkpoint.open(start)
    with whole_directory(out) as partial:
        cast(Any, model).to(base.dtype).save_pretrained(partial)
        copy_companions(base, partial)


def fused_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Taught], weight: float
) -> Tensor:
    """Return the mean over all answer tokens of weight * CE(answer) + (1 - weight) * CE(distribution)."""
    ids, mask = _padded([row.ids for row in rows], tokenizer, model.device)
    log_p = cast(Any, model)(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    places = torch.zeros_like(mask, dtype=torch.bool)
    for i, row in enumerate(rows):
        places[i, row.start - 1 : len(row.ids) - 1] = True
    found = log_p[places]  # (answer tokens, vocabulary)
    answers = ids.roll(-1, 1)[places]
    loss = -found.gather(1, answers[:, None]).mean()
    taught = [row.distributions for row in rows if row.distributions is not None]
    if weight == 1 or len(taught) < len(rows):
        return loss
    wanted = torch.cat(taught).to(found.device)
    return weight * loss - (1 - weight) * (wanted * found[:, : wanted.shape[1]]).sum(1).mean()


def _padded(
    rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return token ids padded on the right, where absolute positions are those of the row alone, and their mask."""
    ids = torch.full((len(rows), max(map(len, rows))), cast(int, tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def _rate(step: int, steps: int, warmup: float) -> float:
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
