"""Models behind an OpenAI-compatible URL: many requests at once, each tried until it is answered.

Works with whatever speaks `POST /chat/completions`: vLLM, TGI, llama.cpp, SGLang, hosted services. A
key is read from the environment when it is needed; it stands in no file, no message and no log.
"""

import asyncio
import email.utils
import hashlib
import os
import random
from asyncio import sleep
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import openai
from openai import AsyncOpenAI
from pydantic import BaseModel, Field, ValidationError

from graftllm.errors import RecipeError, SamplingError
from graftllm.progress import progress, say
from graftllm.records import Message, Prompt, Response
from graftllm.sampling.reasoning import with_reasoning, without_reasoning
from graftllm.sampling.responses import File, Key
from graftllm.transfer_options import Endpoint, SamplingOptions, SourceOptions

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0  # before a second and a late try, when the server does not say
_LONGEST_OBEYED_S = 3600.0  # of what a server says
_PASSING = {408, 409, 425, 429}  # statuses below 500 that may be gone at the next try


@dataclass(frozen=True)
class Request:
    """One question, to be answered `samples` times with one seed."""

    messages: Sequence[Message]
    samples: int
    seed: int
    about: str  # what it is, for messages


@dataclass(frozen=True)
class Reply:
    """The answers to a request, which of them were cut off at the longest length, and the tokens counted."""

    texts: tuple[str, ...]
    truncated: tuple[bool, ...]
    input_tokens: int
    output_tokens: int


class EndpointSource:
    """A source behind a URL."""

    def __init__(self, options: SourceOptions) -> None:
        """Check that the key is there.

        Raises:
            RecipeError: the environment variable that the options name is not set.
        """
        read_key(options)
        self.options, self.name = options, options.name

    def answer(
        self, prompts: Sequence[Prompt], done: Collection[Key], options: SamplingOptions, *, seed: int, file: File
    ) -> int:
        """Answer as `Source` says; draws depend on the seed, name, prompt and sample.

        Raises:
            SamplingError: more requests fail for good than `max_failures` allows.
        """
        asked: dict[str, tuple[Prompt, range]] = {}  # by `about`
        requests: list[Request] = []
        for prompt in prompts:
            for first in range(0, options.samples, self.options.samples_per_request):
                samples = range(first, min(first + self.options.samples_per_request, options.samples))
                if all((prompt.id, sample) in done for sample in samples):
                    continue
                digest = hashlib.sha256(f"{seed} {self.name} {prompt.id} {first}".encode()).digest()
                about = f"prompt {prompt.id!r}, sample {first}"
                draw = int.from_bytes(digest[:4], "big") >> 1  # 31 bits: what every server takes
                requests.append(Request(prompt.question, len(samples), draw, about))
                asked[about] = (prompt, samples)

        def deliver(request: Request, reply: Reply) -> None:
            prompt, samples = asked[request.about]
            rows = []
            for sample, text, truncated in zip(samples, reply.texts, reply.truncated, strict=True):
                if (prompt.id, sample) not in done:
                    tokens = (reply.input_tokens, reply.output_tokens) if not rows else (0, 0)
                    rows.append(Response(prompt.id, self.name, sample, text, None, None, truncated, *tokens))
            file(rows)

        return ask(self.options, requests, options, deliver, label=f"sampling {self.name}")


def ask(
    endpoint: Endpoint,
    requests: Sequence[Request],
    sampling: SamplingOptions,
    deliver: Callable[[Request, Reply], None],
    *,
    label: str,
) -> int:
    """Send every request, at most `endpoint.concurrency` at once; hand over each reply as it comes.

    Returns:
        How many requests failed for good; at most `endpoint.max_failures`.

    Raises:
        SamplingError: more failed; what was delivered before stays delivered.
        RecipeError: the key is not in the environment.
    """
    with progress(label) as show:
        return _run(_ask(endpoint, requests, sampling, deliver, show))


