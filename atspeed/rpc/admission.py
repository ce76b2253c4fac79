"""Admission control (load shedding): limits the calls that run and wait.

An overloaded server must keep its best throughput and refuse the rest at once. So the work is bounded, its queue is short, and a
call that cannot be served in time is refused on arrival instead of after a long wait.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import grpc

from atspeed.engine.ewma import Ewma
from atspeed.errors import DeadlineExceededError, ResourceExhaustedError

PRIORITY_HEADER = "x-atspeed-priority"
# Bounds of the retry hint in seconds. A shorter hint makes clients spin, and a longer one wastes a replica that recovers.
_MIN_HINT_SECONDS = 0.05
_MAX_HINT_SECONDS = 10.0
# Calls whose durations the EWMA remembers: few, so that it follows a change of load within a queue's length.
_MEMORY = 10


class Priority(IntEnum):
    """Priority of a call. A higher value is served first and refused last."""

    BATCH = 0
    INTERACTIVE = 1

    @classmethod
    def of(cls, context: grpc.aio.ServicerContext[Any, Any], default: Priority | None = None) -> Priority:
        """Return the priority in a call's metadata, else the default, else INTERACTIVE."""
        named = {str(value).upper() for key, value in context.invocation_metadata() or () if key == PRIORITY_HEADER}
        return next(
            (priority for priority in cls if priority.name in named), cls.INTERACTIVE if default is None else default
        )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata that carry the priority to the next service."""
        return ((PRIORITY_HEADER, self.name.lower()),)


@dataclass(frozen=True)
class Admitted:
    """An admitted call.

    Attributes:
        waited: True if no slot was free on arrival.
    """

    waited: bool


class Admission:
    """Slots for one kind of work, with a short queue. For one event loop.

    The queue serves interactive calls before batch calls, and else first come, first served. A call is refused at once, with
    RESOURCE_EXHAUSTED and a retry hint, in two cases:

    - All slots and the queue are full. A waiting batch call is displaced by an interactive one.
    - Recent durations predict that the call would miss its deadline.

    Attributes:
        slots: number of calls that may run at once.
        queue_limit: number of calls that may wait.
        running: number of calls that run.
        seconds: EWMA of durations; 0 before the first one.
    """

    def __init__(self, slots: int, queue_limit: int) -> None:
        self.slots = slots
        self.queue_limit = queue_limit
        self.running = 0
        self._waiting: dict[Priority, deque[asyncio.Future[None]]] = {priority: deque() for priority in Priority}
        self.seconds = Ewma(0.0, _MEMORY)

    @property
    def queued(self) -> int:
        """Return the number of calls that wait."""
        return sum(len(waiting) for waiting in self._waiting.values())

    @asynccontextmanager
    async def slot(self, priority: Priority, seconds_left: float | None = None) -> AsyncIterator[Admitted]:
        """Hold a slot for the length of the block. Raises ResourceExhaustedError. seconds_left: until the deadline."""
        waited = await self._enter(priority, seconds_left)
        begun = time.monotonic()
        try:
            yield Admitted(waited)
        except (asyncio.CancelledError, GeneratorExit, DeadlineExceededError):
            self.seconds.add(max(time.monotonic() - begun, self.seconds.value))  # a cut call lasts at least that long
            raise
        else:  # the duration of another failure says nothing about the duration of work
            self.seconds.add(time.monotonic() - begun)
        finally:
            self._leave()

    async def _enter(self, priority: Priority, seconds_left: float | None) -> bool:
        """Take a slot, and wait for one if none is free. Returns True if the call waited."""
        if self.running < self.slots:
            self.running += 1
            return False
        if seconds_left is not None and self._wait_seconds(priority) + self.seconds.value > seconds_left:
            raise self._refusal("cannot serve this request before its deadline")
        if self.queued >= self.queue_limit and not self._displaced(priority):
            raise self._refusal("serves as many requests as it may")
        try:
            async with asyncio.timeout(seconds_left):
                await self._turn(priority)
        except TimeoutError:
            raise self._refusal("could not serve this request before its deadline") from None
        return True

    async def _turn(self, priority: Priority) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting[priority].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and not turn.exception():  # the slot came together with the cancellation
                self._leave()
            raise
        finally:
            if turn in self._waiting[priority]:
                self._waiting[priority].remove(turn)

    def _leave(self) -> None:
        """Pass the slot to the next call in the queue, or free it."""
        for priority in sorted(Priority, reverse=True):
            while self._waiting[priority]:
                turn = self._waiting[priority].popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self.running -= 1

    def _displaced(self, priority: Priority) -> bool:
        """Refuse the newest waiting call of a lower priority. Returns False if there is none."""
        for lower in sorted(Priority):
            if lower < priority and self._waiting[lower]:
                turn = self._waiting[lower].pop()
                if not turn.done():
                    turn.set_exception(self._refusal("serves requests of a higher priority"))
                return True
        return False

    def _wait_seconds(self, priority: Priority) -> float:
        """Return the predicted wait of a call that arrives now."""
        ahead = sum(len(waiting) for other, waiting in self._waiting.items() if other >= priority)
        return (ahead + 1) * self.seconds.value / self.slots

    def _refusal(self, problem: str) -> ResourceExhaustedError:
        hint = min(max(self._wait_seconds(Priority.BATCH), _MIN_HINT_SECONDS), _MAX_HINT_SECONDS)
        # Jitter: clients that were refused together must not come back together.
        spread = random.uniform(1.0, 1.5)  # noqa: S311 - no secret
        return ResourceExhaustedError(
            f"this replica {problem}; try another or later", retry_after_seconds=hint * spread
        )
