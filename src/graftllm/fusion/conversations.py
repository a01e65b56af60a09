"""What a grafted model is asked: texts, or lists of messages."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from graftllm.errors import FusionError
from graftllm.records import Message

Conversation = str | Sequence[Message]
_CONVERSATION = TypeAdapter(Annotated[list[Message], Field(min_length=1)])


def several(conversations: Iterable[Conversation]) -> list[Conversation]:
    """Return conversations that may come one by one.

    Raises:
        FusionError: it is one, whose letters or messages would be answered one by one.
    """
    found = [] if isinstance(conversations, str) else list(conversations)
    if isinstance(conversations, str) or any(isinstance(one, Mapping) for one in found):
        raise FusionError(
            "conversations: expected a list of texts or of lists of messages, found one "
            f"{type(conversations).__name__} that is a conversation itself; put it into a list."
        )
    return found


def messages_of(conversation: Conversation) -> Sequence[Message]:
    """Return a conversation's messages; a text is one of the user's.

    Raises:
        FusionError: it has none, or is no conversation.
    """
    if isinstance(conversation, str):
        return [Message(role="user", content=conversation)]
    try:
        _CONVERSATION.validate_python(conversation)
    except ValidationError as error:
        raise FusionError(
            "conversation: expected a text, or at least one message with `role` and `content`, found "
            f"{conversation!r:.60}."
        ) from error
    return conversation
