"""Conversations in, texts out, on a live transformers model.

It knows nothing of packs: whatever weights the model holds are the ones that answer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from graftllm.errors import RecipeError
from graftllm.recipe import SamplingOptions
from graftllm.records import Message
from graftllm.rendering import check_length, ends_of, learned_positions, pad, padding_token, render
from graftllm.stop_texts import stopped_at, up_to_stop

GREEDY = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=256)


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
    ends: Sequence[int] | None = None,
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
        ends: tokens that end an answer; by default what model and tokenizer say.
        seed: of the draws; the same batch, model and seed give the same texts.
        show: called with the number of conversations answered so far, and of all.
        around: entered while a batch runs; it is given the number of the conversation in each of the batch's rows.

    Returns:
        Per conversation its `options.samples` texts, without special tokens.
    """
    found = generate_answers(model, tokenizer, conversations, options, ends=ends, seed=seed, show=show, around=around)
    return [[answer.text for answer in answers] for answers in found]


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    options: SamplingOptions = GREEDY,
    *,
    ends: Sequence[int] | None = None,
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
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # the caller's draws stay what they were
        torch.manual_seed(seed)
        for start in range(0, len(order), options.batch_size):
            batch = order[start : start + options.batch_size]
            ids, mask = pad([prompts[i] for i in batch], tokenizer, model, "left")
            config = _generation_config(model, tokenizer, options, ids.shape[1], ends)
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
    *,
    ends: Sequence[int] | None = None,
) -> Iterator[str]:
    """Yield the answer to one conversation piece by piece as it is generated; closed early, it stops the model.

    It ends before the first stop text; what may be the beginning of one is held back.

    Raises:
        RecipeError: more than one answer is asked for.
    """
    if options.samples > 1:
        raise RecipeError(f"samples: expected 1 for a stream, which is one answer; found {options.samples}.")
    ids, mask = pad([render(tokenizer, messages, answer_next=True)], tokenizer, model)
    config = _generation_config(model, tokenizer, options, ids.shape[1], ends)
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: SamplingOptions,
    longest: int,
    ends: Sequence[int] | None,
) -> GenerationConfig:
    positions = learned_positions(model)
    check_length(longest + 1, positions, tokenizer)
    sampled = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=options.max_new_tokens
        if positions is None
        else min(options.max_new_tokens, positions - longest),
        num_return_sequences=options.samples,
        eos_token_id=list(ends_of(model, tokenizer) if ends is None else ends) or None,
        pad_token_id=padding_token(tokenizer, model),
        stop_strings=list(options.stop) or None,
        repetition_penalty=options.repetition_penalty,
        **(sampled if options.temperature > 0 else {"do_sample": False}),
    )


def _answer(text: str, tokens: Sequence[int], input_tokens: int, config: GenerationConfig) -> Answer:
    """Return what a row of generated tokens, which `text` is of, says."""
    length, ended = _length(tokens, config)
    kept = stopped_at(text, config.stop_strings or ())
    return Answer(kept, input_tokens, length, not ended and kept == text and length == config.max_new_tokens)


def _length(tokens: Sequence[int], config: GenerationConfig) -> tuple[int, bool]:
    """Return how many tokens were generated, and whether one ended the answer.

    They count up to that one, with it, or to the padding behind them.
    """
    ends = config.eos_token_id or []
    for place, token in enumerate(tokens):
        if token in ends:
            return place + 1, True
    length = len(tokens)
    while length and tokens[length - 1] == config.pad_token_id:
        length -= 1
    return length, False
