"""A worker thread behind a bounded queue: what waits together runs together, and what is given up leaves at once."""

from __future__ import annotations

import asyncio
import bisect
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from atspeed.engine.errors import OverloadedError

_logger = logging.getLogger(__name__)
Work = TypeVar("Work")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class BatchLimits:
    """What may share a pass, and how many passes may wait.

    tokens: new ones of a whole batch, padding included; a single pass may have more. delay_seconds: how long a pass that
    could start waits for company. padding: rows are padded to the longest; the batch may have so many times the tokens, new
    ones and cached ones, that its passes have one by one. gathered_tokens: new and cached ones of a whole batch, padding
    included, whose keys and values are copied side by side.
    """

    requests: int = 16
    tokens: int = 32
    delay_seconds: float = 0.0
    waiting: int = 256
    padding: float = 1.5
    gathered_tokens: int = 1_000_000

    def allow(self, rows: int, longest: int, deepest: int) -> bool:
        """Whether so many passes may share one, padded to `longest` new tokens and `deepest` cached ones each."""
        within = rows * longest <= self.tokens and rows * (longest + deepest) <= self.gathered_tokens
        return rows <= self.requests and within


@dataclass(frozen=True)
class PassSize:
    """What a pass costs: the tokens it computes, and those before them whose keys and values it reads."""

    new_tokens: int
    cached_tokens: int


def next_batch(waiting: Sequence[PassSize], limits: BatchLimits) -> list[int]:
    """Which of the passes that wait, [n] in the order of the queue, run next: ascending indices.

    The first always does, and others join it in order, as far as the limits allow and padding is worth it. So the pass behind
    n others runs at the latest in the (n+1)-th batch from then on, whatever queues up behind it.
    """
    chosen: list[int] = []
    new = cached = longest = deepest = 0
    for index, size in enumerate(waiting):
        rows = len(chosen) + 1
        padded_new, padded_cached = rows * max(longest, size.new_tokens), rows * max(deepest, size.cached_tokens)
        fits = limits.allow(rows, max(longest, size.new_tokens), max(deepest, size.cached_tokens))
        close = padded_new <= limits.padding * (new + size.new_tokens)
        close &= padded_cached <= limits.padding * (cached + size.cached_tokens)
        if not chosen or (fits and close):
            chosen.append(index)
            new, cached = new + size.new_tokens, cached + size.cached_tokens
            longest, deepest = max(longest, size.new_tokens), max(deepest, size.cached_tokens)
        if len(chosen) == limits.requests:
            break
    return chosen


@dataclass(frozen=True)
class Reschedule:
    """In place of an outcome: the work is not done yet, and has to have another pass, of this size."""

    size: PassSize


@dataclass(eq=False)
class Ticket(Generic[Work, Outcome]):
    """A place in the queue. size: of its next pass. since: when its request began, by `time.monotonic`. delay_seconds: how long
    each of its passes waits for company; until: when the next one stops. done: resolves when it has left the queue, or its work
    is done. given_up: there is to be no next pass.
    """

    work: Work
    size: PassSize
    since: float
    delay_seconds: float
    done: asyncio.Future[Outcome | Exception]
    until: float = 0.0
    given_up: bool = False


