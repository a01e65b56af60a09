"""What judges said, kept as it comes, so that a killed run does not judge the same answer twice.

The file is JSONL of responses: `source` is the judge, `prompt_id` what it judged, `grade` its verdict.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from graftllm.records import Response, appending, read_responses

Keep = Callable[[Mapping[str, float]], None]


@contextmanager
def verdicts(path: Path, judge: str) -> Iterator[tuple[Mapping[str, float], Keep]]:
    """Yield a judge's verdicts by what was judged, and what adds more of them to the file at once."""
    with appending(path) as append:
        said = {
            row.prompt_id: row.grade for row in read_responses(path) if row.source == judge and row.grade is not None
        }

        def keep(new: Mapping[str, float]) -> None:
            said.update(new)
            append([Response(key, judge, 0, "", grade=value) for key, value in new.items()])

        yield said, keep


def judged_as(*parts: str) -> str:
    """Return a name for what is judged, the same for the same texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
