import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from openai import APIError, APIStatusError, NotFoundError, OpenAI
from starlette.responses import JSONResponse, Response, StreamingResponse

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import ServingError
from graftllm.fusion.directory import add_packs, remove_pack, set_rules, write_grafted
from graftllm.fusion.rules import Rule
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.serving.app import build_app
from graftllm.serving.front import Front
from tests.models import perturb
from tests.serving.running import PATIENCE_S, client_of, posted, served


def _engine(names: Sequence[str], key: str = "inner") -> FastAPI:
    """A stand-in that speaks as vLLM does with adapters: the model's name chooses one; it says what it was sent."""
    app = FastAPI()
    app.state.begun, app.state.left = threading.Event(), threading.Event()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = app.state.asked = await request.json()
        if request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse({"error": {"message": "no key"}}, 401)
        if body["messages"][-1]["content"] == "fail":
            return JSONResponse({"error": {"message": "the engine is out of memory"}}, 503)
        if body["messages"][-1]["content"] == "wait":  # until the client leaves
            app.state.begun.set()
            while not await request.is_disconnected():
                await asyncio.sleep(0.005)
            app.state.left.set()
        breaks = body["messages"][-1]["content"] == "break"
        if breaks and not body.get("stream"):
            return StreamingResponse(_broken('{"id": "1", "choi'), media_type="application/json")
        words = [f"{body['model']}:", " said", f" {body['messages'][-1]['content']}"]
        head = {"id": "1", "created": 0, "model": body["model"]}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return JSONResponse(head | {"object": "chat.completion", "choices": [choice]})

        async def chunks() -> AsyncIterator[str]:
            for word in words:
                choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
                yield f"data: {json.dumps(head | {'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
                if breaks:
                    async for part in _broken('data: {"id": "1", "choi'):
                        yield part
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    return app


async def _broken(part: str) -> AsyncIterator[str]:
    """Yield the beginning of something, and let the connection break."""
    yield part
    raise ConnectionResetError("the engine died")


@pytest.fixture(scope="module")
def engine() -> FastAPI:
    return _engine(("some/llama", "one", "whole"))


@pytest.fixture(scope="module")
def address(fused: Path, engine: FastAPI) -> Iterator[str]:
    with (
        served(engine) as inner,
        served(build_app(Front(fused / "grafted", inner, key="inner", device="cpu"))) as front,
    ):
        yield front


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with client_of(address) as client:
        yield client


def _body(question: str) -> dict[str, Any]:
    return {"model": "one", "messages": [{"role": "user", "content": question}]}


def _ask(client: OpenAI, model: str, question: str) -> tuple[str | None, str]:
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": question}]
    )
    return raw.parse().choices[0].message.content, raw.headers["x-graftllm-pack"]


def test_only_packs_that_the_engine_has_can_be_asked_for(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "one", "whole", "auto"]
    with pytest.raises(NotFoundError, match="expected one of base, auto, one, whole; found 'two'"):
        _ask(client, "two", "hi")


def test_requests_go_on_under_the_packs_name(client: OpenAI) -> None:
    assert _ask(client, "base", "hi") == ("some/llama: said hi", "base")
    assert _ask(client, "one", "hi") == ("one: said hi", "one")


def test_auto_is_routed_here_and_answered_there(client: OpenAI) -> None:
    assert _ask(client, "auto", "31676 4") == ("one: said 31676 4", "one")
    assert _ask(client, "auto", "?!?!") == ("some/llama: said ?!?!", "base")  # the engine lacks the router's choice


def test_streams_pass_through(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "31676 4"}], stream=True
    )
    assert [chunk.choices[0].delta.content for chunk in stream] == ["one:", " said", " 31676 4"]


def test_the_engines_errors_are_passed_back(client: OpenAI) -> None:
    with pytest.raises(APIStatusError, match="the engine is out of memory") as info:
        _ask(client, "one", "fail")
    assert info.value.status_code == 503


