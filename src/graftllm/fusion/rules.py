"""Rules of a grafted model: prompts that a user sends to a pack by hand, before the router is asked."""

from pydantic import BaseModel, ConfigDict


class Rule(BaseModel):
    """Prompts for one pack, by a pattern in the user's words, by a tag in the system prompt, or by both.

    Attributes:
        pack: name of a pack, or `base`.
        pattern: regular expression to be found in the last user message.
        tag: text to be found in the system prompt.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    pack: str
    pattern: str | None = None
    tag: str | None = None
