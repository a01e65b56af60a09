import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import uvicorn
from openai import AuthenticationError

from graftllm.errors import ServingError
from graftllm.serving.app import build_app
from graftllm.serving.metrics import Metrics
from graftllm.serving.server import serve
from tests.serving.running import PATIENCE_S, client_of, plain_client, served


@contextmanager
def _command(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `graftllm serve` with keys until the block ends; yield the process and its address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    keys = {"GRAFTLLM_API_KEY": "open", "GRAFTLLM_ADMIN_KEY": "sesame"}
    words = [sys.executable, "-m", "graftllm.cli", "serve", str(directory), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(words, env=os.environ | keys, stderr=subprocess.PIPE)
    address = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                httpx2.get(f"{address}/health", timeout=PATIENCE_S)
                break
            except httpx2.ConnectError:
                continue
        yield process, address
    finally:
        process.kill()
        process.communicate()


def test_keys_guard_the_endpoint_packs_change_while_it_runs_and_a_signal_lets_it_finish(own: Path) -> None:
    with _command(own / "grafted") as (process, address):
        with (
            plain_client(address) as plain,
            client_of(address, "wrong") as stranger,
            client_of(address, "open") as client,
        ):
            assert plain.get("/").status_code == 200
            with pytest.raises(AuthenticationError, match="expected the API key as `Authorization: Bearer KEY`"):
                stranger.models.list()
            admin = {"authorization": "Bearer sesame"}
            spare = {"name": "spare", "file": str(own / "spare.safetensors")}
            assert plain.post("/v1/packs", json=spare, headers={"authorization": "Bearer open"}).status_code == 401
            assert plain.post("/v1/packs", json=spare, headers=admin).status_code == 201
            again = plain.post("/v1/packs", json=spare, headers=admin)
            assert again.status_code == 400
            assert "pack 'spare': this grafted model has one of that name" in again.json()["error"]["message"]
            assert "spare" in [model.id for model in client.models.list()]
            assert client.completions.create(model="spare", prompt="b", max_tokens=3).choices[0].text != ""
            assert plain.delete("/v1/packs/spare", headers=admin).json() == {
                "object": "pack", "id": "spare", "deleted": True,
            }  # fmt: skip
            assert plain.delete("/v1/packs/spare", headers=admin).status_code == 404

            stream = client.completions.create(
                model="one", prompt="b", max_tokens=100, n=4, stream=True, temperature=2, seed=0,
                stream_options={"include_usage": True},
            )  # fmt: skip
            chunks = [next(stream)]
            process.send_signal(signal.SIGTERM)
            chunks += stream
            ended = [choice for chunk in chunks for choice in chunk.choices if choice.finish_reason]
            assert len(ended) == 4
            assert chunks[-1].usage is not None
        assert process.wait(PATIENCE_S) in (0, -signal.SIGTERM)
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{address}/health")


@pytest.mark.parametrize("option", ["--api-key", "--admin-key"])
def test_an_empty_key_opens_nothing(option: str) -> None:
    given = {option.removeprefix("--").replace("-", "_"): ""}
    with pytest.raises(ServingError, match=f"{option}: expected a key, found an empty text; give one, or leave"):
        build_app(SimpleNamespace(metrics=None), **given)


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"--port {port}: cannot listen there .*; give another one, or port 0"):
            serve(lambda: pytest.fail("loaded"), port=port)


@pytest.mark.parametrize("api_key", [None, "open"])
def test_without_a_key_only_requests_to_this_machine_by_name_are_answered(
    monkeypatch: pytest.MonkeyPatch, api_key: str | None
) -> None:
    built: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", lambda server: built.append(server.config.app))
        serve(lambda: _Idle(), port=0, api_key=api_key)  # type: ignore[arg-type]
    with served(built[0]) as address, plain_client(address) as plain:
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:8000"):
            assert plain.get("/health", headers={"host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "::1"):
            answer = plain.get("/health", headers={"host": host})
            assert answer.status_code == (200 if api_key else 403)
            if not api_key:
                assert "expected the host 127.0.0.1 or [::1] or localhost, found" in answer.json()["error"]["message"]


class _Idle:
    """A backend that is healthy, and no more."""

    alive = True

    def __init__(self) -> None:
        self.metrics = Metrics()

    def stop(self) -> None:
        pass


def test_an_address_that_others_reach_needs_a_key() -> None:
    def never() -> None:
        raise AssertionError

    with pytest.raises(ServingError, match="--host 0.0.0.0: expected an --api-key where other machines can reach"):
        serve(never, host="0.0.0.0")  # type: ignore[arg-type]
