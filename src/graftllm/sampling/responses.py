"""Prompts x sources -> responses in a JSONL file that survives being killed.

A response is keyed by its prompt, source and sample. What the file has already is not asked again;
an answer's draws depend on the seed and on what is asked alone, so a resumed run ends with the same
rows as one never stopped.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from graftllm.recipe import SamplingOptions
from graftllm.records import Prompt, Response, appending, read_responses, write_rows

Key = tuple[str, int]  # of a response among those of its source: the prompt's id and the sample
File = Callable[[Sequence[Response]], None]


class Source(Protocol):
    """Whatever can answer; `name` is what its responses are filed under."""

    @property
    def name(self) -> str:
        """The source's name, the same whenever it is opened."""
        ...

    def answer(
        self, prompts: Sequence[Prompt], done: Collection[Key], options: SamplingOptions, *, seed: int, file: File
    ) -> int:
        """Answer every prompt `options.samples` times but for the responses in `done`.

        Args:
            prompts: all of them, also those that are done.
            done: responses that are not wanted again.
            options: how to draw.
            seed: the same seed gives the same answers, whatever is done already.
            file: is given responses as they come, each once, in any order.

        Returns:
            How many requests failed for good.
        """
        ...


def sample_responses(
    prompts: Sequence[Prompt],
    open_source: Callable[[], Source],
    options: SamplingOptions,
    path: Path,
    *,
    source_name: str,
    seed: int,
) -> int:
    """Append to `path` what the source answers to the prompts that it has not answered there yet.

    Args:
        prompts: what to ask.
        open_source: called only when something is missing.
        options: answers per prompt, temperature and the like.
        path: JSONL of responses, of other sources too; created when absent. When the source is done, its rows
            stand in the order of the prompts.
        source_name: the source's name, under which its responses are filed.
        seed: of the draws.

    Returns:
        How many requests failed for good.
    """
    wanted = [(prompt.id, sample) for prompt in prompts for sample in range(options.samples)]
    with appending(path) as append:
        done = {(row.prompt_id, row.sample) for row in read_responses(path) if row.source == source_name}
        failed = 0
        if not done.issuperset(wanted):
            failed = open_source().answer(prompts, done, options, seed=seed, file=append)
    rows = read_responses(path)
    found = {(row.prompt_id, row.sample): row for row in rows if row.source == source_name}
    ordered = [row for row in rows if row.source != source_name] + [found[key] for key in wanted if key in found]
    if ordered != rows:
        write_rows(path, ordered)
    return failed
