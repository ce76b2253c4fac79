"""Dynamic batching: a worker thread that runs queued passes together.

Requests that are queued at the same time share a pass (co-batched requests). A request whose result is another pass is queued
again, as in continuous batching: batches form anew for every pass.
"""

from __future__ import annotations

import asyncio
import bisect
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from atspeed.engine.errors import OverloadedError

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
Work = TypeVar("Work")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class BatchLimits:
    """Limits of one batch and of the queue.

    The first four defaults are those of the services' settings. `padding` and `gathered_tokens` were chosen, not measured; the
    services derive `gathered_tokens` from the setting batch_kv_mb.

    Attributes:
        requests: requests per batch.
        tokens: new tokens of a batch, padding included; a single pass may have more.
        delay_seconds: time that a pass waits for co-batched requests although the worker is idle.
        waiting: passes in the queue.
        padding: ratio of the batch's new tokens, padded to the longest row, to those of its passes one by one.
        cached_padding: the same of cached tokens.
        gathered_tokens: new and cached tokens of a batch, padding included, whose keys and values are copied side by side.
        row_keys: new and cached tokens of one row of a batch, padding included.
    """

    requests: int = 16
    tokens: int = 32
    delay_seconds: float = 0.0
    waiting: int = 256
    padding: float = 1.5
    cached_padding: float = 1.5
    gathered_tokens: int = 1_000_000
    row_keys: int = 1_000_000

    def allow(self, rows: int, longest: int, deepest: int) -> bool:
        """Return whether `rows` passes fit into a batch, padded to `longest` new and `deepest` cached tokens each."""
        row = longest + deepest
        within = rows * longest <= self.tokens and row <= self.row_keys and rows * row <= self.gathered_tokens
        return rows <= self.requests and within


@dataclass(frozen=True)
class PassSize:
    """The size of a pass.

    Attributes:
        new_tokens: tokens that the pass computes.
        cached_tokens: earlier tokens whose keys and values it reads.
    """

    new_tokens: int
    cached_tokens: int


def next_batch(waiting: Sequence[PassSize], limits: BatchLimits) -> list[int]:
    """Return the indices of the queued passes [n] that run next, ascending.

    The first pass always runs. Others join it in the order of the queue, as far as the limits allow and the padding is worth
    it. So the pass behind n others runs at the latest in the (n+1)-th batch from then on, whatever is queued behind it.
    """
    chosen: list[int] = []
    # Sums and maxima of the chosen passes.
    new = cached = longest = deepest = 0
    for index, size in enumerate(waiting):
        rows = len(chosen) + 1
        padded_new, padded_cached = rows * max(longest, size.new_tokens), rows * max(deepest, size.cached_tokens)
        fits = limits.allow(rows, max(longest, size.new_tokens), max(deepest, size.cached_tokens))
        close = padded_new <= limits.padding * (new + size.new_tokens)
        close &= padded_cached <= limits.cached_padding * (cached + size.cached_tokens)
        if not chosen or (fits and close):
            chosen.append(index)
            new, cached = new + size.new_tokens, cached + size.cached_tokens
            longest, deepest = max(longest, size.new_tokens), max(deepest, size.cached_tokens)
        if len(chosen) == limits.requests:
            break
    return chosen


@dataclass(frozen=True)
class Reschedule:
    """A result in place of an outcome: the work needs another pass.

    Attributes:
        size: the size of that pass.
        behind: true if the requests that wait come first.
    """

    size: PassSize
    behind: bool = False


@dataclass(eq=False)
class QueuedRequest(Generic[Work, Outcome]):
    """A request in the queue, or in a batch that runs.

    Attributes:
        work: the caller's description of the passes.
        size: the size of its next pass.
        began_at: the time at which the request began or last gave way, by `time.monotonic`. It orders the queue.
        delay_seconds: time that each of its passes waits for co-batched requests.
        done: resolves when the work is done; it is cancelled when the request has left the queue.
        delayed_until: the time at which its next pass stops waiting for co-batched requests.
        cancelled: true when no further pass may run.
    """

    work: Work
    size: PassSize
    began_at: float
    delay_seconds: float
    done: asyncio.Future[Outcome | Exception]
    delayed_until: float = 0.0
    cancelled: bool = False


