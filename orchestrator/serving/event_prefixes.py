"""Prefixes after events: the target reads a user's new prompt in idle time.

Its keys and values are then in the prefix cache, where the next list finds them. Lists do not depend on the cache. Nothing runs
while the replica serves requests: a prefix waits until it is idle, and a request cancels the one that runs. Events say nothing
about the fields of users, so a bundle whose prompts hold such fields gets no prefixes.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict

import structlog

from atspeed.concurrency.deadline import Deadline
from atspeed.concurrency.tasks import TaskSet
from atspeed.errors import ServiceError
from atspeed.rpc.admission import Admission
from orchestrator.serving.track_router import TrackRouter
from orchestrator.user_key import user_cache_key

_MOST_WAITING, _MOST_MADE = 1_000, 100_000  # users
_IDLE_POLL_SECONDS = 0.01
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class EventPrefixes:
    """Prefixes of users whose events were stored. Not thread-safe.

    Args:
        seconds: the deadline of a prefix.
        enabled: False to do nothing.

    Attributes:
        outcomes: number of prefixes by outcome: made, and then hit or wasted; cancelled, failed, or dropped.
    """

    OUTCOMES = ("made", "hit", "wasted", "cancelled", "failed", "dropped")

    def __init__(self, router: TrackRouter, admission: Admission, *, seconds: float, enabled: bool) -> None:
        self._router = router
        self._admission = admission
        self._seconds = seconds
        self._enabled = enabled
        self._waiting: OrderedDict[bytes, tuple[str, str]] = OrderedDict()  # users by their key, latest event last
        self._made: OrderedDict[bytes, None] = OrderedDict()
        self._running: tuple[bytes, asyncio.Task[None]] | None = None
        self._tasks = TaskSet()
        self._worker: asyncio.Task[None] | None = None
        self.outcomes: Counter[str] = Counter(dict.fromkeys(self.OUTCOMES, 0))

    def offer(self, user_id: str, tenant: str) -> None:
        """Note that events of a user were stored. A prefix that no list has used is wasted."""
        if not self._enabled:
            return
        key = user_cache_key(tenant, user_id)
        if not self._router.of(key).snapshots.current.recommender.reads_ahead:
            return
        self._outdate(key)
        self._waiting[key] = (user_id, tenant)
        self._waiting.move_to_end(key)
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.popitem(last=False)
            self.outcomes["dropped"] += 1
        if self._worker is None or self._worker.done():
            self._worker = self._tasks.start(self._work(), "event-prefixes")

    def request(self, user_key: bytes | None) -> None:
        """Note that a list is made now, which comes first. user_key: the stored user; None for a history in the request."""
        if user_key is not None:
            self._waiting.pop(user_key, None)
            if user_key in self._made:
                del self._made[user_key]
                self.outcomes["hit"] += 1
        if self._running is not None:
            self._running[1].cancel()

    async def forget(self, user_id: str, tenant: str) -> None:
        """Drop what is known of a user, and end the user's running prefix."""
        key = user_cache_key(tenant, user_id)
        self._waiting.pop(key, None)
        self._outdate(key)
        if self._running is not None and self._running[0] == key:
            task = self._running[1]
            task.cancel()
            await asyncio.wait([task])
            self._waiting.pop(key, None)

    async def close(self) -> None:
        """Cancel what runs."""
        self._waiting.clear()
        await self._tasks.cancel()

    def _outdate(self, key: bytes) -> None:
        if key in self._made:
            del self._made[key]
            self.outcomes["wasted"] += 1

    async def _work(self) -> None:
        while self._waiting:
            if self._admission.running or self._admission.queued:
                await asyncio.sleep(_IDLE_POLL_SECONDS)
                continue
            key, user = self._waiting.popitem(last=False)
            task = self._tasks.start(self._make(*user), "event-prefix")
            self._running = key, task
            try:
                await asyncio.wait([task])
            finally:
                self._running = None
            self._note(key, user, task)
            if task.cancelled():  # the request that did it takes its slot first
                await asyncio.sleep(_IDLE_POLL_SECONDS)

    def _note(self, key: bytes, user: tuple[str, str], task: asyncio.Task[None]) -> None:
        """Count a prefix that has ended. A cancelled one waits again, unless the user has a newer place in the queue."""
        if task.cancelled():
            self.outcomes["cancelled"] += 1
            self._waiting.setdefault(key, user)
            return
        if (error := task.exception()) is not None:
            self.outcomes["failed"] += 1
            if not isinstance(error, ServiceError):
                _log.error("event_prefix_failed", exc_info=error)
            return
        self.outcomes["made"] += 1
        if key in self._waiting:  # an event came meanwhile
            self.outcomes["wasted"] += 1
            return
        self._made[key] = None
        if len(self._made) > _MOST_MADE:
            self._made.popitem(last=False)
            self.outcomes["wasted"] += 1

    async def _make(self, user_id: str, tenant: str) -> None:
        state = self._router.of(user_cache_key(tenant, user_id))
        with state.snapshots.current.in_use() as snapshot:
            await snapshot.recommender.read_prompt(user_id, tenant, Deadline(self._seconds))
