"""What every request passes first: the host, the key, the size of its body, and the count of requests."""

import hmac
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse

from graftllm.serving.metrics import Metrics
from graftllm.serving.protocol import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_OPEN = ("/", "/health")  # need no key: the page asks for one itself
_DRAINED = 64 << 20  # bytes of a refused body that are read, so that the client reads the refusal


class Gate:
    """ASGI middleware around the endpoint."""

    def __init__(
        self,
        app: Any,
        *,
        hosts: Collection[str] | None,
        api_key: str | None,
        admin_key: str | None,
        max_body: int,
        metrics: Metrics,
    ) -> None:
        """Guard an application.

        Args:
            app: it.
            hosts: what `Host` may say, whatever the port; None for anything. A web page whose name was made to lead
                here says its own name.
            api_key: what `Authorization: Bearer` has to say; None for nothing.
            admin_key: the same for changing packs; None forbids that to everybody.
            max_body: the most bytes of a body.
            metrics: where requests are counted.
        """
        self._app, self._max_body, self._metrics = app, max_body, metrics
        self._hosts, self._api_key, self._admin_key = hosts, api_key, admin_key

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request that is refused, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        refused = self._refusal(scope)
        if refused is not None:
            if refused.status_code == 413:
                await _drain(receive)
            await refused(scope, receive, counted)
            return
        await self._app(scope, self._limited(receive), counted)

    def _refusal(self, scope: MutableMapping[str, Any]) -> JSONResponse | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1").lower())
        if self._hosts is not None and host not in self._hosts:
            return _refusal(403, f"expected the host {' or '.join(self._hosts)}, found {host!r}.")
        admin = scope["path"].startswith("/v1/packs")
        expected = self._admin_key if admin else self._api_key
        if admin and expected is None:
            return _refusal(403, "packs can be changed only where the server has an --admin-key.")
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if expected is not None and scope["path"] not in _OPEN and not hmac.compare_digest(given, expected.encode()):
            return _refusal(401, f"expected the {'admin' if admin else 'API'} key as `Authorization: Bearer KEY`.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            return _refusal(413, self._too_large(int(length)))
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Return a `receive` that raises when a body of unknown length becomes too large."""
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body:
                await _drain(receive)
                raise HTTPException(413, self._too_large(read))
            return message

        return limited

    def _too_large(self, found: int) -> str:
        return f"the body has {found:,} bytes or more, and at most {self._max_body:,} are taken."


async def _drain(receive: Receive) -> None:
    """Read what is left of a body, up to a limit, and forget it."""
    read = 0
    while read < _DRAINED:
        message = await receive()
        read += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


def _refusal(status: int, message: str) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(error_body(message, status=status), status, headers)