class Batcher(Generic[Work, Outcome]):
    """Runs batches of work one at a time, in a thread of its own.

    run: computes one batch, in the thread: an outcome or an exception for each piece of work, in order, each delivered as soon as
    it is there. If it raises, those who have no outcome yet are run one by one, so that nobody fails for the company: it must
    have done nothing to their work that a second run would not bear. What it raises for a single one is its outcome.
    The queue is in the order in which requests began, whatever pass they are at: what is begun is finished before more is. Taking
    turns would have all of them done late, where as many are done in the same time. Work that is to go on, `Reschedule`, keeps its
    place: its next pass begins at once, unless an older request waits. However full the queue is, it is not refused then.
    Batches are formed when the thread is free, so a piece of work that finds it free never waits, unless limits.delay_seconds
    says so. All methods are for the event loop.
    """

    def __init__(
        self, run: Callable[[Sequence[Work]], Iterable[Outcome | Reschedule | Exception]], limits: BatchLimits
    ) -> None:
        self.limits = limits
        self._run = run
        self._waiting: list[Ticket[Work, Outcome]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="onnx", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many wait for the thread."""
        return len(self._waiting)

    def put(
        self, work: Work, size: PassSize, *, since: float | None = None, patient: bool = True
    ) -> Ticket[Work, Outcome]:
        """Queue up, for a request that began then, or now; who is not patient waits for no company.

        Raises OverloadedError when the queue is full.
        """
        began = time.monotonic() if since is None else since
        delay_seconds = self.limits.delay_seconds if patient else 0.0
        ticket = Ticket[Work, Outcome](work, size, began, delay_seconds, asyncio.get_running_loop().create_future())
        with self._changed:
            if len(self._waiting) >= self.limits.waiting:
                raise OverloadedError(f"max_queued_passes: {len(self._waiting)} passes wait already")
            self._queue(ticket)
            self._changed.notify()
        return ticket

    async def outcome(self, ticket: Ticket[Work, Outcome]) -> Outcome:
        """Wait for it. Whoever is cancelled here leaves the queue; a batch that runs already goes on without a listener, and is
        its last.
        """
        try:
            await asyncio.wait((ticket.done,))
        except asyncio.CancelledError:
            self._leave(ticket)
            raise
        outcome = ticket.done.result()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self) -> None:
        """Run what waits, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _leave(self, ticket: Ticket[Work, Outcome]) -> None:
        with self._changed:
            ticket.given_up = True
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        ticket.done.cancel()

    def _queue(self, ticket: Ticket[Work, Outcome]) -> None:
        ticket.until = time.monotonic() + ticket.delay_seconds
        bisect.insort(self._waiting, ticket, key=lambda waiting: waiting.since)

    def _queue_again(self, ticket: Ticket[Work, Outcome], size: PassSize) -> None:
        with self._changed:
            ticket.size = size
            if not ticket.given_up:
                self._queue(ticket)
                return
        ticket.done.get_loop().call_soon_threadsafe(ticket.done.cancel)

    def _work(self) -> None:
        while batch := self._take():
            self._answer(batch)

    def _answer(self, batch: Sequence[Ticket[Work, Outcome]]) -> None:
        answered = 0
        try:
            for ticket, outcome in zip(batch, self._run([ticket.work for ticket in batch]), strict=True):
                if isinstance(outcome, Reschedule):
                    self._queue_again(ticket, outcome.size)
                else:
                    _deliver(ticket, outcome)
                answered += 1
        except Exception as error:
            if len(batch) == 1:
                _deliver(batch[0], error)
                return
            _logger.warning("a pass for %d requests failed, they go on one by one", len(batch), exc_info=error)
            for ticket in batch[answered:]:
                self._answer([ticket])

    def _take(self) -> list[Ticket[Work, Outcome]]:
        """The next batch, as soon as there is one; none when the batcher is closed and nothing waits."""
        with self._changed:
            while self._waiting or not self._closed:
                patience = self._patience() if self._waiting else None
                if patience == 0:
                    return self._remove(next_batch([ticket.size for ticket in self._waiting], self.limits))
                self._changed.wait(patience)
        return []

    def _patience(self) -> float:
        """How long the first in the queue may still wait for company, in seconds."""
        left = self._waiting[0].until - time.monotonic()
        if left <= 0 or self._closed:
            return 0.0
        sizes = [ticket.size for ticket in self._waiting]
        batch = [sizes[index] for index in next_batch(sizes, self.limits)]
        longest, deepest = max(size.new_tokens for size in batch), max(size.cached_tokens for size in batch)
        return left if self.limits.allow(len(batch) + 1, longest, deepest) else 0.0

    def _remove(self, indices: Sequence[int]) -> list[Ticket[Work, Outcome]]:
        taken = [self._waiting[index] for index in indices]
        for index in reversed(indices):
            del self._waiting[index]
        return taken


def _deliver(ticket: Ticket[Work, Outcome], outcome: Outcome | Exception) -> None:
    ticket.done.get_loop().call_soon_threadsafe(ticket.done.set_result, outcome)
