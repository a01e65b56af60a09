import json
from typing import Any

import pytest
from pydantic import ValidationError

from graftllm.serving.app import NewPack
from graftllm.serving.protocol import ChatRequest, CompletionRequest, Strict

MANY = 50_000
UNKNOWN = {f"key{i}": 0 for i in range(MANY)}
PROMPT: dict[str, Any] = {"model": "one", "prompt": "hi"}
CHAT: dict[str, Any] = {"model": "one", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        *((CompletionRequest, PROMPT | {"prompt": [one] * MANY}) for one in (None, {}, 1.5, [""], [None])),
        (CompletionRequest, PROMPT | {"prompt": [[None] * MANY]}),
        *((ChatRequest, CHAT | {"stop": [one] * MANY}) for one in (0, None, {})),
        *((ChatRequest, CHAT | {"messages": [one] * MANY}) for one in (0, None, {}, {"a": 1})),
        (ChatRequest, CHAT | {"messages": [{"role": "user", "content": [{"type": "text"}] * MANY}]}),
        (ChatRequest, CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"} | UNKNOWN]}]}),
        (ChatRequest, CHAT | {"messages": [{"role": "user", "content": "hi"} | UNKNOWN]}),
        (ChatRequest, CHAT | {"stream_options": UNKNOWN}),
        (ChatRequest, CHAT | {"logit_bias": UNKNOWN}),
        (ChatRequest, CHAT | UNKNOWN),
        (NewPack, UNKNOWN),
    ],
)
def test_however_many_mistakes_a_body_has_few_are_kept(kind: type[Strict], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as info:
        kind.model_validate(json.loads(json.dumps(body)))
    assert info.value.error_count() <= 4  # a few for each form that a prompt may have


def test_too_many_levels_are_a_mistake_of_the_body() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValidationError, match="expected lists and objects in fewer levels than these"):
        ChatRequest.model_validate(CHAT | {"user": deep})


def test_the_first_of_many_unknown_fields_is_named() -> None:
    with pytest.raises(ValidationError) as info:
        ChatRequest.model_validate(CHAT | UNKNOWN)
    assert [(error["type"], error["loc"]) for error in info.value.errors()] == [("extra_forbidden", ("key0",))]