def test_answers_of_a_pack_end_at_its_own_end_tokens(fused: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(fused / "base")
    tuned = Checkpoint.open(perturb(base.path, tmp_path / "tuned", seed=1))
    (tuned.path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    compress(Delta(base, tuned), PackOptions(servable=4)).save(tmp_path / "own.safetensors")
    files = {"own": tmp_path / "own.safetensors", "one": fused / "one.safetensors"}
    write_grafted(tmp_path / "grafted", str(base.path), files)
    engine = _engine(("base", "own", "one"))
    with (
        served(engine) as inner,
        served(build_app(Front(tmp_path / "grafted", inner, key="inner", device="cpu"))) as address,
        client_of(address) as client,
    ):
        _ask(client, "one", "hi")
        assert "stop_token_ids" not in engine.state.asked
        _ask(client, "own", "hi")
        assert engine.state.asked["stop_token_ids"] == [5, 9]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_at_the_engine(address: str, engine: FastAPI, stream: bool) -> None:
    engine.state.begun.clear()
    engine.state.left.clear()
    with posted(address, "/v1/chat/completions", _body("wait") | {"stream": stream}):
        assert engine.state.begun.wait(PATIENCE_S)
    assert engine.state.left.wait(PATIENCE_S)


def test_a_stream_that_breaks_ends_with_an_error(client: OpenAI, address: str) -> None:
    words: list[str | None] = []
    with pytest.raises(APIError, match=r"the engine at http.* does not answer, or not to the end \(") as info:
        for chunk in client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": "break"}], stream=True
        ):
            words.append(chunk.choices[0].delta.content)
    assert (words, info.value.code, info.value.type) == (["one:"], "engine", "server_error")
    with posted(address, "/v1/chat/completions", _body("break") | {"stream": True}) as line:
        text = line.getresponse().read().decode()
    assert [event[:16] for event in text.split("\n\n") if event.strip()][-1].strip() == 'data: {"error":'


def test_an_answer_that_breaks_is_an_error(client: OpenAI) -> None:
    with pytest.raises(APIStatusError, match="does not answer, or not to the end") as info:
        _ask(client, "one", "break")
    assert info.value.status_code == 502


def test_what_changes_in_the_directory_and_at_the_engine_counts_from_the_next_request_on(
    fused: Path, tmp_path: Path
) -> None:
    files = {name: fused / f"{name}.safetensors" for name in ("one", "whole")}
    write_grafted(tmp_path / "grafted", str(fused / "base"), files)
    has = ["llama", "one", "whole"]
    with (
        served(_engine(has)) as inner,
        served(build_app(Front(tmp_path / "grafted", inner, key="inner", device="cpu"))) as address,
        client_of(address) as client,
    ):
        assert [model.id for model in client.models.list()] == ["base", "one", "whole"]
        set_rules(tmp_path / "grafted", [Rule(pack="whole", pattern="hello")])
        assert _ask(client, "auto", "hello") == ("whole: said hello", "whole")
        add_packs(tmp_path / "grafted", {"two": fused / "two.safetensors"})
        with pytest.raises(NotFoundError, match="expected one of base, auto, one, whole; found 'two'"):
            _ask(client, "two", "hi")
        has.append("two")
        assert _ask(client, "two", "hi") == ("two: said hi", "two")
        remove_pack(tmp_path / "grafted", "one")
        with pytest.raises(NotFoundError, match="expected one of base, auto, whole, two; found 'one'"):
            _ask(client, "one", "hi")
        assert _ask(client, "base", "hi") == ("llama: said hi", "base")
        assert [model.id for model in client.models.list()] == ["base", "whole", "two", "auto"]


def test_an_engine_that_is_not_there_is_named(fused: Path) -> None:
    with pytest.raises(ServingError, match="--engine http://127.0.0.1:9/v1: expected an OpenAI-compatible server"):
        Front(fused / "grafted", "http://127.0.0.1:9/v1", device="cpu")
    with (
        served(_engine(("a", "b", "one"))) as engine,
        pytest.raises(ServingError, match="expected one model beside the packs, the base; found a, b. Start it with"),
    ):
        Front(fused / "grafted", engine, device="cpu")
