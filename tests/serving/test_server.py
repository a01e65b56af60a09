import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

from tests.serving.conftest import Expected
from tests.serving.running import client_of, plain_client

QUESTIONS = ("31676 4", "?!?!", "hello there", "what comes next: A", "b")
PACKS = ("base", "one", "two", "whole")


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with client_of(address) as client:
        yield client


@pytest.fixture(scope="module")
def plain(address: str) -> Iterator[httpx2.Client]:
    with plain_client(address) as client:
        yield client


def _ask(client: OpenAI, question: str, model: str, length: int = 12) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=length, temperature=0
    )
    return answer.choices[0].message.content or ""


def test_models_are_the_base_every_pack_and_auto(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "one", "two", "whole", "auto"]
    about = client.models.retrieve("whole").model_dump()["graftllm"]
    assert (about["runs"], about["own_files"]) == ("merged", None)
    with pytest.raises(NotFoundError, match="expected one of base, one, two, whole, auto; found 'nobody'"):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("pack", PACKS)
def test_an_answer_is_the_packs_own(client: OpenAI, expected: Expected, pack: str) -> None:
    for question in QUESTIONS:
        assert _ask(client, question, pack) == expected(question, pack, 12)


def test_many_clients_over_all_packs_get_the_answers_that_they_would_get_alone(
    client: OpenAI, expected: Expected
) -> None:
    asked = [(QUESTIONS[i % 5], PACKS[i // 5 % 4], 6 + i % 7) for i in range(64)]
    with ThreadPoolExecutor(64) as crowd:
        answers = list(crowd.map(lambda one: _ask(client, *one), asked))
    assert answers == [expected(*one) for one in asked]


def test_the_router_chooses_and_says_so(client: OpenAI, expected: Expected) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="auto", messages=[{"role": "user", "content": "31676 4"}], max_tokens=8, temperature=0
    )
    answer = raw.parse()
    assert answer.model == "auto"
    assert answer.choices[0].message.content == expected("31676 4", "one", 8)
    assert raw.headers["x-graftllm-pack"] == "one"
    probabilities = json.loads(raw.headers["x-graftllm-probabilities"])
    assert max(probabilities, key=probabilities.__getitem__) == "one"
    extra = answer.model_dump()["graftllm"]
    assert extra["pack"] == "one"
    assert extra["probabilities"] == pytest.approx(probabilities, abs=1e-6)


def test_streamed_pieces_make_the_whole_answer(client: OpenAI, expected: Expected) -> None:
    stream = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": "hello there"}], max_tokens=12, temperature=0,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].model_dump()["graftllm"]["pack"] == "one"
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == expected("hello there", "one", 12)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] in (
        ["length"],
        ["stop"],
    )
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens == len("hello there") + 3
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_completions_continue_text_and_tokens(client: OpenAI) -> None:
    text = client.completions.create(model="two", prompt="abc", max_tokens=6, temperature=0)
    assert text.usage is not None
    assert text.usage.prompt_tokens == 3
    ids = [5, 6, 7]  # a, b, c
    assert client.completions.create(model="two", prompt=ids, max_tokens=6, temperature=0).choices == text.choices
    pieces = client.completions.create(model="two", prompt="abc", max_tokens=6, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text  # every chunk has a choice


def test_several_prompts_are_continued_as_each_alone(client: OpenAI) -> None:
    wanted: dict[str, Any] = {"model": "two", "max_tokens": 6, "temperature": 1.5, "seed": 3, "n": 2}
    alone = [client.completions.create(prompt=prompt, **wanted) for prompt in ("abc", "hello")]
    for prompts in (["abc", "hello"], [[5, 6, 7], [12, 9, 16, 16, 19]]):
        together = client.completions.create(prompt=prompts, **wanted)
        assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in together.choices] == [c.text for one in alone for c in one.choices]
        assert together.usage is not None
        assert together.usage.prompt_tokens == 8
        assert together.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone if one.usage)
        texts = [""] * 4
        for piece in client.completions.create(prompt=prompts, stream=True, **wanted):
            for choice in piece.choices:
                texts[choice.index] += choice.text
        assert texts == [choice.text for choice in together.choices]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ["a"] * 65, "n": 2}, "prompt: expected at most 128 texts, found 65 prompts and n = 2"),
        ({"prompt": ["a", ""]}, "prompt: expected at least one token, found none."),
        ({"prompt": []}, "prompt: expected at least one token, found none."),
        (
            {"prompt": ["a", "b"], "model": "auto"},
            "prompt: auto chooses for one prompt at a time; name a pack, or send",
        ),
    ],
)
def test_prompts_that_cannot_be_continued_together_are_refused(
    plain: httpx2.Client, body: dict[str, object], message: str
) -> None:
    answer = plain.post("/v1/completions", json={"model": "one"} | body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_several_choices_are_drawn_apart_and_again_the_same_by_their_seed(client: OpenAI) -> None:
    def draw(n: int, seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": "b"}], max_tokens=8, n=n, seed=seed, temperature=1.5
        )
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.message.content for choice in answer.choices]

    first = draw(4, 7)
    assert len(set(first)) > 1
    assert draw(4, 7) == first
    assert draw(1, 8) == first[1:2]


