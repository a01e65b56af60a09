"""A conversation with a grafted model; what `graftllm chat` reads and prints."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from graftllm.errors import FusionError
from graftllm.fusion.beside import mixed
from graftllm.fusion.grafted import GraftedModel, Wanted
from graftllm.fusion.manifest import AUTO
from graftllm.fusion.routes import BASE, Route
from graftllm.recipe import SamplingOptions
from graftllm.records import Message
from graftllm.rendering import context_length, render


@dataclass
class Chat:
    """Messages so far, and the pack that answers, or the packs that do so together.

    With `auto` the router decides by the first message and the choice stays: another pack's
    attention would not fit the cache of the conversation so far.
    """

    model: GraftedModel
    pack: str
    options: SamplingOptions
    messages: list[Message] = field(default_factory=list)
    chosen: Wanted = None

    def __post_init__(self) -> None:
        """Check that the pack is one that can be asked for.

        Raises:
            FusionError: it does not exist, or it is `auto`, and there is neither router nor rule.
        """
        if self.pack not in self._known():
            raise FusionError(
                f"pack: expected one of {', '.join(self._known())}; found {self.pack!r}."
                + (f" {AUTO} needs a router or rules." if self.pack == AUTO else "")
            )

    def _known(self) -> list[str]:
        return [BASE, *([AUTO] if self.model.chooses else []), *self.model.packs]

    def say(self, line: str) -> Iterator[str]:
        """Yield the reply to a line piece by piece; `/new` and `/pack NAME` are commands, no other word is.

        Raises:
            FusionError: `auto` is asked for, and the router is older than a pack.
        """
        command, _, argument = line.partition(" ")
        if command == "/new":
            self.messages.clear()
            yield "(new conversation)"
        elif command == "/pack":
            if argument not in self._known():
                yield f"(expected /pack and one of {', '.join(self._known())})"
                return
            self.pack = argument
            self.messages.clear()
            yield f"(new conversation with {argument})"
        elif command.startswith("/") and command[1:].isalpha():
            yield "(/new starts over, /pack NAME changes the pack, /exit ends; all else is said to the model)"
        elif line:
            yield from self._answer(line)

    def _answer(self, line: str) -> Iterator[str]:
        route = self.model.route([line])[0] if self.pack == AUTO and not self.messages else None
        if not self.messages:
            self.chosen = self.pack if route is None else route.weights
        asked, room = [*self.messages, Message(role="user", content=line)], self.options.max_new_tokens
        if (most := context_length(self.model.model)) is not None:
            voice = self.model.voices.of(dict(mixed(self.chosen, self.model.packs, also=(BASE, AUTO))))
            tokens = len(render(voice.tokenizer, asked, answer_next=True))
            if tokens >= most:
                yield (
                    f"(expected at most {most} tokens of conversation and answer together, as many as the model reads, "
                    f"found {tokens} with this; say less, or start over with /new)"
                )
                return
            room = min(room, most - tokens)
        self.messages = asked
        if route is not None:
            yield f"[{_named(route)}] "
        answer = ""
        options = self.options.model_copy(update={"max_new_tokens": room})
        for piece in self.model.stream(self.messages, self.chosen, options):
            answer += piece
            yield piece
        self.messages.append(Message(role="assistant", content=answer))


def lines(prompt: str) -> Iterator[str]:
    """Yield what the user types, line by line, without spaces around it.

    Raises:
        FusionError: it is not UTF-8.
    """
    while True:
        try:
            line = input(prompt)
            line.encode()  # fails where the terminal's encoding let other bytes pass as surrogates
        except EOFError:
            return
        except UnicodeError as error:
            raise FusionError(
                f"stdin: expected UTF-8 text, found other bytes ({error}); convert them first."
            ) from error
        yield line.strip()


def _named(route: Route) -> str:
    """Return the pack that a route goes to, or its packs with their weights."""
    shared = ", ".join(f"{name} {weight:g}" for name, weight in route.weights.items())
    return shared if len(route.weights) > 1 else route.name
