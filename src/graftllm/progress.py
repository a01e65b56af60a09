"""Progress bars on stderr: a live line at a terminal, one final line elsewhere, nothing where GRAFTLLM_QUIET is set."""

import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from graftllm.launched import leads

Item = TypeVar("Item")


def say(text: str) -> None:
    """Print a line on stderr, also while a bar is shown; nothing where bars are not."""
    if not _is_quiet():
        print(f"graftllm: {text}", file=sys.stderr, flush=True)


def _is_quiet() -> bool:
    return bool(os.environ.get("GRAFTLLM_QUIET")) or not leads()


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar named `label`; yield a function that says how many are done now, and of how many."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=_is_quiet())) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def track(items: Collection[Item], *, label: str) -> Iterator[Item]:
    """Yield `items` one by one under a progress bar, unless there is only one."""
    count = len(items)
    if count < 2:
        yield from items
        return
    with progress(label) as show:
        for done, item in enumerate(items, start=1):
            yield item
            show(done, count)