class Batcher(Generic[Work, Outcome]):
    """Runs batches of work one at a time, in a thread of its own. All methods are for the event loop.

    The queue has the order in which requests began, whatever pass they are at: a request that has begun is finished before newer
    ones start. Taking turns would finish all of them late and none earlier. Work that returns `Reschedule` keeps its place: its
    next pass starts at once, unless an older request waits. It is never refused, however full the queue is. Long work does take
    turns: it goes `behind` those that wait.

    A batch forms when the worker is idle. So a pass that finds it idle never waits, unless limits.delay_seconds is set.

    Args:
        run: computes one batch, in the thread. It yields an outcome or an exception for each piece of work, in order, and each
            is delivered at once. If it raises, work without an outcome is run again one by one, so that no request fails
            because of a co-batched one: `run` must leave such work unchanged. An exception for a single piece of work is its
            outcome.
        limits: the limits of a batch and of the queue.
    """

    def __init__(
        self, run: Callable[[Sequence[Work]], Iterable[Outcome | Reschedule | Exception]], limits: BatchLimits
    ) -> None:
        self.limits = limits
        self._run = run
        self._queue: list[QueuedRequest[Work, Outcome]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="onnx", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Return the number of passes in the queue."""
        return len(self._queue)

    def put(
        self, work: Work, size: PassSize, *, began_at: float | None = None, may_wait: bool = True
    ) -> QueuedRequest[Work, Outcome]:
        """Queue work. Raises OverloadedError when the queue is full.

        Args:
            work: an argument of `run`.
            size: the size of its first pass.
            began_at: the time at which its request began, by `time.monotonic`; now if None.
            may_wait: true if its passes may wait for co-batched requests.
        """
        began = time.monotonic() if began_at is None else began_at
        delay_seconds = self.limits.delay_seconds if may_wait else 0.0
        done = asyncio.get_running_loop().create_future()
        request = QueuedRequest[Work, Outcome](work, size, began, delay_seconds, done)
        with self._changed:
            if len(self._queue) >= self.limits.waiting:
                raise OverloadedError(f"max_queued_passes: {len(self._queue)} passes wait already")
            self._enqueue(request)
            self._changed.notify()
        return request

    async def outcome(self, request: QueuedRequest[Work, Outcome]) -> Outcome:
        """Wait for the outcome of a request, and return or raise it.

        A caller that is cancelled here takes its request out of the queue. A batch that runs already is not stopped, and is the
        request's last.
        """
        try:
            await asyncio.wait((request.done,))
        except asyncio.CancelledError:
            self._cancel(request)
            raise
        outcome = request.done.result()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self) -> None:
        """Run the queued passes, and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _cancel(self, request: QueuedRequest[Work, Outcome]) -> None:
        with self._changed:
            request.cancelled = True
            if request not in self._queue:
                return
            self._queue.remove(request)
        request.done.cancel()

    def _enqueue(self, request: QueuedRequest[Work, Outcome]) -> None:
        request.delayed_until = time.monotonic() + request.delay_seconds
        bisect.insort(self._queue, request, key=lambda queued: queued.began_at)

    def _requeue(self, request: QueuedRequest[Work, Outcome], again: Reschedule) -> None:
        with self._changed:
            request.size = again.size
            if again.behind:
                request.began_at = time.monotonic()
            if not request.cancelled:
                self._enqueue(request)
                return
        request.done.get_loop().call_soon_threadsafe(request.done.cancel)

    def _work(self) -> None:
        while batch := self._take_batch():
            self._run_batch(batch)

    def _run_batch(self, batch: Sequence[QueuedRequest[Work, Outcome]]) -> None:
        answered = 0
        try:
            for request, outcome in zip(batch, self._run([request.work for request in batch]), strict=True):
                if isinstance(outcome, Reschedule):
                    self._requeue(request, outcome)
                else:
                    _deliver(request, outcome)
                answered += 1
        except Exception as error:  # noqa: BLE001 - it is the outcome of a single request, and logged for a batch
            if len(batch) == 1:
                _deliver(batch[0], error)
                return
            _log.warning("batch_failed", requests=len(batch), answered=answered, exc_info=error)
            for request in batch[answered:]:
                self._run_batch([request])

    def _take_batch(self) -> list[QueuedRequest[Work, Outcome]]:
        """Wait for the next batch and take it from the queue; empty when the batcher is closed and the queue is empty."""
        with self._changed:
            while self._queue or not self._closed:
                delay = self._remaining_delay() if self._queue else None
                if delay == 0:
                    return self._remove(next_batch([request.size for request in self._queue], self.limits))
                self._changed.wait(delay)
        return []

    def _remaining_delay(self) -> float:
        """Return the seconds that the first request may still wait for others; 0 when no other could join its batch."""
        left = self._queue[0].delayed_until - time.monotonic()
        if left <= 0 or self._closed:
            return 0.0
        sizes = [request.size for request in self._queue]
        batch = [sizes[index] for index in next_batch(sizes, self.limits)]
        longest, deepest = max(size.new_tokens for size in batch), max(size.cached_tokens for size in batch)
        return left if self.limits.allow(len(batch) + 1, longest, deepest) else 0.0

    def _remove(self, indices: Sequence[int]) -> list[QueuedRequest[Work, Outcome]]:
        taken = [self._queue[index] for index in indices]
        for index in reversed(indices):
            del self._queue[index]
        return taken


def _deliver(request: QueuedRequest[Work, Outcome], outcome: Outcome | Exception) -> None:
    request.done.get_loop().call_soon_threadsafe(request.done.set_result, outcome)
