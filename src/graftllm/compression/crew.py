"""Who does the units of a packing: a thread or some, or a Ray cluster; the same bytes come of it."""

import importlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from queue import Empty, SimpleQueue
from socket import create_connection
from threading import Thread
from typing import Any, Literal

import torch

from graftllm.compression.jobs import Job, Unit
from graftllm.compression.units import carry_out
from graftllm.delta import Delta
from graftllm.devices import gpus, memory_bytes, use_own_gpu
from graftllm.errors import WorkerError, first_line
from graftllm.progress import progress
from graftllm.threads import one_thread

Engine = Literal["local", "ray"]
Crew = Callable[[Sequence[Unit], str], None]  # does units under a progress bar of that label
_SMALL = 50_000_000  # parameters up to which matrices are so small that threads wait for each other
_PATIENCE_S = 10  # for a cluster's head to answer
_WORKER_BYTES = 2 << 30  # of memory, with room to spare


def default_workers(delta: Delta, device: str) -> int:
    """Return how many threads pack a large model best: one a GPU or, on CPU, one a core as far as memory goes."""
    if delta.tuned.parameters < _SMALL:
        return 1
    if found := gpus(device):
        return found
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, memory_bytes() // _WORKER_BYTES))


@contextmanager
def open_crew(job: Job, workers: int, engine: Engine = "local") -> Iterator[Crew]:
    """Yield a function that does units, wherever they shall be done.

    Args:
        job: what the units share.
        workers: threads; with Ray, the size of the cluster that is started where none is given.
        engine: `ray` takes the cluster of RAY_ADDRESS; all its machines must see the same files.

    Raises:
        WorkerError: Ray is not installed, or gives no cluster.
    """
    if engine == "ray":
        with _ray(job, workers) as crew:
            yield crew
    else:

        def threaded(units: Sequence[Unit], label: str) -> None:
            with closing(_here(job, units, workers)) as finished:
                _follow(finished, len(units), label)

        yield threaded


def _here(job: Job, units: Sequence[Unit], workers: int) -> Generator[None]:
    """Do units in threads of one core each; what takes long, such as products, leaves the interpreter to others."""
    todo: SimpleQueue[Unit] = SimpleQueue()
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    for unit in _largest_first(job, units):
        todo.put(unit)

    def work(number: int) -> None:
        use_own_gpu(job.device, number)
        while True:
            try:
                unit = todo.get_nowait()
            except Empty:
                return
            try:
                carry_out(job, unit)
                done.put(None)
            except BaseException as error:
                done.put(error)

    with one_thread():  # those that are started here have this number, too
        threads = [Thread(target=work, args=(i,), name=f"packing-{i}") for i in range(min(workers, len(units)))]
        try:
            for thread in threads:
                thread.start()
            for _ in units:
                if (error := done.get()) is not None:
                    raise error
                yield
        except (KeyboardInterrupt, GeneratorExit):
            threads = []  # who interrupts does not want to wait for what is begun
            raise
        finally:
            with suppress(Empty):
                while True:
                    todo.get_nowait()
            for thread in threads:
                thread.join()


@contextmanager
def _ray(job: Job, workers: int) -> Iterator[Crew]:
    """Yield a crew of Ray tasks, one a unit."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise WorkerError("engine: ray is not installed; pip install 'graftllm[ray]', or use local.") from error
    started = not ray.is_initialized()
    if started:
        _start(ray, workers)
    with_gpu = {"num_gpus": 1} if job.device in ("auto", "cuda") and ray.cluster_resources().get("GPU") else {}
    task, shared = ray.remote(_do_alone).options(**with_gpu), ray.put(job)

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


def _start(ray: Any, workers: int) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start one here.

    Raises:
        WorkerError: there is none, or none can be started.
    """
    address = os.environ.get("RAY_ADDRESS")
    host, _, port = (address or "").rpartition(":")
    try:
        if port.isdigit() and "/" not in host:  # where nobody listens, Ray itself asks again and again
            create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_S).close()
        ray.init(**({"num_cpus": workers, "include_dashboard": False} if address is None else {}))
    except Exception as error:  # of many kinds, Ray's own and Python's
        mend = "Correct RAY_ADDRESS, start the cluster, or leave it out" if address else "Try again"
        raise WorkerError(
            f"engine: Ray gives no cluster{f' at {address}' if address else ' here'} ({first_line(error)}). {mend}; or "
            "use local."
        ) from error


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
