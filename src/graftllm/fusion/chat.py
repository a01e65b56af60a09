"""A conversation with a grafted model; what `graftllm chat` reads and prints."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from graftllm.fusion.directory import AUTO
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.routing import BASE
from graftllm.recipe import SamplingOptions
from graftllm.records import Message


@dataclass
class Chat:
    """Messages so far, and the pack that answers.

    With `auto` the router decides by the first message and the choice stays: another pack's
    attention would not fit the cache of the conversation so far.
    """

    model: GraftedModel
    pack: str
    options: SamplingOptions
    messages: list[Message] = field(default_factory=list)
    chosen: str = ""

    def say(self, line: str) -> Iterator[str]:
        """Yield the reply to a line piece by piece; `/new` and `/pack NAME` are commands.

        Raises:
            FusionError: the pack does not exist, or `auto` is asked for without a router.
        """
        command, _, argument = line.partition(" ")
        if command == "/new":
            self.messages.clear()
            yield "(new conversation)"
        elif command == "/pack":
            known = [BASE, AUTO, *self.model.packs]
            if argument not in known:
                yield f"(expected /pack and one of {', '.join(known)})"
                return
            self.pack = argument
            self.messages.clear()
            yield f"(new conversation with {argument})"
        elif line:
            yield from self._answer(line)

    def _answer(self, line: str) -> Iterator[str]:
        if not self.messages:
            self.chosen = self.model.route([line])[0].name if self.pack == AUTO else self.pack
        self.messages.append(Message(role="user", content=line))
        if self.pack == AUTO and len(self.messages) == 1:
            yield f"[{self.chosen}] "
        answer = ""
        for piece in self.model.stream(self.messages, self.chosen, self.options):
            answer += piece
            yield piece
        self.messages.append(Message(role="assistant", content=answer))
