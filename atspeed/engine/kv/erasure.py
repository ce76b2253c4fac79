"""Erasure of a user's KV in every tier (right to erasure, GDPR Article 17).

Block keys of a stored user's prompts begin with the user key (`memory_cache.block_keys`); in Redis these blocks are one hash.
`publish_erasure` erases that hash and appends the user key to a Redis stream. Each model replica reads the stream, drops the
user's blocks from memory, waits for its pending writes of that user, and erases the hash once more. A replica that cannot read
the stream for `MAX_LAG_SECONDS` drops the blocks of all stored users, and keeps none until it can.

So a user's blocks are gone from Redis when `publish_erasure` returns. They are gone from every replica's memory a moment later,
or within `MAX_LAG_SECONDS` if it is cut off. Passes under way may bring blocks back: for `PrefixCache.hold_seconds` a replica
keeps none of the user. An erasure that fails is repeated until it succeeds. Every failure to read or to erase, a bug included,
counts as being cut off.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from atspeed.engine.kv.memory_cache import USER_KEY_BYTES
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.redis_pool import check_writable
from atspeed.engine.kv.redis_store import user_blocks_name

STREAM = "forgotten-users"
# Longer than a restart or failover of Redis, so that neither empties the caches. Chosen, not measured.
MAX_LAG_SECONDS = 300.0
# Longer than any lag before a replica drops everything: no replica needs an older entry.
_KEPT_SECONDS = 3600
_POLL_SECONDS = 0.25
# Users erased in one step. More would not be read within the timeout of a request's read.
_BATCH = 256

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


async def publish_erasure(client: Redis, user_key: bytes) -> None:
    """Erase a user's blocks in Redis and notify the replicas. Raises RedisError or OSError when Redis fails."""
    seconds, _ = await client.time()
    # Published first: if only the second step fails, the replicas erase the blocks.
    await client.xadd(STREAM, {"owner": user_key}, minid=f"{(seconds - _KEPT_SECONDS) * 1000}-0", approximate=False)
    await client.unlink(user_blocks_name(user_key))


class ErasureSubscriber:
    """Applies the erasures of the stream to one replica's cache, in a background task from `start` to `close`.

    It polls four times a second: that needs no connection of its own and is no load. The client stays the caller's to close.
    """

    def __init__(
        self,
        client: Redis,
        cache: PrefixCache,
        *,
        max_lag_seconds: float = MAX_LAG_SECONDS,
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        self._client = client
        self._cache = cache
        self._max_lag_seconds = max_lag_seconds
        self._poll_seconds = poll_seconds
        # The id of the last stream entry that was applied; None before the first read.
        self._position: str | None = None
        self._failing = False
        self._up_to_date_at = -float("inf")
        self._task: asyncio.Task[None] | None = None

    @property
    def lag_seconds(self) -> float:
        """Return the time since all published erasures were last known to be applied; infinite before the first time."""
        return time.monotonic() - self._up_to_date_at

    async def start(self) -> None:
        """Read the stream once, then follow it in the background. No block of a stored user is kept before the first read."""
        self._cache.accepts_user_blocks = False
        await self._attempt()
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="erasure-subscriber")

    async def close(self) -> None:
        """Stop the background task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        # The check of `cancelling`: a cancellation at the end of a Redis call may be swallowed by the client's own timeout.
        while (task := asyncio.current_task()) and not task.cancelling():
            await asyncio.sleep(self._poll_seconds)
            await self._attempt()

    async def _attempt(self) -> None:
        """Apply all new erasures. After too long without success, drop the blocks of all stored users."""
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._max_lag_seconds):
                # A Redis replica that lost its master still answers reads, but never receives another entry.
                await check_writable(self._client)
                while await self._apply_batch():
                    pass
        except Exception as error:  # noqa: BLE001 - the task must go on, and a bug is as bad as a Redis that is down
            self._fail(error)
            return
        self._failing = False
        self._up_to_date_at = begun
        self._cache.accepts_user_blocks = True

    def _fail(self, error: Exception) -> None:
        name = type(error).__name__
        if not self._failing:
            # Redis's own errors without their text, which quotes commands and keys.
            bug = None if isinstance(error, RedisError | OSError) else error
            _log.warning("erasure_stream_failed", error=name, exc_info=bug)
        self._failing = True
        if self._cache.accepts_user_blocks and self.lag_seconds > self._max_lag_seconds:
            _log.warning("user_kv_dropped", error=name, lag_seconds=round(self.lag_seconds, 1))
            self._cache.accepts_user_blocks = False

    async def _apply_batch(self) -> bool:
        """Read some new entries and erase their users; true when there may be more. A failed batch is read again.

        The first read begins `hold_seconds` ago, as passes of that time may still be under way.
        """
        if self._position is None:
            seconds, _ = await self._client.time()
            self._position = f"{int((seconds - self._cache.hold_seconds) * 1000)}-0"
        entries: Any = await self._client.xrange(STREAM, min=f"({self._position}", count=_BATCH)
        values = {fields.get(b"owner", b"") for _, fields in entries}
        user_keys = {value for value in values if len(value) == USER_KEY_BYTES}
        if user_keys:
            await self._cache.erase(user_keys)
        if entries:
            self._position = entries[-1][0].decode()
        return len(entries) == _BATCH
