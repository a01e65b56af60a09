"""The engine: one thread that owns the model and writes all texts, a token each at every step.

New orders join between steps, and packs come and go between them, too. What a row writes does not
depend on the others.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Condition, Thread
from time import perf_counter
from typing import Any

import torch

from graftllm.errors import FusionError, is_failure
from graftllm.fusion.beside import Mix
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.manifest import AUTO
from graftllm.fusion.routes import BASE, Route
from graftllm.fusion.voices import Voices
from graftllm.serving.batch import check_servable
from graftllm.serving.lanes import Job, Lanes, fail
from graftllm.serving.metrics import Metrics
from graftllm.serving.orders import Chosen, Event, Order, Refused, unknown_model
from graftllm.serving.weights import Weights

_TURN = 32  # steps of one lane before another's turn
_STOPPING = "the server is stopping; ask again later."


class Engine:
    """Writes what orders ask for. All methods may be called by any thread.

    Attributes:
        serves: the digests of the packs that may be asked for, by name.
        metrics: what it counts.
        max_queue: how many choices may wait.
    """

    def __init__(
        self,
        grafted: GraftedModel,
        digests: Mapping[str, str],
        *,
        memory_bytes: int,
        max_queue: int = 256,
        max_batch: int = 32,
    ) -> None:
        """Take over a grafted model, which nobody else may use from now on, and begin to work.

        Args:
            grafted: a live base and its packs.
            digests: the SHA-256 of each pack's file, by name.
            memory_bytes: see `Weights`.
            max_queue: how many choices may wait.
            max_batch: how many rows are written at once.

        Raises:
            FusionError: the model cannot be served.
        """
        check_servable(grafted.model)
        self.metrics = Metrics()
        self.serves: Mapping[str, str] = {}
        self._lanes = Lanes(Weights(grafted.model, memory_bytes), self.metrics, max_batch)
        self.max_queue = max_queue
        self._arrived: deque[tuple[Job, Mix | None]] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed, self._stopping = Condition(), False
        self._adopt(grafted, digests)
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether orders are taken."""
        return self._thread.is_alive() and not self._stopping

    @property
    def voices(self) -> Voices:
        """The voices of the packs that are served."""
        return self._grafted.voices

    def stop(self) -> None:
        """Finish all that was submitted, then end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, order: Order, emit: Callable[[Event], None]) -> Job:
        """Queue an order; its events are given to `emit`, on the engine's thread.

        Raises:
            Refused: there is no such pack, too many choices wait already, or the server stops.
        """
        job = Job(order, emit)
        with self._changed:
            self._refuse_when_stopping()
            known = [BASE, *([AUTO] if self._grafted.chooses else []), *self.serves]
            if order.pack not in known:
                raise unknown_model(order.pack, known)
            waiting = len(self._lanes.waiting) + sum(job.order.choices for job, _ in self._arrived)
            if waiting + order.choices > self.max_queue:
                raise Refused(
                    f"the queue is full: {waiting} of at most {self.max_queue} choices wait; ask again later.",
                    status=429,
                    code="queue_full",
                )
            self._arrived.append((job, None if order.pack == AUTO else self._mix({order.pack: 1.0})))
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Stop working on a job whose events nobody wants any more; one that has ended does not mind."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def adopt(self, grafted: GraftedModel, digests: Mapping[str, str]) -> None:
        """Serve these packs from now on; rows that were begun go on. Returns when it is so."""
        self.between_steps(lambda: self._adopt(grafted, digests)).result()

    def retire(self, name: str) -> None:
        """Take no more orders for a pack; return when those that were taken are finished."""
        drained: Future[None] = Future()

        def check() -> None:
            if not any(row.pack == name for row in self._lanes):
                drained.set_result(None)
            elif not self.alive:
                drained.set_exception(Refused(_STOPPING, status=503, code="stopping"))
            else:
                self.between_steps(check)

        with self._changed:
            self.serves = {key: digest for key, digest in self.serves.items() if key != name}
        self.between_steps(check)
        drained.result()

    def measured(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        self.metrics.waiting.set(len(self._lanes.waiting) + len(self._arrived))
        self.metrics.running.set(self._lanes.running)
        self.metrics.packs.set(len(self.serves))
        self.metrics.memory.set(self._lanes.weights.shelf.nbytes)
        return self.metrics.text()

    def between_steps(self, task: Callable[[], Any]) -> Future[Any]:
        """Let the engine's thread do something between two steps, after it took in what arrived before.

        Raises:
            Refused: the server stops.
        """
        done: Future[Any] = Future()
        with self._changed:
            self._refuse_when_stopping()
            self._tasks.append((task, done))
            self._changed.notify()
        return done

    def _refuse_when_stopping(self) -> None:
        if not self.alive:
            raise Refused(_STOPPING, status=503, code="stopping")

    def _adopt(self, grafted: GraftedModel, digests: Mapping[str, str]) -> None:
        weights, used = self._lanes.weights, {digest for row in self._lanes for digest, _ in row.mix}
        packs = {digest: grafted.packs[name] for name, digest in digests.items()}
        weights.only(packs | {digest: weights.packs[digest] for digest in used - set(packs)})
        self._grafted = grafted
        with self._changed:
            self.serves = dict(digests)

    def _mix(self, weights: Mapping[str, float]) -> Mix:
        return tuple(sorted((self.serves[name], weight) for name, weight in weights.items() if name in self.serves))

    @torch.inference_mode()
    def _run(self) -> None:
        lane, steps = (), 0
        while True:
            with self._changed:
                idle = not self._lanes.busy()
                while idle and not (self._arrived or self._tasks or self._stopping):
                    self._changed.wait()
                if idle and not (self._arrived or self._tasks):
                    return
                arrived, tasks = list(self._arrived), list(self._tasks)
                self._arrived.clear()
                self._tasks.clear()
            try:
                self._take_in(arrived)
                self._lanes.drop_cancelled()
            except BaseException as error:  # no memory left, say: who waits must be told, and others may come
                if not is_failure(error):
                    raise
                fail([job for job, _ in arrived], error)
                self._lanes.give_up(error)
            for task, done in tasks:
                _settle(task, done)
            busy = self._lanes.busy()
            if busy and (lane not in busy or steps >= _TURN):
                lane, steps = busy[(busy.index(lane) + 1) % len(busy)] if lane in busy else busy[0], 0
            if busy:
                self._lanes.work(lane)
                steps += 1

    def _take_in(self, arrived: list[tuple[Job, Mix | None]]) -> None:
        """Decide which packs answer new jobs, and queue their rows."""
        unsure = [job for job, mix in arrived if mix is None and not job.cancelled]
        routes: dict[Job, Route] = {}
        if unsure:
            started = perf_counter()
            try:
                self._lanes.weights.bare()
                found = self._grafted.route([job.order.messages for job in unsure])
                routes = dict(zip(unsure, found, strict=True))
            except FusionError as error:  # no rule fits, and no router knows
                fail(unsure, Refused(str(error), param="model"))
            except Exception as error:
                fail(unsure, error)
            self.metrics.routing.observe((perf_counter() - started) / len(unsure))
        for job, mix in arrived:
            if job in routes:
                route = routes[job]
                pack = route.name if route.name in self.serves else BASE
                mix = self._mix(route.weights) if pack != BASE else ()
                self._lanes.enter(job, Chosen(pack, route.probabilities, route.reason), mix)
            elif mix is not None:
                self._lanes.enter(job, Chosen(job.order.pack), mix)


def _settle(task: Callable[[], Any], done: Future[Any]) -> None:
    try:
        done.set_result(task())
    except Exception as error:
        done.set_exception(error)
