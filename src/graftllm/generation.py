"""Conversations in, texts out, on a live transformers model.

The one place that loads models and tokenizers, applies chat templates and generates. It knows
nothing of packs: whatever weights the model holds are the ones that answer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal, cast

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)
from transformers.utils import logging as transformers_logging

from graftllm.checkpoint import Checkpoint
from graftllm.devices import resolve_device
from graftllm.errors import CheckpointError, RecipeError, RecordError, first_line
from graftllm.recipe import SamplingOptions
from graftllm.records import Message, Prompt
from graftllm.stop_texts import stopped_at, up_to_stop
from graftllm.transfer_options import is_template

_OFFSET = 2  # positions that some models (OPT, BART) keep before the first
GREEDY = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=256)


def load_model(path: str | Path, *, device: str = "auto", device_map: str | None = None) -> PreTrainedModel:
    """Load a causal language model for inference: float32 on CPU, its own dtype on a GPU.

    Args:
        path: checkpoint directory or Hub id.
        device: `auto` takes a GPU when there is one.
        device_map: spread the model over devices as accelerate does (`auto`, `balanced`, ...) instead.

    Raises:
        CheckpointError: it is not there, lacks a parameter, or transformers cannot load it.
    """
    where = resolve_device(device)
    model = open_model(path, torch.float32 if where.type == "cpu" else "auto", device_map)
    return (model if device_map else cast(Any, model).to(where)).eval()


def open_model(
    path: str | Path, dtype: torch.dtype | Literal["auto"], device_map: str | None = None
) -> PreTrainedModel:
    """Load a causal language model as transformers does, but with every parameter from its checkpoint.

    Raises:
        CheckpointError: it is not there, lacks a parameter, or transformers cannot load it.
    """
    path = Checkpoint.open(path).path
    transformers_logging.disable_progress_bar()
    try:
        model, found = cast(Any, AutoModelForCausalLM).from_pretrained(
            path, dtype=dtype, device_map=device_map, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: transformers cannot load it as a causal language model ({first_line(error)})."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{path}: has no tensor for {missing[0]!r} of {type(model).__name__}, which would be drawn at random. "
            "The checkpoint is incomplete or its config.json names another class."
        )
    return model


def load_tokenizer(path: str | Path, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model, with padding on the left and a pad token.

    Args:
        path: checkpoint directory or Hub id.
        chat_template: Jinja text, or a file of it, instead of the tokenizer's own.

    Raises:
        CheckpointError: transformers cannot load it, or the template cannot be read or does not render a question.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: transformers cannot load its tokenizer ({first_line(error)}).") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        _use_template(tokenizer, chat_template)
    return tokenizer


def _use_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    try:
        tokenizer.chat_template = template if is_template(template) else Path(template).read_text(encoding="utf-8")
        _rendered(tokenizer, [Message(role="user", content="?")], answer_next=True)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"chat_template: expected a Jinja template or a file that holds one, found {template!r} ({error})."
        ) from error
    except TemplateError as error:
        raise CheckpointError(
            f"chat_template: expected a Jinja template that renders a user's message ({first_line(error)})."
        ) from error


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_next: bool) -> list[int]:
    """Return the token ids of a conversation by the tokenizer's chat template.

    Without a template the contents stand one below the other. `answer_next` opens the assistant's turn.

    Raises:
        RecordError: the template refuses such a conversation, as some do a system message.
    """
    try:
        return _rendered(tokenizer, messages, answer_next=answer_next)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages) or "nobody"
        raise RecordError(
            f"{tokenizer.name_or_path}: its chat template refuses a conversation of {roles} ({first_line(error)}). "
            "Leave such messages out, or give the model another chat template."
        ) from error


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_next: bool) -> list[int]:
    if tokenizer.chat_template is not None:
        conversation = cast(Any, [dict(message) for message in messages])
        return cast(
            list[int],
            tokenizer.apply_chat_template(
                conversation, add_generation_prompt=answer_next, tokenize=True, return_dict=False
            ),
        )
    text = "\n".join(message["content"] for message in messages) + ("\n" if answer_next else "")
    return tokenizer(text)["input_ids"]


def render_answered(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[list[int], int]:
    """Return the token ids of a prompt with its answer, and the position where the answer begins.

    A prompt without an answer is rendered alone; the position is then its length.
    """
    question = render(tokenizer, prompt.question, answer_next=True)
    if prompt.answer is None:
        return question, len(question)
    answered = (*prompt.question, Message(role="assistant", content=prompt.answer))
    whole = render(tokenizer, answered, answer_next=False)
    start = next(
        (i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), min(len(question), len(whole))
    )
    return whole, start


def pad(
    sequences: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    side: Literal["left", "right"] = "right",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids of one length and their attention mask, both of shape (rows, longest).

    On the right, causal models never see the padding, whatever their positions; on the left, answers can go on.
    """
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), cast(int, tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if side == "left" else 0
        ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    return ids.to(device), mask.to(device)


@dataclass(frozen=True)
class Answer:
    """A generated text without special tokens, how many tokens were read and generated for it, and how it ended.

    Attributes:
        text: up to its end, or to the first stop text.
        input_tokens: of the prompt.
        output_tokens: with the one that ends it, if one does.
        truncated: it has the most tokens allowed, and neither an end token nor a stop text is among them.
    """

    text: str
    input_tokens: int
    output_tokens: int
    truncated: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    options: SamplingOptions = GREEDY,
    *,
    seed: int = 0,
    show: Callable[[int, int], None] = lambda done, total: None,
    around: Callable[[list[int]], AbstractContextManager[Any]] = lambda rows: nullcontext(),
) -> list[list[str]]:
    """Answer every conversation `options.samples` times.

    Args:
        model: answers with the weights it holds now.
        tokenizer: the model's own.
        conversations: each ends with a user message.
        options: temperature 0 is greedy.
        seed: of the draws; the same batch, model and seed give the same texts.
        show: called with the number of conversations answered so far, and of all.
        around: entered while a batch runs; it is given the number of the conversation in each of the batch's rows.

    Returns:
        Per conversation its `options.samples` texts, without special tokens.
    """
    found = generate_answers(model, tokenizer, conversations, options, seed=seed, show=show, around=around)
    return [[answer.text for answer in answers] for answers in found]


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    options: SamplingOptions = GREEDY,
    *,
    seed: int = 0,
    show: Callable[[int, int], None] = lambda done, total: None,
    around: Callable[[list[int]], AbstractContextManager[Any]] = lambda rows: nullcontext(),
) -> list[list[Answer]]:
    """Answer as `generate` does; tokens are counted too.

    Where the model has learned positions, answers are at most as long as those that its batch's longest prompt leaves.

    Raises:
        RecordError: a prompt leaves none.
    """
    prompts = [render(tokenizer, messages, answer_next=True) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    answers: list[list[Answer]] = [[] for _ in prompts]
    torch.manual_seed(seed)
    for start in range(0, len(order), options.batch_size):
        batch = order[start : start + options.batch_size]
        ids, mask = pad([prompts[i] for i in batch], tokenizer, model.device, "left")
        config = _generation_config(model, tokenizer, options, ids.shape[1])
        with around([i for i in batch for _ in range(options.samples)]):
            output = cast(Any, model).generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                tokenizer=tokenizer if options.stop else None,
            )
        new = output[:, ids.shape[1] :]  # (rows, tokens)
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        told = [
            _answer(text, tokens, len(prompts[batch[row // options.samples]]), config)
            for row, (text, tokens) in enumerate(zip(texts, new.tolist(), strict=True))
        ]
        for row, i in enumerate(batch):
            answers[i] = told[row * options.samples : (row + 1) * options.samples]
        show(start + len(batch), len(order))
    return answers


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: SamplingOptions = GREEDY,
) -> Iterator[str]:
    """Yield the answer to one conversation piece by piece as it is generated; closed early, it stops the model.

    It ends before the first stop text; what may be the beginning of one is held back.

    Raises:
        RecipeError: more than one answer is asked for.
    """
    if options.samples > 1:
        raise RecipeError(f"samples: expected 1 for a stream, which is one answer; found {options.samples}.")
    ids, mask = pad([render(tokenizer, messages, answer_next=True)], tokenizer, model.device)
    config = _generation_config(model, tokenizer, options, ids.shape[1])
    streamer = TextIteratorStreamer(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
    failures: list[BaseException] = []
    stopped = Event()

    def work() -> None:
        try:
            cast(Any, model).generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                streamer=streamer,
                tokenizer=tokenizer if options.stop else None,
                stopping_criteria=[lambda ids, scores, **_: torch.tensor([stopped.is_set()], device=ids.device)],
            )
        except BaseException as error:  # handed to the reader, who would otherwise wait for ever
            failures.append(error)
            streamer.end()

    worker = Thread(target=work, daemon=True)
    worker.start()
    try:
        yield from filter(None, up_to_stop(streamer, options.stop))
    finally:
        stopped.set()
        worker.join()
    if failures:
        raise failures[0]


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SamplingOptions, longest: int
) -> GenerationConfig:
    positions = _learned_positions(model)
    if positions is not None and longest >= positions:
        raise RecordError(
            f"{tokenizer.name_or_path}: expected prompts of fewer tokens than the {positions} positions that the model "
            f"has learned, found one of {longest}; shorten it or leave it out."
        )
    eos = cast(Any, model.generation_config).eos_token_id
    sampled = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=options.max_new_tokens
        if positions is None
        else min(options.max_new_tokens, positions - longest),
        num_return_sequences=options.samples,
        eos_token_id=eos if eos is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=list(options.stop) or None,
        repetition_penalty=options.repetition_penalty,
        **(sampled if options.temperature > 0 else {"do_sample": False}),
    )


def _learned_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has a vector for; None where it computes them."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    return most if most is not None and any(most <= size <= most + _OFFSET for size in tables) else None


def _answer(text: str, tokens: Sequence[int], input_tokens: int, config: GenerationConfig) -> Answer:
    """Return what a row of generated tokens, which `text` is of, says."""
    length, ended = _length(tokens, config)
    kept = stopped_at(text, config.stop_strings or ())
    return Answer(kept, input_tokens, length, not ended and kept == text and length == config.max_new_tokens)


def _length(tokens: Sequence[int], config: GenerationConfig) -> tuple[int, bool]:
    """Return how many tokens were generated, and whether one ended the answer.

    They count up to that one, with it, or to the padding behind them.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for place, token in enumerate(tokens):
        if token in ends:
            return place + 1, True
    length = len(tokens)
    while length and tokens[length - 1] == config.pad_token_id:
        length -= 1
    return length, False
