import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.serving.conftest import Expected
from tests.serving.running import client_of, plain_client, posted

WRITTEN = "graftllm_generated_tokens_total"
LONG = {"model": "one", "prompt": "abc", "max_tokens": 250, "seed": 0, "temperature": 2, "stream": True}
_CLIENT = """
import http.client, sys

line = http.client.HTTPConnection(sys.argv[1])
line.request("POST", "/v1/completions", sys.argv[2], {"content-type": "application/json"})
line.getresponse().read(100)
print("reading", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def plain(address: str) -> Iterator[httpx2.Client]:
    with plain_client(address) as client:
        yield client


def _running(plain: httpx2.Client) -> dict[str, float]:
    lines = [line.split() for line in plain.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def _wait_until_idle(plain: httpx2.Client) -> None:
    while _running(plain)["graftllm_running_choices"] or _running(plain)["graftllm_waiting_choices"]:
        pass


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(address: str, plain: httpx2.Client, stream: bool) -> None:
    asked = {"model": "one", "prompt": "abc", "max_tokens": 250, "n": 64, "seed": 0, "temperature": 2, "stream": stream}
    before = _running(plain)[WRITTEN]
    with posted(address, "/v1/completions", asked):
        while not _running(plain)["graftllm_running_choices"]:
            pass
    _wait_until_idle(plain)
    assert _running(plain)[WRITTEN] - before < 64 * 250 / 4


def test_a_client_that_is_killed_stops_its_answer(address: str, plain: httpx2.Client) -> None:
    asked = LONG | {"n": 128}
    whole = plain.post("/v1/completions", json=asked | {"stream": False}).json()["usage"]["completion_tokens"]
    before = _running(plain)[WRITTEN]
    command = [sys.executable, "-c", _CLIENT, address.removeprefix("http://"), json.dumps(asked)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"reading\n"
        client.send_signal(signal.SIGKILL)
        assert client.wait() == -signal.SIGKILL
    _wait_until_idle(plain)
    assert _running(plain)[WRITTEN] - before < whole


def _in_the_kernel(port: int) -> int:
    """Return the bytes that a server has handed over and its client, at this port, has not read."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    places = [[int(part.rpartition(":")[2], 16) for part in row[1:3]] for row in rows]
    queues = [[int(part, 16) for part in row[4].split(":")] for row in rows]  # to send, to read
    return sum(
        sent * (remote == port) + unread * (local == port)
        for (local, remote), (sent, unread) in zip(places, queues, strict=True)
    )


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="this system does not tell what sockets hold")
def test_a_slow_reader_holds_up_nobody(address: str, plain: httpx2.Client, expected: Expected) -> None:
    asked = LONG | {"n": 128, "logprobs": 5}
    with posted(address, "/v1/completions", asked, buffer=4096) as line, client_of(address) as client:
        port = line.sock.getsockname()[1]
        while not _in_the_kernel(port):
            pass
        quick = client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": "b"}], max_tokens=12, temperature=0
        )
        assert quick.choices[0].message.content == expected("b", "one", 12)
        _wait_until_idle(plain)
        held = _in_the_kernel(port)
        text = line.getresponse().read()
    assert held < len(text)  # the server was stopped in writing
    assert text.endswith(b"data: [DONE]\n\n")
    pieces = [json.loads(piece.removeprefix(b"data: ")) for piece in text.strip().split(b"\n\n")[:-1]]
    assert sum(choice["finish_reason"] is not None for piece in pieces for choice in piece["choices"]) == 128
