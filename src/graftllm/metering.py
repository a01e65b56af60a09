"""What work takes: seconds by the clock, of processors and of GPUs, and memory.

A watching thread tells every few seconds what was spent so far, so that a process that is killed
leaves its share behind. This room knows neither what the work is nor where that is written.
"""

import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftllm.errors import GraftError
from graftllm.launched import processes

_LOOK_S = 0.1  # between looks at memory
_TELL_S = 5.0  # between two tellings of what was spent
_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Spent:
    """What some work took.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of all threads, and of child processes that have ended.
        gpu_seconds: by the clock, times the GPUs that held something of this process.
        peak_memory_bytes: the most that this process had resident, looked at ten times a second.
        peak_gpu_bytes: the most that PyTorch had allocated, on all GPUs together.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    peak_gpu_bytes: int = 0

    def __add__(self, more: "Spent") -> "Spent":
        """Return what both took, one after the other."""
        return Spent(
            round(self.seconds + more.seconds, 2),
            round(self.cpu_seconds + more.cpu_seconds, 2),
            round(self.gpu_seconds + more.gpu_seconds, 2),
            max(self.peak_memory_bytes, more.peak_memory_bytes),
            max(self.peak_gpu_bytes, more.peak_gpu_bytes),
        )


@contextmanager
def metered(tell: Callable[[Spent], None]) -> Iterator[Callable[[], Spent]]:
    """Yield what returns how much the block has spent so far.

    In a launch of several processes, the seconds of processors and GPUs are this one's times their number.

    Args:
        tell: called with what was spent so far, every few seconds and once when the block ends, however it ends.
    """
    meter, over = _Meter(), threading.Event()

    def watch() -> None:
        told = time.monotonic()
        while not over.wait(_LOOK_S):
            meter.look()
            if time.monotonic() - told >= _TELL_S:
                told = time.monotonic()
                try:
                    tell(meter.spent())
                except GraftError:
                    return  # the block's end meets it again, where it can be raised

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield meter.spent
    finally:
        over.set()
        watcher.join()
        tell(meter.spent())


def peak_memory_bytes() -> int:
    """Return the most memory that this process has had resident."""
    status = _STATUS.read_text() if _STATUS.exists() else ""
    if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
        return int(found[1]) * 1024  # what getrusage says begins with the peak of the process that started this one
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class _Meter:
    """Where the counters stood at the start, and the most memory seen since."""

    def __init__(self) -> None:
        self._started, self._cpu_before = time.monotonic(), _cpu_seconds()
        self._peaks_before = peak_memory_bytes(), sum(_gpu_bytes("max_memory_allocated"))
        self._looked = self._started
        self._memory, self._gpu_memory, self._gpu_seconds = 0, 0, 0.0
        self._lock = threading.Lock()

    def look(self) -> None:
        """Take note of the memory that is held now, and of the GPUs."""
        with self._lock:
            now, held = time.monotonic(), _gpu_bytes("memory_allocated")
            self._gpu_seconds += (now - self._looked) * len(held)
            self._looked = now
            self._memory = max(self._memory, _memory_bytes())
            self._gpu_memory = max(self._gpu_memory, sum(held))

    def spent(self) -> Spent:
        """Return what was spent since the start."""
        self.look()
        # Exact where the process has never had more, also between two looks.
        peaks = peak_memory_bytes(), sum(_gpu_bytes("max_memory_allocated"))
        memory, gpu_memory = (
            peak if peak > before else seen
            for peak, before, seen in zip(peaks, self._peaks_before, (self._memory, self._gpu_memory), strict=True)
        )
        return Spent() + Spent(
            time.monotonic() - self._started,
            (_cpu_seconds() - self._cpu_before) * processes(),
            self._gpu_seconds * processes(),
            memory,
            gpu_memory * processes(),
        )


def _cpu_seconds() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def _memory_bytes() -> int:
    """Return the memory that this process has resident; where the system does not say, the most it ever had."""
    try:
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory_bytes()


def _gpu_bytes(what: str) -> list[int]:
    """Return a figure of PyTorch's for each GPU that it has something on; PyTorch is not imported for it."""
    cuda: Any = sys.modules.get("torch.cuda")
    if cuda is None or not hasattr(cuda, "is_initialized") or not cuda.is_initialized():
        return []
    return [held for i in range(cuda.device_count()) if (held := getattr(cuda, what)(i))]
