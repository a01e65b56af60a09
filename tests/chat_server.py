"""An OpenAI-compatible endpoint on loopback that answers by a rule, and fails when it is told to."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answering = Callable[[dict[str, Any]], str]


@dataclass
class ChatServer:
    """What a test tells the server, and what the server has seen.

    Attributes:
        url: to give to a source.
        answering: from a request's body to the text of its answer.
        faults: by question, what its next requests get instead of an answer: a status, `429 after 0` (with
            Retry-After), `cut`, `slow`, `trickle` (bytes without end), `no JSON`, `no choices`, `echo` (a 400 that
            quotes the key), `length`.
        seen: bodies of requests, in order.
        keys: Authorization headers.
        most_at_once: most requests that were under way together.
    """

    url: str = ""
    answering: Answering = lambda body: drawn(body)
    faults: dict[str, list[str]] = field(default_factory=dict)
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    most_at_once: int = 0
    under_way: int = 0
    allowed: float = float("inf")  # requests that are answered before the others wait
    changed: threading.Condition = field(default_factory=threading.Condition)
    closing: bool = False

    def allow(self, requests: float) -> None:
        """Let that many requests in all be answered."""
        with self.changed:
            self.allowed = requests
            self.changed.notify_all()


def drawn(body: dict[str, Any]) -> str:
    """An answer that depends on the question and the seed alone."""
    text = f"{body['messages'][-1]['content']} {body.get('seed')} {body['temperature']}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """Serve until the block ends."""
    told = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with told.changed:
                told.seen.append(body)
                told.keys.add(self.headers["Authorization"])
                told.under_way += 1
                told.most_at_once = max(told.most_at_once, told.under_way)
                faults = told.faults.get(body["messages"][-1]["content"], [])
                fault = faults.pop(0) if faults else ""
                number = len(told.seen)
                told.changed.wait_for(lambda: told.closing or number <= told.allowed)
            try:
                self._answer(body, fault)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with told.changed:
                    told.under_way -= 1

        def _answer(self, body: dict[str, Any], fault: str) -> None:
            if fault == "slow":
                with told.changed:
                    told.changed.wait_for(lambda: told.closing)
            elif fault == "trickle":
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                while not told.closing:
                    self.wfile.write(b" ")
                    with told.changed:
                        told.changed.wait_for(lambda: told.closing, timeout=0.05)
            elif fault == "echo":
                self._send(400, json.dumps({"error": {"message": f"bad key {self.headers['Authorization']}"}}))
            elif fault.startswith("429 after"):
                self._send(429, '{"error": {"message": "too fast"}}', {"Retry-After": fault.split()[-1]})
            elif fault.isdigit():
                self._send(int(fault), json.dumps({"error": {"message": f"made to fail with {fault}"}}))
            elif fault == "no JSON":
                self._send(200, "<html>busy</html>")
            elif fault == "no choices":
                self._send(200, '{"choices": []}')
            else:
                self._send(200, json.dumps(_completion(told.answering, body, fault)), cut=fault == "cut")

        def _send(self, status: int, text: str, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
            data = text.encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = cut

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    told.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield told
    finally:
        with told.changed:
            told.closing = True
            told.changed.notify_all()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that were killed


def _completion(answering: Answering, body: dict[str, Any], fault: str) -> dict[str, Any]:
    texts = [answering(body | {"seed": body["seed"] + i}) for i in range(body.get("n", 1))]
    reason = "length" if fault == "length" else "stop"
    choices = [{"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
               for i, text in enumerate(texts)]  # fmt: skip
    usage = {"prompt_tokens": 10, "completion_tokens": 5 * len(texts), "total_tokens": 10 + 5 * len(texts)}
    return {"id": "x", "object": "chat.completion", "model": body["model"], "choices": choices, "usage": usage}
