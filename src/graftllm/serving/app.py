"""The endpoint: OpenAI's paths, the packs' own, the page, and what the machine's keepers ask for."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from graftllm.errors import GraftError, ServingError
from graftllm.serving.gate import Gate
from graftllm.serving.metrics import Metrics
from graftllm.serving.orders import Refused, unknown_model
from graftllm.serving.protocol import ChatRequest, CompletionRequest, Strict, error_body

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Backend(Protocol):
    """What the endpoint serves: an engine of its own, or another server behind a router."""

    metrics: Metrics

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        ...

    async def answer(self, asked: ChatRequest | CompletionRequest, request: Request) -> Response:
        """Return the answer to a request, or the stream of it."""
        ...

    def models(self) -> dict[str, dict[str, Any]]:
        """Return what can be asked for, by name."""
        ...

    def card(self, name: str) -> dict[str, Any]:
        """Return what a pack is made of."""
        ...

    def add(self, name: str, file: Path) -> None:
        """Put a pack on the shelf."""
        ...

    def remove(self, name: str) -> None:
        """Take a pack off the shelf."""
        ...

    def measured(self) -> bytes:
        """Return the metrics."""
        ...

    def stop(self) -> None:
        """Finish what was taken."""
        ...


class NewPack(Strict):
    """The body of `POST /v1/packs`: a name, and a file on the server's machine."""

    name: str
    file: Annotated[str, Field(pattern=r"^[^\x00]+$")]


def build_app(
    backend: Backend,
    *,
    hosts: Collection[str] | None = None,
    api_key: str | None = None,
    admin_key: str | None = None,
    max_body: int = 4 << 20,
) -> Any:
    """Return the ASGI application that serves a backend.

    Args:
        backend: it is stopped when the application shuts down, after the last answer.
        hosts: the names that requests may be sent to; None for any.
        api_key: clients must know it; None lets everybody in.
        admin_key: whoever changes packs must know it; None forbids that.
        max_body: the most bytes of a request.

    Raises:
        ServingError: a key is empty, so that whoever sends none would have it.
    """
    for option, key in (("--api-key", api_key), ("--admin-key", admin_key)):
        if key is not None and not key.strip():
            raise ServingError(f"{option}: expected a key, found an empty text; give one, or leave the option out.")

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(backend.stop)

    app = FastAPI(title="GraftLLM", lifespan=life, docs_url=None, redoc_url=None)
    for kind, shown in _ERRORS.items():
        app.add_exception_handler(kind, shown)
    page = files("graftllm.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": _POLICY, "referrer-policy": "no-referrer"})

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if backend.alive else "stopping"}, 200 if backend.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(backend.measured(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        found = await asyncio.to_thread(backend.models)
        return {"object": "list", "data": [_model(name, about) for name, about in found.items()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        found = await asyncio.to_thread(backend.models)
        if name not in found:
            raise unknown_model(name, found)
        return _model(name, found[name])

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await backend.answer(asked, request)

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await backend.answer(asked, request)

    @app.get("/packs/{name}/card")
    async def card(name: str) -> dict[str, Any]:
        return await asyncio.to_thread(backend.card, name)

    @app.post("/v1/packs")
    async def add(asked: NewPack) -> JSONResponse:
        await asyncio.to_thread(backend.add, asked.name, Path(asked.file))
        return JSONResponse({"object": "pack", "id": asked.name}, 201)

    @app.delete("/v1/packs/{name}")
    async def remove(name: str) -> dict[str, Any]:
        await asyncio.to_thread(backend.remove, name)
        return {"object": "pack", "id": name, "deleted": True}

    return Gate(app, hosts=hosts, api_key=api_key, admin_key=admin_key, max_body=max_body, metrics=backend.metrics)


def _model(name: str, about: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "graftllm", "graftllm": about}


def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    return JSONResponse(
        error_body(str(error), status=error.status, param=error.param, code=error.code), error.status, headers
    )


def _mistaken(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(str(error), status=400), 400)


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        place, message = [], f"the body is not valid JSON ({first.get('ctx', {}).get('error', 'malformed')})"
    elif first["type"] == "extra_forbidden":
        message = "this server does not know this field; leave it out"
    elif not place and first["type"] in ("model_attributes_type", "missing"):
        message = "expected a JSON object, sent with content-type: application/json"
    param = ".".join(place) or None
    return JSONResponse(error_body(f"{param}: {message}" if param else message, status=400, param=param), 400)


def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return JSONResponse(error_body(error.detail, status=error.status_code), error.status_code)


def _bug(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body("the server failed at this; its log says where.", status=500), 500)


_ERRORS: dict[Any, Callable[[Request, Exception], JSONResponse]] = {
    Refused: _refused,
    GraftError: _mistaken,
    RequestValidationError: _invalid,
    HTTPException: _http,
    StarletteHTTPException: _http,
    Exception: _bug,
}
