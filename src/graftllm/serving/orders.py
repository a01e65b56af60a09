"""What travels between the endpoint and the engine: an order in, events out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from graftllm.errors import GraftError
from graftllm.fusion.manifest import AUTO
from graftllm.fusion.names import unknown_pack
from graftllm.fusion.voices import Voice
from graftllm.records import Message


class Refused(GraftError):
    """An order that cannot be taken.

    Attributes:
        status: the HTTP status that says so.
        param: the field of the request that is wrong, if one is.
        code: a word for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        """Keep what is wrong."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def unknown_model(name: str, known: Iterable[str]) -> Refused:
    """Return the refusal of a model that is not there; of `auto` it says what that needs."""
    if name == AUTO:
        told = (
            f"pack: {AUTO!r} needs a router, and this grafted model has none; name one of {', '.join(known)}, or fuse "
            "with --router-data."
        )
    else:
        told = str(unknown_pack(name, known))
    return Refused(told, status=404, param="model", code="model_not_found")


@dataclass(frozen=True)
class Reading:
    """A prompt's tokens, the voice that it is read and answered in, and how long a text may be."""

    ids: Sequence[int]
    voice: Voice
    max_tokens: int


@dataclass(frozen=True)
class Order:
    """Texts to be written.

    Attributes:
        messages: what the router sees.
        reading: returns the prompt as a pack reads it, or raises `Refused`; for one pack it is always the same.
        pack: a pack's name, `base` or `auto`.
        choices: how many texts.
        temperature: 0 is greedy.
        top_p: share of the probability that is sampled from.
        top_k: how many of the likeliest tokens are sampled from; all where it is 0.
        min_p: least probability of a sampled token, as a share of the likeliest one's.
        repetition_penalty: makes tokens of the prompt and of the text less likely; 1 is none.
        frequency_penalty: does so with each token of the text, for each time that it is there; 0 is none.
        presence_penalty: the same, once for each.
        seed: of the first choice's draws, the next choice's is one more; None for another one each time.
        stop: texts that end a text, and are not part of it.
        top_logprobs: how many alternatives of each token are reported; None for no log-probabilities at all.
    """

    messages: Sequence[Message]
    reading: Callable[[str], Reading]
    pack: str
    choices: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Chosen:
    """Which pack answers, and, where the router was asked, how probable each class was and why it decided so."""

    pack: str
    probabilities: Mapping[str, float] | None = None
    reason: str = "named"


@dataclass(frozen=True)
class Likely:
    """A token and its log-probability under the model, before penalties, temperature and top_p."""

    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
    """A written token with the most probable ones in its place."""

    likely: Likely
    alternatives: tuple[Likely, ...]


@dataclass(frozen=True)
class Piece:
    """More of a choice's text: possibly none while a character or a stop text may still be incomplete."""

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A choice is whole: `stop` or `length`, and how many tokens were written."""

    choice: int
    reason: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The order cannot be finished. A GraftError says why; anything else is a bug of ours."""

    error: BaseException


Event = Chosen | Piece | Ended | Failed
