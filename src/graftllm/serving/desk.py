"""The desk between the endpoint's event loop and the engine's thread: requests become orders, events answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from graftllm.errors import GraftError, PackError, PackGoneError, RecordError, is_failure
from graftllm.fusion.manifest import AUTO
from graftllm.fusion.voices import Voice, Voices
from graftllm.records import Message
from graftllm.rendering import render
from graftllm.serving.engine import Engine
from graftllm.serving.lanes import Job
from graftllm.serving.orders import Chosen, Ended, Event, Failed, Order, Piece, Reading, Refused
from graftllm.serving.protocol import Answer, ChatRequest, Choice, CompletionRequest, error_body

_DONE = "data: [DONE]\n\n"
Asked = ChatRequest | CompletionRequest
T = TypeVar("T")


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Desk:
    """Answers requests with an engine."""

    def __init__(self, engine: Engine, voices: Callable[[], Voices], max_context: int) -> None:
        """Serve prompts and answers of at most `max_context` tokens together.

        `voices` returns those of the packs that there are now.
        """
        self._engine, self._voices, self._max_context = engine, voices, max_context

    async def answer(self, asked: Asked, request: Request) -> Response:
        """Return the answer to a request, or the stream of it.

        Raises:
            Refused: it cannot be answered as asked.
        """
        orders = await asyncio.to_thread(self._orders, asked)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(number: int, event: Event) -> None:
            if isinstance(event, Piece | Ended):
                event = replace(event, choice=number * asked.n + event.choice)
            if number == 0 or not isinstance(event, Chosen):  # several prompts are all of one named pack
                with suppress(RuntimeError):  # the loop may be closed when the server was made to stop at once
                    loop.call_soon_threadsafe(events.put_nowait, event)

        jobs, gone, handed_over = list[Job](), asyncio.ensure_future(leaves(request)), False

        async def over() -> None:
            gone.cancel()
            for job in jobs:
                self._engine.cancel(job)

        try:
            for number, order in enumerate(orders):
                jobs.append(self._engine.submit(order, partial(emit, number)))
            chosen = cast(Chosen, await _next(events, gone))
            count, read = asked.n * len(orders), sum(len(order.reading(chosen.pack).ids) for order in orders)
            answer = Answer(isinstance(asked, ChatRequest), asked.model, read, chosen, [Choice() for _ in range(count)])
            headers = chosen_headers(chosen)
            if asked.stream:
                handed_over = True
                return Stream(_chunks(answer, events, gone, with_usage=asked.with_usage), headers, over)
            while not answer.whole:
                answer.take(cast(Piece | Ended, await _next(events, gone)))
            return JSONResponse(answer.body(), headers=headers)
        except ClientGone:
            return Response(status_code=499)
        finally:
            if not handed_over:
                await over()

    def _orders(self, asked: Asked) -> list[Order]:
        """Return what a request asks of the engine, by prompt; takes time for long ones."""
        texts, most = asked.n * (1 if isinstance(asked, ChatRequest) else len(asked.prompts)), self._engine.max_queue
        if texts > most:
            raise Refused(f"n: expected at most {most} texts in all, as many as may wait; found {texts}.", param="n")
        if isinstance(asked, ChatRequest):
            messages = [message.plain() for message in asked.messages]
            voices = self._voices()
            return [self._order(asked, voices, messages, lambda one: render(one.tokenizer, messages, answer_next=True))]
        if len(asked.prompts) > 1 and asked.model == AUTO:
            raise Refused("prompt: auto chooses for one prompt at a time; name a pack, or send one.", param="prompt")
        voices = self._voices()
        return [self._continued(asked, voices, prompt) for prompt in asked.prompts]

    def _order(
        self, asked: Asked, voices: Voices, messages: list[Message], read: Callable[[Voice], list[int]]
    ) -> Order:
        """Return what a request asks for a prompt, as the router sees it and as `read` puts it into a voice's tokens.

        It is read in the voice of the pack that is named, or of the base; where the router chooses a pack with another
        voice, once more in that.
        """
        known = dict[str, Reading]()
        what = "messages: the chat template" if isinstance(asked, ChatRequest) else "prompt: the tokenizer"

        def reading(pack: str) -> Reading:
            if pack in known:
                return known[pack]
            voice = _voice(self._engine.voices if known else voices, pack)  # the router may know newer packs
            if (same := next((one for one in known.values() if one.voice is voice), None)) is None:
                try:
                    ids = read(voice)
                except Refused:
                    raise
                except BaseException as error:  # templates raise what they like at conversations that they do not know
                    if not is_failure(error):
                        raise
                    raise Refused(f"{what} refuses them ({error}).", param=what.partition(":")[0]) from error
                same = self._reading(asked, ids, voice)
            known[pack] = same
            return same

        reading(asked.model)
        return Order(
            messages=messages,
            reading=reading,
            pack=asked.model,
            choices=asked.n,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=max(asked.top_k, 0),
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            frequency_penalty=asked.frequency_penalty,
            presence_penalty=asked.presence_penalty,
            seed=asked.seed,
            stop=asked.stops,
            top_logprobs=asked.alternatives,
        )

    def _reading(self, asked: Asked, ids: list[int], voice: Voice) -> Reading:
        field = "messages" if isinstance(asked, ChatRequest) else "prompt"
        if not ids:
            raise Refused("prompt: expected at least one token, found none.", param="prompt")
        if (highest := max(ids)) >= voice.rows:
            raise Refused(
                f"{field}: the tokenizer makes it token {highest}, and the model knows {voice.rows:,}.", param=field
            )
        room = self._max_context - len(ids)
        longest = max(room, 0) if asked.longest is None else asked.longest
        if room < max(longest, 1):
            raise Refused(
                f"expected prompt and answer to have at most {self._max_context} tokens together, found a prompt of "
                f"{len(ids)} and {max(longest, 1)} asked for. Shorten the prompt or lower max_tokens.",
                param=field,
                code="context_length_exceeded",
            )
        return Reading(ids, voice, longest)

    def _continued(self, asked: CompletionRequest, voices: Voices, prompt: str | list[int]) -> Order:
        if isinstance(prompt, str):
            turn = [Message(role="user", content=prompt)]
            return self._order(asked, voices, turn, lambda one: one.tokenizer(prompt)["input_ids"])
        voice = _voice(voices, asked.model)
        vocabulary = min(len(voice.tokenizer), voice.rows)
        if (bad := next((one for one in prompt if not 0 <= one < vocabulary), None)) is not None:
            raise Refused(f"prompt: expected tokens from 0 to {vocabulary - 1}, found {bad}.", param="prompt")
        words = voice.tokenizer.convert_ids_to_tokens(prompt)

        def read(other: Voice) -> list[int]:
            if other is not voice and other.tokenizer.convert_ids_to_tokens(prompt) != words:
                raise Refused(
                    "prompt: auto chose a pack of another vocabulary than the base's, in which the tokens are; name "
                    "the pack, or send text.",
                    param="prompt",
                )
            return prompt

        text = cast(str, voice.tokenizer.decode(prompt))  # for the router
        return self._order(asked, voices, [Message(role="user", content=text)], read)


def _voice(voices: Voices, name: str) -> Voice:
    try:
        return voices[name]
    except PackError as error:
        raise _failed(error) from error


def _failed(error: BaseException) -> Refused:
    """Return what is told of an order that cannot be finished."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, RecordError):  # the router cannot read so long a prompt, say
        return Refused(str(error))
    if isinstance(error, PackGoneError):
        return Refused("pack: it was removed while this waited for it; ask again.", status=404, code="model_not_found")
    told = str(error) if isinstance(error, GraftError) else "the server failed at this; its log says where."
    return Refused(told, status=500, code="engine_failed")


