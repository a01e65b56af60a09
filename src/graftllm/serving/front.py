"""Our router in front of another OpenAI-compatible server that has the packs as adapters, such as vLLM.

Requests for `auto` are routed here, on the base in this process; every request goes on with the name
of its pack as the model, which is how vLLM and others choose an adapter. Streams pass through.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx2
from fastapi import Request
from starlette.responses import Response

from graftllm.errors import ServingError
from graftllm.fusion.manifest import AUTO
from graftllm.fusion.names import unknown_pack
from graftllm.fusion.routes import BASE
from graftllm.records import Message
from graftllm.serving.desk import ClientGone, Stream, chosen_headers, leaves, sent, unless_gone
from graftllm.serving.metrics import Metrics
from graftllm.serving.orders import Chosen, Refused
from graftllm.serving.protocol import ChatRequest, CompletionRequest, error_body
from graftllm.serving.shelves import Library

_PATIENCE = httpx2.Timeout(10, read=600)


class Front:
    """Another server, as the endpoint's backend."""

    def __init__(self, directory: Path, url: str, *, key: str | None = None, device: str = "auto") -> None:
        """Load the router and its base, and look which packs the other server has.

        Args:
            directory: a grafted model.
            url: of the other server, with or without `/v1`.
            key: its API key.
            device: of the base that routes; `auto` takes a GPU when there is one.

        Raises:
            ServingError: the other server does not answer, or does not tell which of its models is the base.
            FusionError: the directory is no grafted model, or a file of it was changed.
        """
        self._library, self.metrics = Library(directory, device=device), Metrics()
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.AsyncClient(timeout=_PATIENCE)
        self._ids = self._found()
        self._base = self._base_name()
        self.card = self._library.card

    @property
    def alive(self) -> bool:
        """Whether requests are passed on."""
        return True

    def models(self) -> dict[str, dict[str, Any]]:
        """Return what can be asked for: of the packs, those that the other server has by now."""
        found, names = self._library.models(), self._names(fresh=True)
        return {name: about for name, about in found.items() if name == AUTO or name in names}

    async def answer(self, asked: ChatRequest | CompletionRequest, request: Request) -> Response:
        """Pass a request on, and its answer back.

        Raises:
            Refused: there is no such pack, or the other server does not answer.
        """
        chosen, name = await asyncio.to_thread(self._choose, asked)
        self.metrics.answered.labels(chosen.pack).inc()
        body = json.loads(await request.body()) | {"model": name}
        if ends := await asyncio.to_thread(self._own_ends, chosen.pack):
            body["stop_token_ids"] = ends
        path = "/chat/completions" if isinstance(asked, ChatRequest) else "/completions"
        passed = self._client.build_request("POST", self._url + path, json=body, headers=self._headers)
        gone, answer, handed_over = asyncio.ensure_future(leaves(request)), None, False

        async def over() -> None:
            gone.cancel()
            if answer is not None:
                await answer.aclose()  # the engine sees that nobody reads on

        try:
            answer = await unless_gone(self._client.send(passed, stream=True), gone)
            headers, kind = chosen_headers(chosen), answer.headers.get("content-type", "application/json")
            if answer.is_success and kind.startswith("text/event-stream"):
                handed_over = True
                return Stream(_events(answer, gone, self._url), headers, over)
            content = await unless_gone(answer.aread(), gone)
            return Response(content, answer.status_code, headers | {"content-type": kind})
        except ClientGone:
            return Response(status_code=499)
        except httpx2.HTTPError as error:
            raise Refused(_broken(self._url, error), status=502, code="engine") from error
        finally:
            if not handed_over:
                await over()

    def add(self, name: str, file: Path) -> None:
        """Refuse: the other server has the packs."""
        raise Refused(_ELSEWHERE, status=501)

    def remove(self, name: str) -> None:
        """Refuse: the other server has the packs."""
        raise Refused(_ELSEWHERE, status=501)

    def measured(self) -> bytes:
        """Return the metrics."""
        self.metrics.packs.set(len(self._names()) - 1)
        return self.metrics.text()

    def stop(self) -> None:
        """Do nothing: what was taken has been passed back."""

    def _choose(self, asked: ChatRequest | CompletionRequest) -> tuple[Chosen, str]:
        """Return the pack that answers, and what the other server calls it."""
        if asked.model != AUTO:
            names = self._names()
            if asked.model not in names and asked.model in self._library.packs:
                names = self._names(fresh=True)
            if asked.model not in names:
                known = [BASE, AUTO, *(name for name in names if name != BASE)]
                error = str(unknown_pack(asked.model, known))
                raise Refused(error, status=404, param="model", code="model_not_found")
            return Chosen(asked.model), names[asked.model]
        if isinstance(asked, ChatRequest):
            messages = [message.plain() for message in asked.messages]
        elif isinstance(asked.prompt, str):
            messages = [Message(role="user", content=asked.prompt)]
        else:
            raise Refused("prompt: auto needs a text to choose by; name a pack, or send text.", param="prompt")
        started = perf_counter()
        route = self._library.route(messages)
        self.metrics.routing.observe(perf_counter() - started)
        names = self._names()
        pack = route.name if route.name in names else BASE
        return Chosen(pack, route.probabilities, route.reason), names[pack]

    def _own_ends(self, pack: str) -> tuple[int, ...]:
        """Return the tokens that end a pack's answers where they are not the base's, which the engine knows."""
        voices = self._library.voices
        return voices[pack].ends if voices[pack].ends != voices.base.ends else ()

    def _names(self, *, fresh: bool = False) -> dict[str, str]:
        """Return what the other server calls the base and each pack that there is and that it has.

        Args:
            fresh: ask it again; one that does not answer has what it had.
        """
        if fresh:
            with suppress(ServingError):
                self._ids = self._found()
        packs = self._library.packs
        return {BASE: self._base} | {name: name for name in self._ids if name in packs}

    def _found(self) -> list[str]:
        """Return the names of all models that the other server has."""
        try:
            answer = httpx2.get(f"{self._url}/models", headers=self._headers, timeout=_PATIENCE)
            return [str(model["id"]) for model in answer.raise_for_status().json()["data"]]
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ServingError(
                f"--engine {self._url}: expected an OpenAI-compatible server that lists its models ({error}). "
                "Start it first; `graftllm export DIR --format vllm` writes the command."
            ) from error

    def _base_name(self) -> str:
        """Return what the other server calls the base."""
        others = [name for name in self._ids if name not in self._library.packs and name != AUTO]
        base = BASE if BASE in others else others[0] if len(others) == 1 else None
        if base is None:
            raise ServingError(
                f"--engine {self._url}: expected one model beside the packs, the base; found "
                f"{', '.join(others) or 'none'}. Start it with --served-model-name base."
            )
        return base


_ELSEWHERE = "the packs are on another engine; add and remove them there."


async def _events(answer: httpx2.Response, gone: asyncio.Future[None], url: str) -> AsyncIterator[bytes]:
    """Yield whole lines of a stream; when it breaks, an error in the place of what is missing."""
    held, pieces = b"", answer.aiter_bytes()

    async def more() -> bytes | None:
        return await anext(pieces, None)

    try:
        while (piece := await unless_gone(more(), gone)) is not None:
            held += piece
            whole = held.rfind(b"\n") + 1
            if whole:
                yield held[:whole]
                held = held[whole:]
        yield held
    except ClientGone:
        pass
    except httpx2.HTTPError as error:
        yield f"\n{sent(error_body(_broken(url, error), status=502, code='engine'))}".encode()


def _broken(url: str, error: httpx2.HTTPError) -> str:
    return f"the engine at {url} does not answer, or not to the end ({str(error) or type(error).__name__})."
