"""Prompts x sources -> responses in a JSONL file that survives being killed.

Prompts go in chunks of one batch. A chunk's draws depend on the seed, the source and the chunk
alone, and a chunk is filed whole, so a resumed run ends with the same rows as one never stopped.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from graftllm.progress import track
from graftllm.recipe import SamplingOptions
from graftllm.records import Prompt, Response, append_rows, read_responses, write_rows
from graftllm.sampling.sources import Source


def sample_responses(
    prompts: Sequence[Prompt],
    open_source: Callable[[], Source],
    options: SamplingOptions,
    path: Path,
    *,
    source_name: str,
    seed: int,
) -> None:
    """Append to `path` what the source answers to the prompts that it has not answered there yet.

    Args:
        prompts: what to ask.
        open_source: called only when something is missing.
        options: answers per prompt, temperature and the like.
        path: JSONL of responses; created when absent. Unfinished chunks of a killed run are redone.
        source_name: the source's name, under which its responses are filed.
        seed: of the draws.
    """
    kept = _without_unfinished(prompts, options, path, source_name)
    chunks = [prompts[start : start + options.batch_size] for start in range(0, len(prompts), options.batch_size)]
    missing = [(number, chunk) for number, chunk in enumerate(chunks) if chunk[0].id not in kept]
    if not missing:
        return
    source = open_source()
    for number, chunk in track(missing, label=f"sampling {source_name}"):
        draw = int.from_bytes(hashlib.sha256(f"{seed} {source_name} {number}".encode()).digest()[:6], "big")
        answers = source.answer([prompt.messages for prompt in chunk], options, seed=draw)
        append_rows(
            path,
            [
                Response(prompt.id, source_name, sample, text)
                for prompt, texts in zip(chunk, answers, strict=True)
                for sample, text in enumerate(texts)
            ],
        )


def _without_unfinished(prompts: Sequence[Prompt], options: SamplingOptions, path: Path, source_name: str) -> set[str]:
    """Drop the rows of chunks that were not filed whole; return the prompt ids that this source has answered."""
    if not path.exists():
        return set()
    responses = read_responses(path)
    counts: dict[str, int] = {}
    for response in responses:
        if response.source == source_name:
            counts[response.prompt_id] = counts.get(response.prompt_id, 0) + 1
    whole: set[str] = set()
    for start in range(0, len(prompts), options.batch_size):
        ids = [prompt.id for prompt in prompts[start : start + options.batch_size]]
        if all(counts.get(prompt_id) == options.samples for prompt_id in ids):
            whole.update(ids)
    write_rows(path, (row for row in responses if row.source != source_name or row.prompt_id in whole))
    return whole
