import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import pytest

from tests.serving.running import plain_client, posted

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