def test_the_likeliest_token_alone_is_drawn_where_a_client_of_vllm_asks_for_it(
    client: OpenAI, expected: Expected
) -> None:
    for extra in ({"top_k": 1, "repetition_penalty": 1.0}, {"min_p": 1.0, "top_k": -1}):
        answer = client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=2, extra_body=extra
        )
        assert answer.choices[0].message.content == expected("hello", "one", 8)


@pytest.mark.parametrize("penalty", [{"frequency_penalty": 2.0}, {"extra_body": {"repetition_penalty": 2.0}}])
def test_a_penalty_changes_what_repeats_and_only_that_row(
    client: OpenAI, expected: Expected, penalty: dict[str, Any]
) -> None:
    def ask(text: str, **more: Any) -> str | None:
        answer = client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": text}], max_tokens=40, temperature=0, **more
        )
        return answer.choices[0].message.content

    bare, less = expected("hello", "one", 40), ask("hello", **penalty)
    assert less is not None
    assert len(set(less)) > len(set(bare))
    assert ask("hello", **penalty) == less
    assert ask("hello") == bare


def test_choices_stream_side_by_side(client: OpenAI, expected: Expected) -> None:
    stream = client.chat.completions.create(
        model="two", messages=[{"role": "user", "content": "b"}], max_tokens=8, n=3, temperature=0, stream=True
    )
    texts = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [expected("b", "two", 8)] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_an_answer_and_is_not_in_it(client: OpenAI, expected: Expected, stream: bool) -> None:
    whole = expected("hello there", "one", 12)
    stop = whole[4:6]
    answer = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": "hello there"}], max_tokens=12, temperature=0,
        stop=["never", stop], stream=stream,
    )  # fmt: skip
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]  # type: ignore[union-attr]
        text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason  # type: ignore[union-attr]
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_logprobs_are_those_of_the_written_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "b"}], max_tokens=5, temperature=0,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert "".join(entry.token for entry in entries) == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0  # greedy: the most probable one was written
        assert bytes(entry.bytes or []).decode() == entry.token
    old = client.completions.create(model="base", prompt="b", max_tokens=5, temperature=0, logprobs=2).choices[0]
    assert old.logprobs is not None
    assert old.logprobs.tokens is not None
    assert "".join(old.logprobs.tokens) == old.text
    assert old.logprobs.text_offset == list(range(5))


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2", "temperature"),
        ({"n": 0}, "n: Input should be greater than or equal to 1", "n"),
        ({"colour": "red"}, "colour: this server does not know this field; leave it out", "colour"),
        ({"frequency_penalty": 3}, "frequency_penalty: Input should be less than or equal to 2", "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias: this server does not support it; leave it out", None),
        ({"tools": [{"type": "function"}]}, "tools: this server does not support it; leave it out", None),
        ({"stop": ["a", ""]}, "stop: expected at most 16 texts, none of them empty", None),
        ({"stream_options": {"include_usage": True}}, "stream_options: expected stream to be true beside them", None),
        ({"top_logprobs": 2}, "top_logprobs: expected logprobs to be true beside it; set both, or neither", None),
        (
            {"repetition_penalty": 1e-45},
            "repetition_penalty: Input should be greater than or equal to 0.01",
            "repetition_penalty",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages.0.content: expected text, or parts of the type text; nothing else is read here",
            "messages.0.content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content: expected text, or parts of the type text; nothing else is read here",
            "messages.0.content",
        ),
        ({"messages": []}, "messages: List should have at least 1 item", "messages"),
        ({"stop": "\ud800"}, "expected text, found half a character (a lone surrogate)", None),
        (
            {"max_tokens": 300},
            "expected prompt and answer to have at most 256 tokens together, found a prompt of 5 and 300 asked for. "
            "Shorten the prompt or lower max_tokens.",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": "a" * 300}]},
            "expected prompt and answer to have at most 256 tokens together, found a prompt of 303",
            "messages",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    plain: httpx2.Client, body: dict[str, object], message: str, param: str | None
) -> None:
    asked = {"model": "one", "messages": [{"role": "user", "content": "hi"}]} | body
    head = {"Content-Type": "application/json"}
    answer = plain.post("/v1/chat/completions", content=json.dumps(asked), headers=head)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("prompt", [[-1], [1 << 40], [[3], [1 << 70]]])
