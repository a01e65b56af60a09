"""A grafted directory as a running server: engine, endpoint, and a graceful end."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import Request
from starlette.responses import Response

from graftllm.errors import ServingError
from graftllm.fusion.shelf import default_limit
from graftllm.serving.app import Backend, build_app
from graftllm.serving.desk import Desk
from graftllm.serving.engine import Engine
from graftllm.serving.protocol import ChatRequest, CompletionRequest
from graftllm.serving.shelves import Library

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LOOPBACK_HOSTS = ("127.0.0.1", "[::1]", "localhost")  # as a request names them


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        pack_memory: bytes of decoded packs that are kept; None for the model's size, or 1 GiB, if there is room.
        max_queue: choices that may wait.
        max_batch: choices that are written at once.
        max_context: tokens of prompt and answer together; None for what the model was made for.
        max_body: bytes of a request.
    """

    pack_memory: int | None = None
    max_queue: int = 256
    max_batch: int = 32
    max_context: int | None = None
    max_body: int = 4 << 20


class Local:
    """An engine in this process, as the endpoint's backend."""

    def __init__(self, directory: Path, limits: Limits = Limits(), *, device: str = "auto") -> None:
        """Load a grafted directory and begin to work.

        Raises:
            FusionError: the directory is no grafted model, or its base cannot be served.
            ServingError: neither the model nor `limits` says how many tokens it can read.
            CheckpointError: the base is missing or cannot be loaded.
            PackError: a pack is damaged or was made for another base.
        """
        library = Library(directory, device=device)
        model = library.grafted.model
        known = [limits.max_context, getattr(model.config.get_text_config(), "max_position_embeddings", None)]
        context = min((length for length in known if length), default=0)
        if not context:
            raise ServingError(
                f"{directory}: the model does not say how many tokens it can read; say how many with --max-context."
            )
        memory = limits.pack_memory
        if memory is None:
            memory = default_limit(model)
        self._engine = library.engine = Engine(
            library.grafted,
            library.digests,
            memory_bytes=memory,
            max_queue=limits.max_queue,
            max_batch=limits.max_batch,
        )
        self._desk = Desk(self._engine, lambda: library.voices, context)
        self.metrics, self.models, self.card = self._engine.metrics, library.models, library.card
        self.add, self.remove = library.add, library.remove
        self.measured, self.stop = self._engine.measured, self._engine.stop

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._engine.alive

    async def answer(self, asked: ChatRequest | CompletionRequest, request: Request) -> Response:
        """Return the answer to a request, or the stream of it."""
        return await self._desk.answer(asked, request)


def serve(
    backend: Callable[[], Backend],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    admin_key: str | None = None,
    max_body: int = Limits.max_body,
) -> None:
    """Serve until a signal says to stop; then finish what was begun.

    Args:
        backend: makes what is served, when the address is known to be one that may be served at.
        host: an address of this machine.
        port: 0 for a free one.
        api_key: needed where others than this machine can reach the server.
        admin_key: allows to change packs.
        max_body: the most bytes of a request.

    Raises:
        ServingError: the address is open to others and there is no key, a key is empty, or nobody can listen there.
    """
    if host not in _LOOPBACK and not api_key:
        raise ServingError(
            f"--host {host}: expected an --api-key where other machines can reach the server; give one, or serve at "
            "127.0.0.1."
        )
    _check_free(host, port)
    hosts = None if api_key else _LOOPBACK_HOSTS  # with a key, a proxy may be in front
    app = build_app(backend(), hosts=hosts, api_key=api_key, admin_key=admin_key, max_body=max_body)
    uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="info", access_log=False)).run()


def _check_free(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at, before a model is loaded for it."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ServingError(
            f"--host {host}, --port {port}: cannot listen there ({error.strerror or error}); give another one, or port "
            "0 for any that is free."
        ) from error
