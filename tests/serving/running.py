"""A served application on a free loopback port, in a thread; and asking an engine without HTTP."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import httpx2
import uvicorn
from openai import OpenAI
from transformers import PreTrainedTokenizerBase

from graftllm.generation import render
from graftllm.records import Message
from graftllm.serving.engine import Engine
from graftllm.serving.orders import Chosen, Ended, Event, Failed, Order, Piece

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


def order(tokenizer: PreTrainedTokenizerBase, question: str, pack: str, **wanted: Any) -> Order:
    messages = [Message(role="user", content=question)]
    return Order(messages, render(tokenizer, messages, answer_next=True), pack, **wanted)


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
