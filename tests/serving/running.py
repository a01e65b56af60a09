"""A served application on a free loopback port, in a thread; and asking an engine without HTTP."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from queue import Queue
from typing import Any

import httpx2
import uvicorn
from openai import OpenAI
from transformers import PreTrainedTokenizerBase

from graftllm.fusion.voices import Voice
from graftllm.records import Message
from graftllm.rendering import ends_of, render
from graftllm.serving.engine import Engine
from graftllm.serving.orders import Chosen, Ended, Event, Failed, Order, Piece, Reading

PATIENCE_S = 120


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Yield the address of an application that runs until the block ends."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@contextmanager
def client_of(address: str, key: str = "none") -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


@contextmanager
def plain_client(address: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=address, timeout=PATIENCE_S) as client:
        yield client


@contextmanager
def posted(address: str, path: str, body: dict[str, Any], *, buffer: int | None = None) -> Iterator[HTTPConnection]:
    """Send a request and yield its connection, of whose answer nothing is read yet; leave at the end.

    Args:
        address: of the server.
        path: of the request.
        body: sent as JSON.
        buffer: bytes that the kernel may take in before somebody reads.
    """
    host, port = address.removeprefix("http://").split(":")
    with closing(HTTPConnection(host, int(port), timeout=PATIENCE_S)) as line:
        line.sock = socket.socket()
        line.sock.settimeout(PATIENCE_S)
        if buffer is not None:
            line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)  # before it connects
        line.sock.connect((host, int(port)))
        line.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        yield line


def order(tokenizer: PreTrainedTokenizerBase, question: str, pack: str, **wanted: Any) -> Order:
    messages = [Message(role="user", content=question)]
    voice = Voice(tokenizer, ends_of(None, tokenizer), len(tokenizer))
    reading = Reading(render(tokenizer, messages, answer_next=True), voice, wanted.pop("max_tokens", 16))
    return Order(messages, lambda _: reading, pack, **wanted)


class Asked:
    """An order that an engine works on."""

    def __init__(self, engine: Engine, wanted: Order) -> None:
        self.events: Queue[Event] = Queue()
        self.job = engine.submit(wanted, self.events.put)
        self.chosen: Chosen | None = None

    def texts(self) -> list[tuple[str, str]]:
        """Wait until all choices have ended; return their texts, and why they ended."""
        found: dict[int, list[str]] = {i: ["", ""] for i in range(self.job.order.choices)}
        while not all(reason for _, reason in found.values()):
            event = self.events.get(timeout=PATIENCE_S)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Chosen):
                self.chosen = event
            elif isinstance(event, Piece):
                found[event.choice][0] += event.text
            elif isinstance(event, Ended):
                found[event.choice][1] = event.reason
        return [(text, reason) for text, reason in found.values()]
