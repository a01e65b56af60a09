"""Prompt sets -> prompt rows: read from JSONL, Parquet or the Hub, each question once, none of them a test's.

Contamination is measured as in GPT-3 (arXiv 2005.14165, appendix C): a prompt that shares a run of
words (13 by default) with a test prompt is contaminated. A test prompt that is shorter than that
counts when it stands whole in a prompt, and one of fewer than 8 words, which may do so by chance,
when it is the whole prompt, but for case and space.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftllm.errors import RecordError
from graftllm.records import Prompt, prompt_row, read_rows, unique_prompts
from graftllm.transfer_options import PromptSet

_SHORTEST_RUN = 8  # words; shorter test prompts are compared whole
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # Chinese, Japanese, Korean: a character counts as a word
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+")


def load_prompts(sets: Sequence[PromptSet]) -> list[Prompt]:
    """Read prompt sets one after the other; when there are several, ids begin with the set's name.

    Raises:
        RecordError: a set is missing, empty or malformed, lacks a column, or an id occurs twice.
    """
    origins = [(one, origin) for one in sets for origin in one.files or (one.dataset or "",)]
    names = [Path(origin).name for _, origin in origins]
    prompts: list[tuple[Prompt, str]] = []
    for number, ((one, origin), name) in enumerate(zip(origins, names, strict=True)):
        rows = _file_rows(Path(origin)) if one.files else _hub_rows(one)
        found = list(_prompts(one, rows))
        if not found:
            raise RecordError(f"{origin}: expected at least one row, found none.")
        if len(origins) > 1:
            prefix = f"{name}-{number}" if names.count(name) > 1 else name
            found = [(replace(prompt, id=f"{prefix}/{prompt.id}"), where) for prompt, where in found]
        prompts += found
    return unique_prompts(prompts)


def without_duplicates(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts without those that ask what an earlier one asks, but for white space."""
    first: dict[tuple[str, ...], Prompt] = {}
    for prompt in prompts:
        first.setdefault(tuple(part for m in prompt.question for part in (m["role"], _spaced(m["content"]))), prompt)
    return list(first.values())


@dataclass(frozen=True)
class Contamination:
    """A prompt that shares words with a test prompt, and the words."""

    prompt_id: str
    test_id: str
    shared: str


def contamination(prompts: Sequence[Prompt], tests: Iterable[Prompt], *, ngram: int = 13) -> list[Contamination]:
    """Return the prompts that share a run of `ngram` words with a test prompt (see above for short ones)."""
    runs: dict[int, dict[tuple[str, ...], str]] = defaultdict(dict)  # by length: a test's run -> the test's id
    whole: dict[str, str] = {}
    for test in tests:
        words = _words(test)
        if len(words) < min(_SHORTEST_RUN, ngram):
            whole[_asked(test)] = test.id
            continue
        for run in _runs(words, min(ngram, len(words))):
            runs[len(run)].setdefault(run, test.id)
    found = []
    for prompt in prompts:
        words = _words(prompt)
        asked = _asked(prompt)
        hits = ((known[run], run) for length, known in runs.items() for run in _runs(words, length) if run in known)
        hit = (whole[asked], [asked]) if asked in whole else next(hits, None)
        if hit is not None:
            found.append(Contamination(prompt.id, hit[0], " ".join(hit[1])))
    return found


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _asked(prompt: Prompt) -> str:
    return _spaced(" ".join(m["content"] for m in prompt.question if m["role"] == "user").lower())


def _words(prompt: Prompt) -> list[str]:
    return _WORD.findall(_asked(prompt))


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _prompts(one: PromptSet, rows: Iterable[tuple[int, str, dict[str, Any]]]) -> Iterator[tuple[Prompt, str]]:
    for count, (number, where, row) in enumerate(rows):
        if count == one.limit:
            return
        if missing := [column for column in one.columns.values() if column not in row]:
            raise RecordError(f"{where}: expected the column {missing[0]!r}, found {', '.join(row)}.")
        renamed = row | {key: row[column] for key, column in one.columns.items()}
        if isinstance(turns := renamed.get("messages"), list):
            renamed["messages"] = [_turn(turn) for turn in turns]
        yield prompt_row(renamed, where, number), where


def _turn(turn: Any) -> Any:
    """Return a turn in our keys, also when it has those of ShareGPT (`from`, `value`)."""
    if isinstance(turn, dict) and {"from", "value"} <= set(turn):
        return {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
    return turn


_ROLES = {"human": "user", "gpt": "assistant"}


def _file_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    if path.suffix != ".parquet":
        yield from ((number, f"{path}:{number}", row) for number, row in read_rows(path))
        return
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield number, f"{path}: row {number}", row
    except FileNotFoundError as error:
        raise RecordError(f"{path}: no such file; expected Parquet rows there.") from error
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise RecordError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())}).") from error


def _hub_rows(one: PromptSet) -> Iterator[tuple[int, str, dict[str, Any]]]:
    import datasets

    try:
        loaded: Any = datasets.load_dataset(one.dataset or "", one.config, split=one.split, revision=one.revision)
    except Exception as error:  # the Hub, the network, the script and the file formats each raise their own kind
        raise RecordError(
            f"{one.dataset}: `datasets` cannot load it, split {one.split!r} ({' '.join(str(error).split())[:300]}); "
            "check the name, the config and the connection."
        ) from error
    for number, row in enumerate(loaded, start=1):
        yield number, f"{one.dataset} ({one.split}): row {number}", row