class Stream(StreamingResponse):
    """A stream of events that says when it is over, also if it never began."""

    def __init__(
        self, chunks: AsyncIterator[str | bytes], headers: dict[str, str], over: Callable[[], Awaitable[None]]
    ) -> None:
        """Send chunks, and await `over` at the end."""
        super().__init__(chunks, headers=headers | {"cache-control": "no-cache"}, media_type="text/event-stream")
        self._over = over

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send all."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._over()


async def _chunks(
    answer: Answer, events: asyncio.Queue[Event], gone: asyncio.Future[None], *, with_usage: bool
) -> AsyncIterator[str]:
    try:
        for chunk in answer.first_chunks():
            yield sent(chunk)
        while not answer.whole:
            event = cast(Piece | Ended, await _next(events, gone))
            yield sent(answer.chunk(event))
            answer.take(event)
        if with_usage:
            yield sent(answer.usage_chunk())
        yield _DONE
    except ClientGone:
        pass
    except Refused as error:
        yield sent(error_body(str(error), status=error.status, code=error.code))


def chosen_headers(chosen: Chosen) -> dict[str, str]:
    """Return the headers that say which pack answers, and what the router thought."""
    headers = {"x-graftllm-pack": chosen.pack, "x-graftllm-reason": chosen.reason}
    if chosen.probabilities is not None:
        headers["x-graftllm-probabilities"] = json.dumps({k: round(p, 6) for k, p in chosen.probabilities.items()})
    return headers


async def _next(events: asyncio.Queue[Event], gone: asyncio.Future[None]) -> Event:
    """Return the next event.

    Raises:
        ClientGone: the client left.
        Refused: the order failed.
    """
    if events.empty():
        event = await unless_gone(events.get(), gone)
    else:
        event = events.get_nowait()
    if isinstance(event, Failed):
        raise _failed(event.error) from event.error
    return event


async def unless_gone(waiting: Coroutine[Any, Any, T], gone: asyncio.Future[None]) -> T:
    """Return what is waited for.

    Raises:
        ClientGone: the client left before; the waiting has ended, too.
    """
    task = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        if task.cancel():
            await asyncio.wait((task,))


async def leaves(request: Request) -> None:
    """Return when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sent(chunk: dict[str, Any]) -> str:
    """Return an event of a stream."""
    return f"data: {json.dumps(chunk)}\n\n"
