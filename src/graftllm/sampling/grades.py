"""Answers graded: by a reward model on this machine, or by a model behind a URL that follows a rubric."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from graftllm.checkpoint import Checkpoint
from graftllm.devices import resolve_device
from graftllm.errors import CheckpointError, first_line
from graftllm.loading import UNREADABLE, load_tokenizer
from graftllm.progress import track
from graftllm.records import Message, Prompt, Response, read_responses
from graftllm.rendering import render
from graftllm.sampling.endpoint import EndpointSource
from graftllm.sampling.gated import GatedHead, is_gated, read_head
from graftllm.sampling.responses import sample_responses
from graftllm.sampling.verdicts import judged_as, verdicts
from graftllm.transfer_options import Endpoint, LlmJudge, RewardJudge, SamplingOptions, SourceOptions


@dataclass(frozen=True)
class Grades:
    """A grade for each answer, or None for one that the judge said nothing readable of; and the tokens it took."""

    values: list[float | None]
    input_tokens: int = 0
    output_tokens: int = 0


@torch.inference_mode()
def reward(
    prompts: Sequence[Prompt], answers: Sequence[str], judge: RewardJudge, path: Path, *, device: str = "auto"
) -> Grades:
    """Grade answers by a sequence-classification model with one output, or one with gated objectives (ArmoRM).

    The conversation goes through the model's chat template; a model without one is given question and answer as a pair.

    Args:
        prompts: one for each answer.
        answers: without reasoning traces.
        judge: the model.
        path: JSONL of verdicts; equal conversations are graded once, and those that are there already not again.
        device: of the model.

    Raises:
        CheckpointError: transformers cannot load the model, or it has several outputs.
    """
    model, tokenizer, head = _load(judge, device)
    encoded = [_encoded(tokenizer, *pair, judge.max_length) for pair in zip(prompts, answers, strict=True)]
    names = [judged_as(prompt.id, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    with verdicts(path, judge.kind) as (said, keep):
        missing = {name: i for i, name in enumerate(names) if name not in said}
        order = sorted(missing.values(), key=lambda i: len(encoded[i]))
        batches = [order[start : start + judge.batch_size] for start in range(0, len(order), judge.batch_size)]
        for batch in track(batches, label=f"grading with {Path(judge.model).name}"):
            ids = [{"input_ids": encoded[i]} for i in batch]
            inputs = tokenizer.pad(ids, padding_side="right", return_tensors="pt").to(model.device)
            output = cast(Any, model)(**inputs)
            if head is None:
                grades = output.logits[:, 0]  # (rows,)
            else:
                rows, last = torch.arange(len(batch)), torch.tensor([len(encoded[i]) - 1 for i in batch])
                before = [len(encoded[i]) - _answer_tokens(tokenizer, prompts[i], answers[i]) - 1 for i in batch]
                states = output.last_hidden_state  # (rows, tokens, hidden)
                grades = head.grade(states[rows, last], states[rows, torch.tensor(before).clamp(min=0)])
            keep(dict(zip((names[i] for i in batch), grades.float().tolist(), strict=True)))
        return Grades([said[name] for name in names], input_tokens=sum(map(len, encoded)))


def grade(prompts: Sequence[Prompt], answers: Sequence[str], judge: LlmJudge, path: Path) -> Grades:
    """Grade answers between 0 and 1 by asking a model behind a URL; equal answers to a prompt are asked for once.

    Args:
        prompts: one for each answer.
        answers: without reasoning traces.
        judge: who is asked, and the rubric.
        path: JSONL of what the judge said; what is there already is not asked again.

    Raises:
        SamplingError: the endpoint does not answer.
    """
    ids = [
        f"{prompt.id}/{hashlib.sha256(answer.encode()).hexdigest()[:16]}"
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    questions = {
        one: Prompt(one, (Message(role="user", content=_question(prompt, answer, judge)),))
        for one, prompt, answer in zip(ids, prompts, answers, strict=True)
    }
    shared = {name: getattr(judge, name) for name in Endpoint.model_fields}
    source = SourceOptions(**shared, name="judge")
    options = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=judge.max_new_tokens)
    opening = partial(EndpointSource, source)
    sample_responses(list(questions.values()), opening, options, path, source_name=source.name, seed=0)
    said = {row.prompt_id: row for row in read_responses(path) if row.source == source.name}
    grades = {one: _read_grade(row, judge) for one, row in said.items()}
    return Grades(
        [grades.get(one) for one in ids],
        sum(row.input_tokens for row in said.values()),
        sum(row.output_tokens for row in said.values()),
    )


def _load(judge: RewardJudge, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, GatedHead | None]:
    where, checkpoint, tokenizer = resolve_device(device), Checkpoint.open(judge.model), load_tokenizer(judge.model)
    gated = is_gated(checkpoint)
    kind = AutoModel if gated else AutoModelForSequenceClassification
    try:
        model = kind.from_pretrained(
            checkpoint.path, dtype=torch.float32 if where.type == "cpu" else "auto", trust_remote_code=False
        )
    except UNREADABLE as error:
        raise CheckpointError(
            f"{judge.model}: transformers cannot load it as a reward model ({first_line(error)})."
        ) from error
    if not gated and model.config.num_labels != 1:
        raise CheckpointError(
            f"{judge.model}: expected a reward model with one output, found {model.config.num_labels}; choose another."
        )
    model.config.pad_token_id = tokenizer.pad_token_id  # by which it finds the last token of each row
    model = cast(Any, model).to(where).eval()
    return model, tokenizer, read_head(checkpoint, model) if gated else None


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str, max_length: int) -> list[int]:
    if tokenizer.chat_template is not None:
        ids = render(tokenizer, (*prompt.question, Message(role="assistant", content=answer)), answer_next=False)
        return ids[-max_length:]
    question = "\n".join(message["content"] for message in prompt.question)
    return tokenizer(question, answer, truncation=True, max_length=max_length)["input_ids"]


def _answer_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str) -> int:
    """Return how many tokens of a conversation stand behind the last one of its prompt."""
    asked = render(tokenizer, prompt.question, answer_next=False)
    answered = render(tokenizer, (*prompt.question, Message(role="assistant", content=answer)), answer_next=False)
    return len(answered) - len(asked)


def _question(prompt: Prompt, answer: str, judge: LlmJudge) -> str:
    asked = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.question)
    reference = f"\n\nReference answer:\n{prompt.reference}" if prompt.reference is not None else ""
    return (
        f"Grade an answer by a rubric.\n\nRubric:\n{judge.rubric}\n\nConversation:\n{asked}{reference}\n\n"
        f"Answer to grade:\n{answer}\n\nThink briefly. Then end with one line that says only `Grade: N`, where N is a "
        f"whole number from 0 (worst) to {judge.best_grade} (best)."
    )


def _read_grade(row: Response, judge: LlmJudge) -> float | None:
    found = re.findall(r"(?i)grade\W{0,6}(\d+(?:\.\d+)?)", row.text)
    return float(found[-1]) / judge.best_grade if found and float(found[-1]) <= judge.best_grade else None
