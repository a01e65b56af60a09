"""Who does the units of a packing: this process, several, or a Ray cluster; the same bytes come of it."""

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Literal

import torch

from graftllm.compression.units import Job, Unit, carry_out
from graftllm.delta import Delta
from graftllm.errors import WorkerError
from graftllm.generation import resolve_device
from graftllm.progress import progress
from graftllm.threads import one_thread

Engine = Literal["local", "ray"]
Crew = Callable[[Sequence[Unit], str], None]  # does units under a progress bar of that label
_SMALL = 50_000_000  # parameters up to which starting processes takes longer than packing
_WORKER_BYTES = 2 << 30  # of memory, with room to spare


def default_workers(delta: Delta, device: str) -> int:
    """Return how many processes pack best: one a core, for large models on CPU, as far as memory goes."""
    if delta.tuned.parameters < _SMALL or resolve_device(device).type != "cpu":
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, memory // _WORKER_BYTES))


@contextmanager
def open_crew(job: Job, workers: int, engine: Engine = "local") -> Iterator[Crew]:
    """Yield a function that does units, wherever they shall be done.

    Args:
        job: what the units share.
        workers: processes; with Ray, the size of the cluster that is started where none is given.
        engine: `ray` takes the cluster of RAY_ADDRESS; all its machines must see the same files.

    Raises:
        CompressionError: a worker was killed, or Ray is not installed.
    """
    if engine == "ray":
        with _ray(job, workers) as crew:
            yield crew
    elif workers == 1:
        yield lambda units, label: _follow(_here(job, units), len(units), label)
    else:
        with _processes(job, workers) as crew:
            yield crew


def _here(job: Job, units: Sequence[Unit]) -> Iterator[None]:
    with one_thread():  # small matrices gain nothing by more
        for unit in units:
            yield carry_out(job, unit)


@contextmanager
def _processes(job: Job, workers: int) -> Iterator[Crew]:
    """Yield a crew of processes; when this one is interrupted or killed they leave at once."""
    context = multiprocessing.get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_join, initargs=(job, watched))

    def crew(units: Sequence[Unit], label: str) -> None:
        todo = [unit for unit in units if not unit.file(job).exists()]
        done = as_completed([pool.submit(_do, unit) for unit in _largest_first(job, todo)])
        _follow((future.result() for future in done), len(todo), label)

    try:
        yield crew
    except BrokenProcessPool as error:
        raise WorkerError(
            f"packing: a worker process died, perhaps of too little memory for {workers} of them. What is finished is "
            "kept; run the same command again with fewer --workers. "
            "(A Python script must guard its start with `if __name__ == '__main__':`, or use workers=1.)"
        ) from error
    except BaseException:
        held.close()  # the workers leave
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        held.close()
        watched.close()


_JOB: list[Job] = []  # of this worker process


def _join(job: Job, watched: Any) -> None:
    """Make this process a worker that leaves with the one that started it, whose end of the pipe then closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(watched,), daemon=True).start()
    torch.set_num_threads(1)
    _JOB[:] = [job]


def _leave_with(watched: Any) -> None:
    try:
        watched.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _do(unit: Unit) -> None:
    carry_out(_JOB[0], unit)


@contextmanager
def _ray(job: Job, workers: int) -> Iterator[Crew]:
    """Yield a crew of Ray tasks, one a unit."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise WorkerError("engine: ray is not installed; pip install 'graftllm[ray]', or use local.") from error
    started = not ray.is_initialized()
    if started:
        ray.init(**({} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}))
    task, shared = ray.remote(_do_alone), ray.put(job)

    def finished(todo: Sequence[Unit]) -> Iterator[None]:
        waiting = [task.remote(shared, unit) for unit in _largest_first(job, todo)]
        while waiting:
            done, waiting = ray.wait(waiting)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # it would tell the whole traceback as its message

    def crew(units: Sequence[Unit], label: str) -> None:
        todo = [unit for unit in units if not unit.file(job).exists()]
        _follow(finished(todo), len(todo), label)

    try:
        yield crew
    finally:
        if started:
            ray.shutdown()


def _do_alone(job: Job, unit: Unit) -> None:
    torch.set_num_threads(1)
    carry_out(job, unit)


def _largest_first(job: Job, units: Sequence[Unit]) -> list[Unit]:
    """Return units in an order that leaves no worker alone with a long one at the end."""
    return sorted(units, key=lambda unit: -job.delta.tuned.specs[unit.name].parameters)


def _follow(finished: Iterator[None], count: int, label: str) -> None:
    with progress(label) as show:
        for done, _ in enumerate(finished, start=1):
            show(done, count)