def _run(asking: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine to its end, in a thread of its own where this one has an event loop: notebooks, servers."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(asking)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, asking).result()


def read_key(endpoint: Endpoint) -> str:
    """Return the key of an endpoint, from the environment; one that needs none gets a word that is none.

    Raises:
        RecipeError: the variable is not set, or holds what cannot be a key.
    """
    if endpoint.api_key_env is None:
        return "none"
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise RecipeError(
            f"{endpoint.model}: expected a key in the environment variable {endpoint.api_key_env!r} (api_key_env), "
            f"found {'something unprintable' if key else 'nothing'}; export it and run the same command again."
        )
    return key


async def _ask(
    endpoint: Endpoint,
    requests: Sequence[Request],
    sampling: SamplingOptions,
    deliver: Callable[[Request, Reply], None],
    show: Callable[[int, int], None],
) -> int:
    answered, failures, told = 0, list[str](), list[str]()

    def fails(problem: str) -> None:
        """Tell once, while nothing was answered, why requests are sent again: they may be for minutes."""
        if not answered and not told:
            told.append(problem)
            say(f"{endpoint.model} at {endpoint.url}: {problem}; asking again, up to {endpoint.retries} times")

    async def work(client: AsyncOpenAI, waiting: Iterable[Request]) -> None:
        nonlocal answered
        for request in waiting:
            try:
                deliver(request, await _reply(client, endpoint, request, sampling, fails))
            except _Failed as failed:
                failures.append(f"{request.about}: {failed}")
                if failed.for_all or len(failures) > endpoint.max_failures:
                    raise SamplingError(
                        f"{endpoint.model} at {endpoint.url}: {failures[-1]}. {answered} of {len(requests)} requests "
                        "were answered and are kept; mend this and run the same command again to go on "
                        "(max_failures lets single requests fail)."
                    ) from None
            answered += 1
            show(answered, len(requests))

    client = AsyncOpenAI(api_key=read_key(endpoint), base_url=endpoint.url, timeout=endpoint.timeout_s, max_retries=0)
    show(0, len(requests))
    waiting = iter(requests)  # shared: each worker takes the next
    try:
        async with client, asyncio.TaskGroup() as group:
            for _ in range(min(endpoint.concurrency, len(requests))):
                group.create_task(work(client, waiting))
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
    return len(failures)


async def _reply(
    client: AsyncOpenAI,
    endpoint: Endpoint,
    request: Request,
    sampling: SamplingOptions,
    fails: Callable[[str], None],
) -> Reply:
    """Try a request until it is answered; _Failed when it cannot be, or not within the retries.

    `fails` is told of each try that did not succeed and is not the last.
    """
    jitter, problem = random.Random(request.seed), ""
    for attempt in range(endpoint.retries + 1):
        obeyed = None
        try:
            async with asyncio.timeout(endpoint.timeout_s):  # the client's own is for each part of a reply
                content = await _send(client, endpoint, request, sampling)
            return _read(content, request, endpoint)
        except openai.APIStatusError as error:
            problem = f"status {error.status_code}: {_told(error, endpoint)}"
            if error.status_code < 500 and error.status_code not in _PASSING:
                raise _Failed(problem, for_all=error.status_code in (401, 403, 404)) from None
            obeyed = _retry_after(error.response.headers)
        except (openai.APITimeoutError, TimeoutError):
            problem = f"no whole reply within {endpoint.timeout_s:g} s (timeout_s)"
        except openai.APIConnectionError as error:
            problem = f"no connection or a broken one ({_told(error.__cause__ or error, endpoint)})"
        except (ValueError, openai.APIResponseValidationError) as error:
            problem = f"not a chat completion ({_told(error, endpoint)})"
        if attempt < endpoint.retries:
            fails(problem)
            wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * jitter.uniform(0.5, 1)
            await sleep(max(wait, obeyed or 0))
    raise _Failed(f"failed {endpoint.retries + 1} times, the last time with {problem}")


async def _send(client: AsyncOpenAI, endpoint: Endpoint, request: Request, sampling: SamplingOptions) -> bytes:
    optional: dict[str, Any] = {}  # what a server may not know is sent only when it is asked for
    if request.samples > 1:
        optional["n"] = request.samples
    if sampling.stop:
        optional["stop"] = list(sampling.stop)
    if sampling.repetition_penalty != 1:
        optional["extra_body"] = {"repetition_penalty": sampling.repetition_penalty}
    raw = await client.chat.completions.with_raw_response.create(
        model=endpoint.model,
        messages=cast(Any, [dict(message) for message in request.messages]),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        seed=request.seed,
        **optional,
    )
    return raw.content


class _Said(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(BaseModel):
    message: _Said
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def _read(content: bytes, request: Request, endpoint: Endpoint) -> Reply:
    """Return what a completion says; ValueError when it is none or has too few answers."""
    completion = _Completion.model_validate_json(content)
    if len(completion.choices) != request.samples:
        raise ValueError(
            f"{len(completion.choices)} answers where n = {request.samples} were asked for; "
            "samples_per_request: 1 suits servers that do not know `n`"
        )
    usage = completion.usage or _Usage()
    return Reply(
        tuple(_text(choice.message, endpoint) for choice in completion.choices),
        tuple(choice.finish_reason == "length" for choice in completion.choices),
        usage.prompt_tokens,
        usage.completion_tokens,
    )


def _text(said: _Said, endpoint: Endpoint) -> str:
    answer, reasoning = said.content or "", said.reasoning_content or said.reasoning or ""
    return with_reasoning(reasoning, answer) if endpoint.reasoning == "keep" else without_reasoning(answer)


class _Failed(Exception):
    """A request that will not be answered, and whether any other would be."""

    def __init__(self, problem: str, *, for_all: bool = False) -> None:
        super().__init__(problem)
        self.for_all = for_all


def _told(error: BaseException, endpoint: Endpoint) -> str:
    """Return what an error says, in one short line in which the key does not stand."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    else:
        text = str(error) or type(error).__name__
    if endpoint.api_key_env is not None:
        text = text.replace(read_key(endpoint), "***")
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait, given as such or as a date; None when it does not say."""
    told = headers.get("retry-after", "")
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = (email.utils.parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), _LONGEST_OBEYED_S) if seconds == seconds else None
