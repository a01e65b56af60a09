"""Rows that wait and rows that are written, in lanes: one for each set of weights that the model has to have.

Rows whose packs run beside the weights share the lane `()` with those of the base; packs that can
only be merged have a lane each, named by their mix. One thread; it decides which lane works when.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from graftllm.errors import GraftError, is_failure
from graftllm.fusion.beside import Mix
from graftllm.serving.batch import Batch
from graftllm.serving.metrics import Metrics
from graftllm.serving.orders import Chosen, Ended, Event, Failed, Order, Piece, Reading
from graftllm.serving.weights import Weights
from graftllm.serving.writing import Draw, Text, scored

_PREFILL = 4096  # tokens that are read between two steps, unless one prompt alone is longer
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """An order with whoever waits for its events; they are emitted on the engine's thread."""

    order: Order
    emit: Callable[[Event], None]
    since: float = field(default_factory=perf_counter)
    cancelled: bool = False


@dataclass(eq=False)
class Row:
    """One choice of a job."""

    job: Job
    choice: int
    pack: str
    mix: Mix
    reading: Reading
    draw: Draw
    text: Text
    count: int = 0
    last: int = 0


class Lanes:
    """All rows of an engine."""

    def __init__(self, weights: Weights, metrics: Metrics, max_batch: int) -> None:
        """Start without rows; a lane writes at most `max_batch` at once."""
        self.weights = weights
        self.waiting: list[Row] = []
        self._metrics, self._max_batch = metrics, max_batch
        self._running: dict[Mix, tuple[Batch, list[Row]]] = {}

    def __iter__(self) -> Iterator[Row]:
        """Yield every row."""
        yield from self.waiting
        for _, rows in self._running.values():
            yield from rows

    @property
    def running(self) -> int:
        """How many rows are written."""
        return sum(len(rows) for _, rows in self._running.values())

    def busy(self) -> list[Mix]:
        """Return the lanes with rows, those with running ones first."""
        return list(dict.fromkeys([*self._running, *map(self._lane, self.waiting)]))

    def enter(self, job: Job, chosen: Chosen, mix: Mix) -> None:
        """Queue a row for each choice of a job, and tell it which pack answers; fail one that the pack cannot read."""
        try:
            reading = job.order.reading(chosen.pack)
        except GraftError as error:
            return fail([job], error)
        self._metrics.answered.labels(chosen.pack).inc()
        job.emit(chosen)
        for choice in range(job.order.choices):
            draw, text = Draw(job.order, reading.ids, choice), Text(reading.voice.tokenizer, job.order.stop)
            self.waiting.append(Row(job, choice, chosen.pack, mix, reading, draw, text))

    def give_up(self, error: BaseException) -> None:
        """Fail all rows."""
        fail({row.job: None for row in self}, error)
        self.waiting, self._running = [], {}

    def drop_cancelled(self) -> None:
        """Forget the rows that nobody waits for."""
        self.waiting = [row for row in self.waiting if not row.job.cancelled]
        for lane, (_, rows) in list(self._running.items()):
            self._drop(lane, [row for row in rows if row.job.cancelled])

    def work(self, lane: Mix) -> None:
        """Read prompts that wait for a lane, and write a token of each of its rows.

        What goes wrong is told to the jobs of the lane; others do not notice.
        """
        try:
            if lane:
                self.weights.merge(lane)
            self._read(lane)
            if lane in self._running:
                self._step(lane)
        except BaseException as error:
            if not is_failure(error):
                raise
            _, rows = self._running.pop(lane, (None, ()))
            fail({row.job: None for row in rows or self.waiting if self._lane(row) == lane}, error)

    def _lane(self, row: Row) -> Mix:
        return () if self.weights.runs_beside(row.mix) else row.mix

    def _read(self, lane: Mix) -> None:
        """Let rows that wait join a lane, the oldest first, and write their first token."""
        batch, rows = self._running.get(lane) or (Batch(self.weights.model), [])
        joining: list[Row] = []
        for row in self.waiting:
            if self._lane(row) != lane or row.job.cancelled:
                continue
            together = [*joining, row]
            tokens = len(together) * max(len(one.reading.ids) for one in together)
            if len(rows) + len(together) > self._max_batch or (joining and tokens > _PREFILL):
                break
            try:
                if not lane and not self.weights.fits([one.mix for one in (*rows, *together)]) and (rows or joining):
                    break
            except GraftError as error:
                fail([row.job], error)
                continue
            joining = together
        joining = [row for row in joining if not row.job.cancelled]
        if not joining:
            return
        self.waiting = [row for row in self.waiting if row not in joining]
        self._running[lane] = batch, [*rows, *joining]
        prompts = [row.reading.ids for row in joining]
        logits = self._with_packs(lane, joining, lambda: batch.read(prompts), reading=True)
        self._metrics.read.inc(sum(map(len, prompts)))
        for row in joining:
            self._metrics.first.observe(perf_counter() - row.job.since)
        self._write(lane, joining, logits)

    def _step(self, lane: Mix) -> None:
        batch, rows = self._running[lane]
        with self._metrics.step.time():
            logits = self._with_packs(lane, rows, lambda: batch.step([row.last for row in rows]), reading=False)
        self._write(lane, rows, logits)

    def _with_packs(self, lane: Mix, rows: list[Row], work: Callable[[], Tensor], *, reading: bool) -> Tensor:
        if lane:
            return work()
        with self.weights.beside([row.mix for row in rows], reading=reading):
            return work()

    def _write(self, lane: Mix, rows: list[Row], logits: Tensor) -> None:
        """Give rows the token that follows by logits of shape (rows, vocabulary); let those go that are whole."""
        likeliest = logits.argmax(dim=1).tolist()
        for row, mine, best in zip(rows, logits, likeliest, strict=True):
            try:
                row.last = best if row.draw.takes_likeliest else row.draw.token(mine)
            except RuntimeError as error:  # logits that are no numbers: its own pack's fault, not that of other rows
                fail([row.job], error)
        self._metrics.written.inc(len(rows))
        gone = [row for row, mine in zip(rows, logits, strict=True) if row.job.cancelled or self._told(row, mine)]
        self._drop(lane, gone)

    def _told(self, row: Row, logits: Tensor) -> bool:
        """Do what `_whole` does; what goes wrong with a row's text is its own voice's fault, not that of other rows."""
        try:
            return self._whole(row, logits)
        except BaseException as error:
            if not is_failure(error):
                raise
            fail([row.job], error)
            return True

    def _whole(self, row: Row, logits: Tensor) -> bool:
        """Add a row's last token to its text, and tell what is new; return whether the text is whole now."""
        order, voice = row.job.order, row.reading.voice
        ended = row.last in voice.ends
        row.count += 1
        text = "" if ended else row.text.add(row.last)
        whole = ended or row.text.stopped or row.count >= row.reading.max_tokens
        text += row.text.finish() if whole else ""
        tokens = ()
        if order.top_logprobs is not None and not ended:
            tokens = (scored(logits, row.last, order.top_logprobs, voice.tokenizer),)
        if text or tokens:
            row.job.emit(Piece(row.choice, text, tokens))
        if whole:
            row.job.emit(Ended(row.choice, "stop" if ended or row.text.stopped else "length", row.count))
        return whole

    def _drop(self, lane: Mix, gone: list[Row]) -> None:
        if not gone:
            return
        batch, rows = self._running[lane]
        kept = [i for i, row in enumerate(rows) if row not in gone]
        if kept:
            batch.keep(kept)
            self._running[lane] = batch, [rows[i] for i in kept]
        else:
            del self._running[lane]


def fail(jobs: Iterable[Job], error: BaseException) -> None:
    """Tell jobs that they cannot be finished; their rows count as cancelled."""
    if not isinstance(error, GraftError):
        _log.error("an order failed by a bug", exc_info=error)
    for job in jobs:
        if not job.cancelled:
            job.cancelled = True
            job.emit(Failed(error))
