"""OpenAI's wire format: what requests may say, and how answers, chunks and errors look.

A field that this server does not know, or knows but cannot follow, is refused with its name:
nothing that a client asks for is dropped in silence.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from graftllm.records import Message
from graftllm.serving.orders import Chosen, Ended, Piece, Token

_MOST_CHOICES = 128  # of a request
T = TypeVar("T")
_List = Annotated[list[T], Field(fail_fast=True)]  # a body may hold a million errors, and one is told
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # accepted where they ask for nothing
    "logit_bias": ({}, None), "best_of": (1, None),
    "echo": (False, None), "suffix": ("", None), "tools": ([], None), "tool_choice": ("none", "auto", None),
    "response_format": ({"type": "text"}, None), "modalities": (["text"], None), "parallel_tool_calls": (True, False),
}  # fmt: skip
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")  # change no answer


class Strict(BaseModel):
    """An object of a body that is refused for a field that it does not know: for the first, however many there are."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        unknown = next((key for key in value if key not in cls.model_fields), None)
        return {key: one for key, one in value.items() if key in cls.model_fields or key == unknown}


class StreamOptions(Strict):
    """What a stream has beside its pieces."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers: there is none, which is allowed


class _Asked(Strict):
    """What both kinds of requests say."""

    model: str
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    stop: str | _List[str] | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    top_k: Annotated[int, Field(ge=-1)] = 0  # this and the next two are vLLM's; -1 and 0 are for all
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] = 1.0  # divides logits, which have to stay finite
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        """Take out fields that change nothing, and whatever is null: it means the default."""
        if not isinstance(value, dict):
            return value
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("expected text, found half a character (a lone surrogate)") from None
        except RecursionError:
            raise ValueError("expected lists and objects in fewer levels than these") from None
        kept = {}
        for key, wanted in value.items():
            if wanted is None or key in _IGNORED or wanted in _NEUTRAL.get(key, ()):
                continue
            if key in _NEUTRAL:
                raise ValueError(f"{key}: this server does not support it; leave it out")
            kept[key] = wanted
        return kept

    @model_validator(mode="after")
    def _stops_at_text(self):
        if "" in self.stops or len(self.stops) > 16:
            raise ValueError("stop: expected at most 16 texts, none of them empty")
        return self

    @model_validator(mode="after")
    def _streams_if_it_says_how(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected stream to be true beside them; leave them out, or stream")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class _TextPart(Strict):
    type: Literal["text"]
    text: str


class _ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | _List[_TextPart]

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """Take out what is null, as in answers that clients send back."""
        if not isinstance(value, dict):
            return value
        return {key: one for key, one in value.items() if one is not None or key == "content"}

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        parts = value if isinstance(value, list) else [{"type": "text"}] if isinstance(value, str) else [None]
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            raise ValueError("expected text, or parts of the type text; nothing else is read here")
        return value

    def plain(self) -> Message:
        """Return it as the rest of the program has messages; a developer is a system, as in OpenAI's guide."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=content)


