"""One of the processes that `accelerate launch` or `torchrun` started: how many there are, and waiting for the first.

Only the first writes files, takes locks and shows progress; all of them train. They meet through the run's
directory, which all machines must see, so that none waits inside a collective call while the first samples for hours.
"""

import os
import time
from collections.abc import Callable

_LOOK_S = 0.1


def processes() -> int:
    """Return how many processes were launched together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Return whether this is the first of them, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def sharded() -> bool:
    """Return whether `accelerate launch` was told to share weights and optimizer out over the processes."""
    return any(os.environ.get(name) == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))


def wait_until(ready: Callable[[], bool]) -> None:
    """Return when `ready` is true; when the first process fails, the launcher ends those that wait."""
    while not ready():
        time.sleep(_LOOK_S)