def test_tokens_that_are_none_are_refused(plain: httpx2.Client, prompt: list) -> None:
    answer = plain.post("/v1/completions", json={"model": "one", "prompt": prompt})
    assert answer.status_code == 400
    assert "prompt: expected tokens from 0 to" in answer.json()["error"]["message"]


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="pack: expected one of base, auto, one, two, whole; found 'three'") as info:
        _ask(client, "hi", "three")
    assert info.value.code == "model_not_found"


@pytest.mark.parametrize("body", [b"{", b'{"model": ', b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b""])
def test_malformed_json_is_a_clear_error(plain: httpx2.Client, body: bytes) -> None:
    answer = plain.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_form_that_a_foreign_web_page_could_send_is_not_taken(plain: httpx2.Client) -> None:
    body = json.dumps({"model": "one", "messages": [{"role": "user", "content": "hi"}]})
    answer = plain.post("/v1/chat/completions", content=body, headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


def test_a_prompt_of_10_mb_is_too_large(client: OpenAI, plain: httpx2.Client) -> None:
    with pytest.raises(APIStatusError, match="and at most 1,048,576 are taken") as info:
        _ask(client, "a" * (10 << 20), "one")
    assert info.value.status_code == 413

    def pieces() -> Iterator[bytes]:  # of a length that is not told beforehand
        yield b'{"model": "one", "prompt": "'
        yield from [b"a" * (1 << 20)] * 10
        yield b'"}'

    answer = plain.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_prompt_within_the_body_but_beyond_the_context_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="found a prompt of 900003") as info:
        _ask(client, "a" * 900_000, "one")
    assert info.value.code == "context_length_exceeded"


def test_other_paths_and_methods_have_openai_shaped_errors(plain: httpx2.Client) -> None:
    assert plain.get("/v2").json()["error"]["type"] == "not_found_error"
    assert plain.get("/v1/chat/completions").status_code == 405
    assert plain.get("/packs/three/card").status_code == 404


def _running(plain: httpx2.Client) -> dict[str, float]:
    lines = [line.split() for line in plain.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_metrics_count_what_happened(plain: httpx2.Client, client: OpenAI) -> None:
    before = _running(plain)
    _ask(client, "b", "one", 5)
    after = _running(plain)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("graftllm_generated_tokens_total") == 5
    assert more("graftllm_prompt_tokens_total") == 4
    assert more('graftllm_answered_total{pack="one"}') == 1
    assert more('graftllm_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert after["graftllm_packs"] == 3
    assert after["graftllm_pack_memory_bytes"] > 0


def test_a_card_tells_bytes_by_role_and_layer(plain: httpx2.Client) -> None:
    card = plain.get("/packs/one/card").json()
    anatomy = card["anatomy"]
    assert anatomy["bytes"] == sum(role["bytes"] for role in anatomy["roles"].values())
    assert set(anatomy["layers"]) == {"0", "1", "other"}
    assert "tensors" not in card
