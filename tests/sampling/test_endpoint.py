"""Sources behind a URL, against a real server that also fails."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graftllm.errors import RecipeError, SamplingError
from graftllm.records import Message, Prompt, Response, read_responses
from graftllm.sampling import endpoint
from graftllm.sampling.endpoint import EndpointSource
from graftllm.sampling.responses import sample_responses
from graftllm.transfer_options import SamplingOptions, SourceOptions
from tests.chat_server import ChatServer, chat_server, drawn

OPTIONS = SamplingOptions(samples=3, temperature=0.7, top_p=0.9, max_new_tokens=33)
PROMPTS = [Prompt(str(i), (Message(role="user", content=f"question {i}"),)) for i in range(8)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT_S", 0.001)
    with chat_server() as told:
        yield told


def _options(server: ChatServer, **changes: Any) -> SourceOptions:
    return SourceOptions(model="big", url=server.url, **({"retries": 2, "concurrency": 4} | changes))


def _sample(path: Path, options: SourceOptions, sampling: SamplingOptions = OPTIONS, seed: int = 0) -> list[Response]:
    sample_responses(PROMPTS, lambda: EndpointSource(options), sampling, path, source_name="big", seed=seed)
    return read_responses(path)


def test_every_prompt_gets_its_answers_in_the_order_of_the_prompts(server: ChatServer, tmp_path: Path) -> None:
    rows = _sample(tmp_path / "r.jsonl", _options(server))
    assert [(row.prompt_id, row.source, row.sample) for row in rows] == [
        (prompt.id, "big", sample) for prompt in PROMPTS for sample in range(3)
    ]
    assert len({row.text for row in rows}) == 24
    assert {(row.input_tokens, row.output_tokens) for row in rows} == {(10, 5)}


def test_an_event_loop_that_runs_already_does_not_matter(server: ChatServer, tmp_path: Path) -> None:
    async def notebook() -> list[Response]:
        return _sample(tmp_path / "inside.jsonl", _options(server))

    assert asyncio.run(notebook()) == _sample(tmp_path / "outside.jsonl", _options(server))


def test_requests_say_what_the_recipe_says(server: ChatServer, tmp_path: Path) -> None:
    sampling = OPTIONS.model_copy(update={"repetition_penalty": 1.05, "stop": ("\n\n",)})
    _sample(tmp_path / "r.jsonl", _options(server), sampling)
    body = server.seen[0]
    assert body["messages"][0]["role"] == "user"
    assert len({body["seed"] for body in server.seen}) == 24
    del body["messages"], body["seed"]
    assert body == {
        "model": "big", "temperature": 0.7, "top_p": 0.9, "max_tokens": 33, "repetition_penalty": 1.05,
        "stop": ["\n\n"],
    }  # fmt: skip


def test_draws_depend_on_the_seed_alone(server: ChatServer, tmp_path: Path) -> None:
    one = _sample(tmp_path / "1.jsonl", _options(server))
    assert _sample(tmp_path / "2.jsonl", _options(server, concurrency=1)) == one
    assert {row.text for row in _sample(tmp_path / "3.jsonl", _options(server), seed=1)}.isdisjoint(
        row.text for row in one
    )


def test_no_more_requests_are_under_way_than_allowed(server: ChatServer, tmp_path: Path) -> None:
    _sample(tmp_path / "r.jsonl", _options(server, concurrency=3))
    assert 1 <= server.most_at_once <= 3


@pytest.mark.parametrize(
    "fault",
    ["429", "429 after 0", "429 after Wed, 21 Oct 2015 07:28:00 GMT", "500", "503", "cut", "no JSON", "no choices"],
)
def test_what_passes_is_tried_again(server: ChatServer, tmp_path: Path, fault: str) -> None:
    whole = _sample(tmp_path / "whole.jsonl", _options(server))
    server.faults = {f"question {i}": [fault, fault] for i in range(0, 8, 2)}
    assert _sample(tmp_path / "r.jsonl", _options(server)) == whole
    assert len(server.seen) == 24 + 24 + 8


@pytest.mark.parametrize("fault", ["slow", "trickle"])
def test_a_slow_reply_is_given_up_and_asked_again(server: ChatServer, tmp_path: Path, fault: str) -> None:
    server.faults = {"question 3": [fault]}
    rows = _sample(tmp_path / "r.jsonl", _options(server, timeout_s=0.5))
    assert len(rows) == 24


def test_the_wait_that_a_server_asks_for_is_kept(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []

    async def slept(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(endpoint, "sleep", slept)
    server.faults = {"question 0": ["429 after 17", "500", "429 after 99999"]}
    _sample(tmp_path / "r.jsonl", _options(server, retries=3, concurrency=1))
    asked = [wait for wait in waits if wait > 0]
    assert asked[0] == 17
    assert 0.001 <= asked[1] <= 0.002  # twice the first, less up to half by chance
    assert asked[2] == 3600


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["500"] * 3, "prompt '5', sample 0: failed 3 times, the last time with status 500: .*made to fail with 500"),
        (["400"], "prompt '5', sample 0: status 400: .*made to fail with 400"),
        (["no JSON"] * 3, "failed 3 times, the last time with not a chat completion"),
        (["no choices"] * 3, "not a chat completion .choices: List should have at least 1 item"),
        (["cut"] * 3, "no connection or a broken one"),
        (["slow"] * 3, r"no whole reply within 0.3 s \(timeout_s\)"),
    ],
)
def test_what_stays_stops_the_run_and_keeps_what_it_has(
    server: ChatServer, tmp_path: Path, faults: list[str], message: str
) -> None:
    server.faults = {"question 5": list(faults)}
    options = _options(server, concurrency=1, timeout_s=0.3 if "slow" in faults else 60)
    with pytest.raises(SamplingError, match=message) as raised:
        _sample(tmp_path / "r.jsonl", options)
    assert "\n" not in str(raised.value)
    assert "15 of 24 requests were answered and are kept" in str(raised.value)
    assert len(read_responses(tmp_path / "r.jsonl")) == 15
    asked = len(server.seen)
    assert len(_sample(tmp_path / "r.jsonl", _options(server))) == 24
    assert len(server.seen) == asked + 9


def test_single_requests_may_fail_when_the_recipe_says_so(server: ChatServer, tmp_path: Path) -> None:
    server.faults = {"question 5": ["400", "400"]}
    path = tmp_path / "r.jsonl"
    failed = sample_responses(
        PROMPTS, lambda: EndpointSource(_options(server, max_failures=2)), OPTIONS, path, source_name="big", seed=0
    )
    assert failed == 2
    assert len(read_responses(path)) == 22


def test_a_refused_key_stops_the_run_at_once(server: ChatServer, tmp_path: Path) -> None:
    server.faults = {f"question {i}": ["401"] * 9 for i in range(8)}
    with pytest.raises(SamplingError, match="status 401"):
        _sample(tmp_path / "r.jsonl", _options(server, max_failures=100, concurrency=1))
    assert len(server.seen) == 1


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with chat_server() as gone:
        pass
    with pytest.raises(SamplingError, match=f"big at {gone.url}: .*no connection"):
        _sample(tmp_path / "r.jsonl", _options(gone, retries=0))


def test_a_server_that_does_not_answer_at_first_is_told_of_once(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = {prompt.question[-1]["content"]: ["503"] for prompt in PROMPTS}
    _sample(tmp_path / "r.jsonl", _options(server))
    told = [line for line in capsys.readouterr().err.splitlines() if "asking again" in line]
    assert len(told) == 1
    assert told[0].startswith(f"graftllm: big at {server.url}: status 503")


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BIG_KEY", "sk-very-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-someone-else")
    options = _options(server, api_key_env="BIG_KEY")
    _sample(tmp_path / "r.jsonl", options)
    assert server.keys == {"Bearer sk-very-secret"}
    server.faults = {"question 1": ["echo"]}
    with pytest.raises(SamplingError) as raised:
        _sample(tmp_path / "s.jsonl", options)
    assert "bad key Bearer ***" in str(raised.value)
    assert raised.value.__cause__ is None
    written = "".join(path.read_text() for path in tmp_path.iterdir()) + "".join(capfd.readouterr())
    assert "secret" not in written + str(raised.value) + options.model_dump_json()


def test_without_a_key_none_of_another_service_is_sent(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-someone-else")
    _sample(tmp_path / "r.jsonl", _options(server))
    assert server.keys == {"Bearer none"}


@pytest.mark.parametrize(("value", "found"), [(None, "found nothing"), ("sk\x00", "found something unprintable")])
def test_a_missing_key_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, value: str | None, found: str) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    if value is not None:
        monkeypatch.setattr(endpoint.os, "environ", {"NO_KEY": value})
    with pytest.raises(RecipeError, match=f"environment variable 'NO_KEY' .api_key_env., {found}; export it"):
        EndpointSource(SourceOptions(model="big", url="http://localhost", api_key_env="NO_KEY"))


def test_several_samples_may_share_a_request(server: ChatServer, tmp_path: Path) -> None:
    rows = _sample(tmp_path / "r.jsonl", _options(server, samples_per_request=2))
    assert [body.get("n", 1) for body in server.seen].count(2) == 8
    assert len(server.seen) == 16
    assert len({row.text for row in rows}) == 24
    assert sum(row.output_tokens for row in rows) == 24 * 5
    assert sum(row.input_tokens for row in rows) == 16 * 10


def test_a_server_that_ignores_n_is_told_about(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.chat_server._completion", lambda *_: {"choices": [{"message": {"content": "x"}}]})
    with pytest.raises(SamplingError, match="1 answers where n = 3 were asked for; samples_per_request: 1 suits"):
        _sample(tmp_path / "r.jsonl", _options(server, samples_per_request=3, retries=0))


@pytest.mark.parametrize(
    ("keep", "message", "text"),
    [
        ("strip", {"content": "<think>hm</think>\n\n4"}, "4"),
        ("keep", {"content": "<think>hm</think>\n\n4"}, "<think>hm</think>\n\n4"),
        ("strip", {"content": "4", "reasoning_content": "hm"}, "4"),
        ("keep", {"content": "4", "reasoning_content": "hm"}, "<think>\nhm\n</think>\n\n4"),
        ("keep", {"content": "4", "reasoning": "hm"}, "<think>\nhm\n</think>\n\n4"),
        ("strip", {"content": None, "reasoning_content": "hm"}, ""),
    ],
)
def test_reasoning_is_stripped_or_kept(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str, message: dict, text: str
) -> None:
    monkeypatch.setattr("tests.chat_server._completion", lambda *_: {"choices": [{"message": message}]})
    rows = _sample(tmp_path / "r.jsonl", _options(server, reasoning=keep))
    assert {row.text for row in rows} == {text}


def test_answers_that_ended_at_the_longest_length_are_marked(server: ChatServer, tmp_path: Path) -> None:
    server.faults = {"question 2": ["length"]}
    rows = _sample(tmp_path / "r.jsonl", _options(server, concurrency=1))
    assert [(row.prompt_id, row.sample) for row in rows if row.truncated] == [("2", 0)]
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[6])["truncated"] is True


def test_the_server_answers_by_question_and_seed() -> None:
    body = {"messages": [{"content": "a"}], "seed": 1, "temperature": 0}
    assert drawn(body) == drawn(body) != drawn(body | {"seed": 2})