class ChatRequest(_Asked):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[_List[_ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def _asks_for_logprobs_first(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: expected logprobs to be true beside it; set both, or neither")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many alternatives of each token are wanted; None for no log-probabilities."""
        return self.top_logprobs if self.logprobs else None

    @property
    def longest(self) -> int | None:
        """The most tokens of an answer, if the client says."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Asked):
    """The body of `/v1/completions`: prompts, as texts or as tokens."""

    prompt: str | _List[int] | _List[str] | _List[_List[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _asks_for_few_texts(self):
        if self.n * len(self.prompts) > _MOST_CHOICES:
            raise ValueError(
                f"prompt: expected at most {_MOST_CHOICES} texts, found {len(self.prompts)} prompts and n = {self.n}"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as tokens."""
        given = self.prompt
        one = isinstance(given, str) or all(isinstance(token, int) for token in given)
        return cast(list[str | list[int]], [given] if one else given)

    @property
    def alternatives(self) -> int | None:
        """How many alternatives of each token are wanted; None for no log-probabilities."""
        return self.logprobs

    @property
    def longest(self) -> int:
        """The most tokens of a text; 16, as OpenAI has it, where the client does not say."""
        return self.max_tokens or 16


@dataclass
class Choice:
    """One text, as far as it was written."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None
    count: int = 0


@dataclass
class Answer:
    """Everything that answers one request, and how it looks on the wire.

    Attributes:
        chat: whether it answers a conversation.
        model: the name that was asked for.
        prompt_tokens: length of the prompts, together.
        chosen: which pack answers.
        choices: the texts; of several prompts, all of the first come first.
    """

    chat: bool
    model: str
    prompt_tokens: int
    chosen: Chosen
    choices: list[Choice]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def take(self, event: Piece | Ended) -> None:
        """Add what was written."""
        choice = self.choices[event.choice]
        if isinstance(event, Piece):
            choice.text += event.text
            choice.tokens += event.tokens
        else:
            choice.reason, choice.count = event.reason, event.tokens

    @property
    def whole(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.reason for choice in self.choices)

    def body(self) -> dict[str, Any]:
        """Return the answer to a request that is not streamed."""
        choices = []
        for index, one in enumerate(self.choices):
            text = {"message": {"role": "assistant", "content": one.text}} if self.chat else {"text": one.text}
            logprobs = self._logprobs(one.tokens, 0)
            choices.append({"index": index, **text, "logprobs": logprobs, "finish_reason": one.reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": self.usage(), "graftllm": chosen_fields(self.chosen)}

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return what a stream begins with, by choice: an empty piece that says which pack answers."""
        extra = {"graftllm": chosen_fields(self.chosen)}
        turn = {"role": "assistant", "content": ""} if self.chat else {}
        return [self._chunk([self._delta(i, turn, None, None)]) | extra for i in range(len(self.choices))]

    def chunk(self, event: Piece | Ended) -> dict[str, Any]:
        """Return what a stream says of an event; call it before `take`."""
        if isinstance(event, Ended):
            return self._chunk([self._delta(event.choice, {}, None, event.reason)])
        logprobs = self._logprobs(event.tokens, len(self.choices[event.choice].text))
        return self._chunk([self._delta(event.choice, {"content": event.text}, logprobs, None)])

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream that was asked for usage."""
        return self._chunk([]) | {"usage": self.usage(), "graftllm": chosen_fields(self.chosen)}

    def usage(self) -> dict[str, int]:
        """Return counts of tokens."""
        written = sum(choice.count for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion") | {"choices": choices}

    def _delta(self, index: int, delta: dict[str, str], logprobs: Any, reason: str | None) -> dict[str, Any]:
        text = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        """Return log-probabilities in the form of the endpoint; `offset` is where the first token's text begins."""
        if not tokens:
            return None
        if self.chat:
            entries = [
                _entry(one.likely.text, one.likely.logprob)
                | {"top_logprobs": [_entry(other.text, other.logprob) for other in one.alternatives]}
                for one in tokens
            ]
            return {"content": entries, "refusal": None}
        offsets = [offset]
        for one in tokens:
            offsets.append(offsets[-1] + len(one.likely.text))
        return {
            "tokens": [one.likely.text for one in tokens],
            "token_logprobs": [one.likely.logprob for one in tokens],
            "top_logprobs": [{other.text: other.logprob for other in one.alternatives} for one in tokens],
            "text_offset": offsets[:-1],
        }


def chosen_fields(chosen: Chosen) -> dict[str, Any]:
    """Return the extra fields of a body that say which pack answers."""
    return {"pack": chosen.pack, "reason": chosen.reason, "probabilities": chosen.probabilities}


def error_body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients expect it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    """Return a token's entry; bytes are null where it is only a part of a character."""
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": known}
