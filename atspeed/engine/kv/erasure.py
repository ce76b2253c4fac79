"""The erasure of a user's keys and values in every tier: announced in Redis, heard by every model replica.

Blocks of a stored user's prompts begin with the user's tag (`kv_cache.block_keys`), in Redis they are one hash. `announce`
erases that hash and adds the tag to a stream; each replica follows the stream, drops what it has in memory, lets its pending
writes end and erases the hash once more. A replica that cannot read the stream for `DEAF_SECONDS` drops the blocks of all
stored users, and keeps none until it can.

So a tag's blocks are gone from Redis when `announce` returns, and from every replica's memory a moment later, or within
`DEAF_SECONDS` where it is cut off. Passes under way may bring them back: for `PrefixCache.hold_seconds` a replica keeps nothing
of the tag. An erasure that fails is tried again until it is done; whatever goes wrong with hearing or erasing, and be it a bug,
counts as being cut off.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from atspeed.engine.kv.memory_cache import OWNER_BYTES
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.redis_pool import change_nothing
from atspeed.engine.kv.redis_store import group_name

STREAM = "forgotten-users"
DEAF_SECONDS = 300.0
# Longer than any replica may be deaf before it drops everything; a tag is of no use to anyone after that.
_KEPT_SECONDS = 3600
_POLL_SECONDS = 0.25
# Tags erased in one step: little enough to be read within the timeout of a request's read.
_BATCH = 256

_logger = logging.getLogger(__name__)


async def publish_erasure(client: Redis, owner: bytes) -> None:
    """Erase the blocks of a user's tag in Redis and tell the replicas. Raises RedisError or OSError when Redis fails."""
    seconds, _ = await client.time()
    # Told first: when only the second step fails, the replicas erase it too.
    await client.xadd(STREAM, {"owner": owner}, minid=f"{(seconds - _KEPT_SECONDS) * 1000}-0", approximate=False)
    await client.unlink(group_name(owner))


class ErasureSubscriber:
    """Follows the stream for one replica's cache, in a task of its own from `start` to `close`. The client stays the caller's.

    It asks four times a second: that needs no connection of its own and is no load.
    """

    def __init__(
        self,
        client: Redis,
        cache: PrefixCache,
        *,
        max_lag_seconds: float = DEAF_SECONDS,
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        self._client = client
        self._cache = cache
        self._deaf_seconds = max_lag_seconds
        self._poll_seconds = poll_seconds
        self._position = ""
        self._failing = False
        self._heard_at = -float("inf")
        self._task: asyncio.Task[None] | None = None

    @property
    def lag_seconds(self) -> float:
        """How long ago all that had been announced was last known and erased; infinite before the first time."""
        return time.monotonic() - self._heard_at

    async def start(self) -> None:
        """Try the stream once, then follow it in the background. Until it has been read, nothing of stored users is kept."""
        self._cache.accepts_user_blocks = False
        await self._attempt()
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="forgetting")

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        # A cancellation that meets the end of a call to Redis raises nothing, as its client's own timeout can swallow it.
        while (task := asyncio.current_task()) and not task.cancelling():
            await asyncio.sleep(self._poll_seconds)
            await self._attempt()

    async def _attempt(self) -> None:
        """Hear and erase what is new. After too long without success, drop all that might have to be forgotten."""
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._deaf_seconds):
                # A replica that has lost its master answers reads as ever, and would never show what is announced since.
                await change_nothing(self._client)
                while await self._hear():
                    pass
        except Exception as error:  # noqa: BLE001 - it must go on, and a bug is as bad as a Redis that is away
            self._failed(error)
            return
        self._failing = False
        self._heard_at = begun
        self._cache.accepts_user_blocks = True

    def _failed(self, error: Exception) -> None:
        if not self._failing:
            # Redis's own errors without their text, which quotes commands and keys.
            bug = None if isinstance(error, RedisError | OSError) else error
            _logger.warning("cannot hear of forgotten users: %s", type(error).__name__, exc_info=bug)
        self._failing = True
        if self._cache.accepts_user_blocks and self.lag_seconds > self._deaf_seconds:
            _logger.warning("dropping KV of stored users, who may have been forgotten: %s", type(error).__name__)
            self._cache.accepts_user_blocks = False

    async def _hear(self) -> bool:
        """Read some of what is new and erase it; whether there may be more. What was not erased is read again the next time.

        The first time, what came in the last moments is new, as passes may be under way.
        """
        if not self._position:
            seconds, _ = await self._client.time()
            self._position = f"{int((seconds - self._cache.hold_seconds) * 1000)}-0"
        entries: Any = await self._client.xrange(STREAM, min=f"({self._position}", count=_BATCH)
        tags = {fields.get(b"owner", b"") for _, fields in entries}
        owners = {tag for tag in tags if len(tag) == OWNER_BYTES}
        if owners:
            await self._cache.forget(owners)
        if entries:
            self._position = entries[-1][0].decode()
        return len(entries) == _BATCH
