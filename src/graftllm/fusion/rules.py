"""Rules of a grafted model: prompts that a user sends to a pack by hand, before the router is asked."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from graftllm.errors import FusionError
from graftllm.recipe import UniqueKeys
from graftllm.records import Message


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

    @model_validator(mode="after")
    def _says_when(self) -> "Rule":
        if not (self.pattern or self.tag):
            raise ValueError("expected a pattern, a tag or both, found neither")
        try:
            re.compile(self.pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern {(self.pattern or '')[:80]!r} is no regular expression ({error})") from error
        return self

    def fits(self, messages: Sequence[Message]) -> bool:
        """Return whether a conversation is one of those that the rule means."""
        asked = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
        system = "\n".join(message["content"] for message in messages if message["role"] == "system")
        return (not self.pattern or re.search(self.pattern, asked) is not None) and (not self.tag or self.tag in system)


def first_fitting(rules: Sequence[Rule], messages: Sequence[Message]) -> Rule | None:
    """Return the rule that decides about a conversation: the first that fits, if any does."""
    return next((rule for rule in rules if rule.fits(messages)), None)


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Read rules from YAML: a list of mappings with `pack`, and `pattern`, `tag` or both.

    Raises:
        FusionError: the file is missing or is no such list.
    """
    expected = "expected a list of rules, each with pack, and pattern or tag"
    if not path.is_file():
        raise FusionError(f"{path}: no such file; {expected} there.")
    try:
        rows = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise FusionError(f"{path}: {expected}; not readable as YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(rows, list):
        found = "nothing; write [] to take all rules away" if rows is None else type(rows).__name__
        raise FusionError(f"{path}: {expected}; found {found}.")
    return tuple(_rule(row, f"{path}: rule {i}") for i, row in enumerate(rows, 1))


def _rule(row: object, where: str) -> Rule:
    try:
        return Rule.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise FusionError(f"{where}: unknown key {key!r}; expected pack, pattern and tag.") from error
        problem = first["msg"].removeprefix("Value error, ")
        raise FusionError(f"{where}: {key + ': ' if key else ''}{problem}.") from error
