"""Admission: how much inference runs at once, who waits for it, and who is told to come back later.

Under overload a server must do as much as at its best and say no to the rest at once. So work is bounded, the queue before
it is short, and whoever cannot be served in time is refused on arrival instead of after a long wait.
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

from atspeed.errors import DeadlineExceededError, ResourceExhaustedError

PRIORITY_HEADER = "x-atspeed-priority"
_SHORTEST_HINT, _LONGEST_HINT = 0.05, 10.0
_NEWEST = 0.1  # weight of the newest duration in the running mean


class Priority(IntEnum):
    """Who is served first, and refused last."""

    BATCH = 0
    INTERACTIVE = 1

    @classmethod
    def of(cls, context: grpc.aio.ServicerContext[Any, Any], default: Priority | None = None) -> Priority:
        """What a call's metadata ask for; the default, INTERACTIVE, where they name no priority."""
        named = {str(value).upper() for key, value in context.invocation_metadata() or () if key == PRIORITY_HEADER}
        return next(
            (priority for priority in cls if priority.name in named), cls.INTERACTIVE if default is None else default
        )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata that carry it on to the next service."""
        return ((PRIORITY_HEADER, self.name.lower()),)


@dataclass(frozen=True)
class Admitted:
    """A place among what runs. waited: whether there was none on arrival."""

    waited: bool


class Admission:
    """Places for one kind of work, and a short queue before them: interactive before batch, then first come, first served.

    Refused at once, with RESOURCE_EXHAUSTED and a hint when to come back: what finds places and queue taken (but a waiting
    batch request makes room for an interactive one), and what would not be done by its deadline, as far as the durations
    of late can tell. For one event loop.
    """

    def __init__(self, places: int, queue: int) -> None:
        self.places = places
        self.queue = queue
        self.running = 0
        self._waiting: dict[Priority, deque[asyncio.Future[None]]] = {priority: deque() for priority in Priority}
        self._seconds = 0.0

    @property
    def queued(self) -> int:
        """How many wait."""
        return sum(len(waiting) for waiting in self._waiting.values())

    @asynccontextmanager
    async def place(self, priority: Priority, seconds_left: float | None = None) -> AsyncIterator[Admitted]:
        """A place for as long as the block lasts. Raises ResourceExhaustedError. seconds_left: until the deadline."""
        waited = await self._enter(priority, seconds_left)
        begun = time.monotonic()
        try:
            yield Admitted(waited)
        except (asyncio.CancelledError, GeneratorExit, DeadlineExceededError):
            self._learn(max(time.monotonic() - begun, self._seconds))  # it would have taken at least that
            raise
        else:  # how long another failure took says nothing of how long work takes
            self._learn(time.monotonic() - begun)
        finally:
            self._leave()

    def _learn(self, took: float) -> None:
        self._seconds = took if not self._seconds else self._seconds + _NEWEST * (took - self._seconds)

    async def _enter(self, priority: Priority, seconds_left: float | None) -> bool:
        """Take a place, after waiting for one if need be; whether there was need."""
        if self.running < self.places:
            self.running += 1
            return False
        if seconds_left is not None and self._wait_seconds(priority) + self._seconds > seconds_left:
            raise self._refusal("cannot serve this request before its deadline")
        if self.queued >= self.queue and not self._displaced(priority):
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
            if not turn.cancelled() and not turn.exception():  # its turn came together with the cancellation
                self._leave()
            raise
        finally:
            if turn in self._waiting[priority]:
                self._waiting[priority].remove(turn)

    def _leave(self) -> None:
        """Hand the place to the next in the queue, or free it."""
        for priority in sorted(Priority, reverse=True):
            while self._waiting[priority]:
                turn = self._waiting[priority].popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self.running -= 1

    def _displaced(self, priority: Priority) -> bool:
        """Refuse the newest waiting request of a lower priority, if there is one."""
        for lower in sorted(Priority):
            if lower < priority and self._waiting[lower]:
                turn = self._waiting[lower].pop()
                if not turn.done():
                    turn.set_exception(self._refusal("serves requests of a higher priority"))
                return True
        return False

    def _wait_seconds(self, priority: Priority) -> float:
        """How long a request that came now would wait for its turn."""
        ahead = sum(len(waiting) for other, waiting in self._waiting.items() if other >= priority)
        return (ahead + 1) * self._seconds / self.places

    def _refusal(self, problem: str) -> ResourceExhaustedError:
        hint = min(max(self._wait_seconds(Priority.BATCH), _SHORTEST_HINT), _LONGEST_HINT)
        # Clients that were refused together must not come back together.
        spread = random.uniform(1.0, 1.5)  # noqa: S311 - no secret
        return ResourceExhaustedError(
            f"this replica {problem}; try another or later", retry_after_seconds=hint * spread
        )
