"""The rows that travel between the rooms, and how they are read from and written to JSONL.

A prompt row is the same everywhere: prompts to sample, rows to train on (the last message is
the assistant's), calibration text, evaluation tasks and router data.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from graftllm.errors import RecordError
from graftllm.storage import appended_file, whole_file


class Message(TypedDict):
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer, or with a last assistant message, an answered one.

    Attributes:
        id: unique in its file.
        messages: the conversation.
        task: what kind of prompt it is; scores are also given by task.
        reference: the right answer, for judges that compare.
        tests: Python statements that a program in the answer must survive, for the judge `code`.
        metadata: of the entry, for the judge `reasoning_gym`.
    """

    id: str
    messages: tuple[Message, ...]
    task: str = ""
    reference: str | None = None
    tests: tuple[str, ...] = ()
    metadata: Mapping[str, Any] | None = None

    @property
    def question(self) -> tuple[Message, ...]:
        """The messages up to the assistant's last answer, which is left out if there is one."""
        return self.messages[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def answer(self) -> str | None:
        """The assistant's last answer, or else the reference."""
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else self.reference


@dataclass(frozen=True)
class Response:
    """What a source answered to a prompt.

    Attributes:
        prompt_id: the prompt's.
        source: the source's name.
        sample: counts the source's answers to the prompt from 0.
        text: the answer.
        score: 1 for right and 0 for wrong, by rule; None when no rule has judged it.
        grade: how good it is, by a reward model or a model with a rubric; None when none has.
        truncated: it ended at the longest answer allowed, not by itself.
        input_tokens: that were read; an endpoint's are counted once for all answers of a request, a local model's
            once for all answers to a prompt.
        output_tokens: that were generated, reasoning included; an endpoint's once for all answers of a request.
    """

    prompt_id: str
    source: str
    sample: int
    text: str
    score: float | None = None
    grade: float | None = None
    truncated: bool = False
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class PreferencePair:
    """A better and a worse answer of one source to the same prompt."""

    prompt_id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str = ""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompt rows from JSONL, as `prompt_row` describes them.

    Raises:
        RecordError: the file is missing or empty, or a row is malformed or repeats an id.
    """
    prompts = unique_prompts((prompt_row(row, f"{path}:{n}", n), f"{path}:{n}") for n, row in read_rows(path))
    if not prompts:
        raise RecordError(f"{path}: expected at least one row, found an empty file.")
    return prompts


def check_rows(name: str, rows: Sequence[Prompt]) -> None:
    """Check that what was given under a name are rows, and not their file or their texts.

    Raises:
        RecordError: it is something else.
    """
    odd = rows if isinstance(rows, str | Path) else next((row for row in rows if not isinstance(row, Prompt)), None)
    if odd is not None:
        raise RecordError(f"{name}: expected prompts, as read_prompts gives them, found {type(odd).__name__}.")


def read_calibration(path: Path) -> list[Prompt]:
    """Read prompt rows from JSONL, or paragraphs (parted by blank lines) from any other text file.

    Raises:
        RecordError: a JSONL row is malformed, the file is missing, or it has no paragraph or is no text.
    """
    if path.suffix == ".jsonl" or not path.exists():
        return read_prompts(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecordError(f"{path}: expected JSONL rows or a text file in UTF-8 ({problem}).") from error
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not paragraphs:
        raise RecordError(f"{path}: expected paragraphs of text or JSONL rows, found an empty file.")
    return [Prompt(str(i), (Message(role="user", content=text),)) for i, text in enumerate(paragraphs)]


def prompt_row(row: dict[str, Any], where: str, number: int) -> Prompt:
    """Return the prompt that a row with `id`, `messages` or `prompt`, and the optional keys of `Prompt` stands for.

    A `prompt` string stands for one user message, or is a list of messages, a `tests` string for one test, a number as
    reference for its text. A `completion`, as TRL has it, is the reference where there is no other, or its messages
    are the rest of the conversation, whose last one is the reference. A row without `id` is named by its number. Other
    keys are ignored.

    Raises:
        RecordError: a key is missing or of the wrong type; the message begins with `where`.
    """
    row = {key: value for key, value in row.items() if value is not None}
    asked = row.get("prompt")
    if "messages" not in row and isinstance(asked, str | list):
        row["messages"] = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if "messages" not in row:
        raise RecordError(f"{where}: expected 'messages' or a 'prompt' string, found the keys {_listed(row)}.")
    row["id"] = str(row.get("id", number))
    if isinstance(row.get("reference"), int | float):
        row["reference"] = str(row["reference"])
    if isinstance(row.get("tests"), str):
        row["tests"] = [row["tests"]]
    prompt = _validate(_PROMPT, row, where)
    if prompt.reference is None and "completion" in row:
        prompt = _completed(prompt, row["completion"], where)
    if not prompt.question:
        raise RecordError(f"{where}: 'messages' has nothing to answer; expected at least one user message.")
    return prompt


def _completed(prompt: Prompt, completion: Any, where: str) -> Prompt:
    """Return a prompt with the answer that TRL's rows have beside it: a text, or the rest of the conversation."""
    if isinstance(completion, str):
        return replace(prompt, reference=completion)
    try:
        messages = _MESSAGES.validate_python(completion)
    except ValidationError:
        messages = ()
    if not messages or messages[-1]["role"] != "assistant":
        expected = "a text, or messages of which the last is the assistant's"
        raise RecordError(f"{where}: 'completion': expected {expected}, found {_short(repr(completion))}.")
    return replace(prompt, messages=prompt.messages + messages, reference=messages[-1]["content"])


def unique_prompts(found: Iterable[tuple[Prompt, str]]) -> list[Prompt]:
    """Return prompts that come with where they were found.

    Raises:
        RecordError: an id occurs twice.
    """
    prompts: dict[str, Prompt] = {}
    for prompt, where in found:
        if prompt.id in prompts:
            raise RecordError(f"{where}: id {prompt.id!r} is already taken by an earlier row; ids must be unique.")
        prompts[prompt.id] = prompt
    return list(prompts.values())


def read_responses(path: Path) -> list[Response]:
    """Read responses; a last line that a killed writer left unfinished is left out."""
    return [_validate(_RESPONSE, row, f"{path}:{number}") for number, row in read_rows(path, unfinished=True)]


def read_pairs(path: Path) -> list[PreferencePair]:
    """Read preference pairs."""
    return [_validate(_PAIR, row, f"{path}:{number}") for number, row in read_rows(path)]


def write_rows(path: Path, rows: Iterable[Prompt | Response | PreferencePair]) -> None:
    """Write one JSON object a line; the file appears whole or not at all."""
    with whole_file(path) as file:
        for row in rows:
            file.write(_encode(row))


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Iterable[Response]], None]]:
    """Yield what appends responses to a file, whose last line is mended first if a killed writer left it half-written.

    Rows survive the process as soon as they are appended, and a power cut a second later or when the block ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with appended_file(path) as file:
        file.truncate(_whole_lines(path))
        synced = time.monotonic()

        def append(rows: Iterable[Response]) -> None:
            nonlocal synced
            file.write(b"".join(_encode(row) for row in rows))
            file.flush()
            if time.monotonic() - synced > 1:
                os.fsync(file.fileno())
                synced = time.monotonic()

        yield append


def _whole_lines(path: Path) -> int:
    """Return how many bytes of a file are lines with their newline."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            if (last := file.read(end - start).rfind(b"\n")) >= 0:
                return start + last + 1
            end = start
    return 0


