"""Discrete events: a clock, and servers with a queue, for simulated requests."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Coroutine, Generator
from itertools import count
from typing import Any


class Event:
    """Event that one coroutine waits for. Its value is that of the `await`."""

    def __init__(self) -> None:
        self.resume: Callable[[int], None] | None = None

    def __await__(self) -> Generator[Event, int, int]:
        """Wait for the event."""
        return (yield self)

    def fire(self, value: int = 0) -> None:
        """Let the coroutine continue, if one waits."""
        if self.resume is not None:
            self.resume(value)


class Clock:
    """Clock of a simulation.

    Attributes:
        now_ns: its time.
    """

    def __init__(self) -> None:
        self.now_ns = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._number = count()

    def __call__(self) -> int:
        """Return the time in nanoseconds, like `time.perf_counter_ns`."""
        return self.now_ns

    def at(self, ns: int, action: Callable[[], None]) -> None:
        """Plan an action. Actions of one time happen in the order of their planning."""
        heapq.heappush(self._events, (ns, next(self._number), action))

    def start(self, ns: int, coroutine: Coroutine[Event, int, None]) -> None:
        """Start a coroutine at a time."""
        self.at(ns, lambda: _advance(coroutine, None))

    async def sleep(self, ns: int) -> None:
        """Let the time pass."""
        event = Event()
        self.at(self.now_ns + ns, event.fire)
        await event

    def run(self) -> None:
        """Run until nothing is planned."""
        while self._events:
            self.now_ns, _, action = heapq.heappop(self._events)
            action()


class Server:
    """Model process: one pass at a time. Passes of the oldest request come first, as in the product."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: list[tuple[int, int, int, int, Event]] = []
        self._number = count()
        self._busy = False

    async def run(self, duration_ns: int, rank: int) -> int:
        """Make a pass, and return how long it waited. rank: of the request; smaller ones come first."""
        event = Event()
        heapq.heappush(self._waiting, (rank, next(self._number), self._clock.now_ns, duration_ns, event))
        self._start_next()
        return await event

    def _start_next(self) -> None:
        if self._busy or not self._waiting:
            return
        self._busy = True
        _, _, queued_ns, duration_ns, event = heapq.heappop(self._waiting)
        waited_ns = self._clock.now_ns - queued_ns
        self._clock.at(self._clock.now_ns + duration_ns, lambda: self._end(event, waited_ns))

    def _end(self, event: Event, waited_ns: int) -> None:
        self._busy = False
        event.fire(waited_ns)  # the request may ask for its next pass at once, which then comes first
        self._start_next()


def _advance(coroutine: Coroutine[Event, int, Any], value: int | None) -> None:
    """Run a coroutine until it waits for its next event."""
    try:
        event = coroutine.send(value)  # type: ignore[arg-type]  # None starts it
    except StopIteration:
        return
    event.resume = lambda value: _advance(coroutine, value)
