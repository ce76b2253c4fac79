"""The erasure of a user's keys and values in every tier: announced in Redis, heard by every model replica.

Blocks of a stored user's prompts begin with the user's tag (`kv_cache.block_keys`), in Redis they are one hash. `announce`
erases that hash and adds the tag to a stream; each replica follows the stream, drops what it has in memory, lets its pending
writes end and erases the hash once more. A replica that cannot read the stream for `DEAF_SECONDS` drops the blocks of all
stored users, and keeps none until it can.

So a tag's blocks are gone from Redis when `announce` returns, and from every replica's memory a moment later, or within
`DEAF_SECONDS` where it is cut off. Passes under way may bring them back: for `HOLD_SECONDS` a replica keeps nothing of the tag.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine.kv_cache import OWNER_BYTES
from engine.kv_store import PrefixCache, group_name

STREAM = "forgotten-users"
DEAF_SECONDS = 300.0
# Longer than any replica may be deaf before it drops everything; a tag is of no use to anyone after that.
_KEPT_SECONDS = 3600
_POLL_SECONDS = 0.25

_logger = logging.getLogger(__name__)


async def announce(client: Redis, owner: bytes) -> None:
    """Erase the blocks of a user's tag in Redis and tell the replicas. Raises RedisError or OSError when Redis fails."""
    seconds, _ = await client.time()
    # Told first: when only the second step fails, the replicas erase it too.
    await client.xadd(STREAM, {"owner": owner}, minid=f"{(seconds - _KEPT_SECONDS) * 1000}-0", approximate=False)
    await client.unlink(group_name(owner))


class ForgetListener:
    """Follows the stream for one replica's cache, in a task of its own from `start` to `close`. The client stays the caller's.

    It asks four times a second: that needs no connection of its own and is no load.
    """

    def __init__(
        self,
        client: Redis,
        cache: PrefixCache,
        *,
        deaf_seconds: float = DEAF_SECONDS,
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        self._client, self._cache = client, cache
        self._deaf_seconds, self._poll_seconds = deaf_seconds, poll_seconds
        self._position = ""
        self._heard_at = -float("inf")
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Try the stream once, then follow it in the background. Until it has been read, nothing of stored users is kept."""
        self._cache.keeps_owned = False
        await self._attempt()
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="forgetting")

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            await self._attempt()

    async def _attempt(self) -> None:
        """Read what is new. After too long without an answer, drop all that might have to be forgotten."""
        try:
            for owner in await self._read():
                await self._cache.forget(owner)
        except (RedisError, OSError) as error:
            if self._cache.keeps_owned and time.monotonic() - self._heard_at > self._deaf_seconds:
                _logger.warning("cannot hear of forgotten users, dropping KV of stored ones: %s", type(error).__name__)
                self._cache.keeps_owned = False
            return
        self._heard_at = time.monotonic()
        self._cache.keeps_owned = True

    async def _read(self) -> list[bytes]:
        """The tags that came since the last time; the first time, those of the last moments, as passes may be under way."""
        if not self._position:
            seconds, _ = await self._client.time()
            self._position = f"{int((seconds - self._cache.hold_seconds) * 1000)}-0"
        entries: Any = await self._client.xrange(STREAM, min=f"({self._position}")
        if entries:
            self._position = entries[-1][0].decode()
        return [fields[b"owner"] for _, fields in entries if len(fields.get(b"owner", b"")) == OWNER_BYTES]