_PROMPT = TypeAdapter(Prompt)
_MESSAGES = TypeAdapter(tuple[Message, ...])
_RESPONSE = TypeAdapter(Response)
_PAIR = TypeAdapter(PreferencePair)
Row = TypeVar("Row")


def read_rows(path: str | Path, *, unfinished: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and JSON objects of a JSONL file.

    Args:
        path: the file.
        unfinished: leave out a last line without its newline.

    Raises:
        RecordError: the file is missing, or a line is no JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise RecordError(f"{path}: no such file; expected JSONL rows there.") from error
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise RecordError(f"{path}: cannot be read as UTF-8 text ({problem}).") from error
    lines = text.split("\n")
    if unfinished:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\ud" in line.lower():  # half a character, which no file could take
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise RecordError(
                f"{path}:{number}: expected one JSON object a line, found {_short(line)} ({error})."
            ) from error
        if not isinstance(row, dict):
            raise RecordError(f"{path}:{number}: expected a JSON object, found {_short(line)}.")
        yield number, row


def _validate(adapter: TypeAdapter[Row], row: dict[str, Any], where: str) -> Row:
    try:
        return adapter.validate_python(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecordError(f"{where}: {key!r}: {first['msg']}, found {_short(repr(first['input']))}.") from error


def _encode(row: Prompt | Response | PreferencePair) -> bytes:
    optional = {field.name: field.default for field in fields(row)}
    kept = {key: value for key, value in asdict(row).items() if value != optional[key]}
    return (json.dumps(kept, ensure_ascii=False) + "\n").encode()


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(repr(key) for key in row) or "none"
