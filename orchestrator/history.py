"""Store of users' histories in Redis: one list of item ids per user, oldest first.

    Exception
    +-- HistoryUnavailable   Redis is down, late or out of memory, or the key holds another type

Histories have no time to live. So under `volatile-lru` a full Redis evicts cached KV and never a history.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar, cast
from urllib.parse import quote

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from atspeed.engine.kv.erasure import publish_erasure
from atspeed.engine.kv.redis_pool import check_writable
from orchestrator.user_key import user_cache_key

_Answer = TypeVar("_Answer")
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Key of the largest limit of all deployments over this Redis. None of them cuts items that another one keeps.
LIMIT_KEY = "history-limit"
_RAISE_LIMIT = """\
local own, known = tonumber(ARGV[1]), tonumber(redis.call('GET', KEYS[1]) or '') or 0
if own > known then redis.call('SET', KEYS[1], own) end
return math.max(own, known)
"""
# One atomic step. RPUSH comes first: Redis refuses it when memory is full or the key holds another type, and then nothing has
# changed. It takes 1000 items at a time, since Lua's unpack() allows a few thousand arguments only.
_APPEND = """\
local own, step = tonumber(ARGV[1]), tonumber(ARGV[2])
local known = tonumber(redis.call('GET', KEYS[2]) or '') or 0
local most = math.max(own, known)
local before, added = redis.call('LLEN', KEYS[1]), #ARGV - 2
local dropped = math.max(0, math.floor((before + added - most) / step) * step)
local kept = before + added - dropped
for first = 3 + math.max(0, dropped - before), #ARGV, 1000 do
  redis.call('RPUSH', KEYS[1], unpack(ARGV, first, math.min(first + 999, #ARGV)))
end
if dropped > 0 then redis.call('LTRIM', KEYS[1], -kept, -1) end
if own > known then redis.call('SET', KEYS[2], own) end
return {kept, most}
"""


class HistoryUnavailable(Exception):  # noqa: N818  a state of the store, like gRPC's UNAVAILABLE
    """The history store did not answer. The text has the reason and never names a user."""


class HistoryStore:
    """Store under `history:<tenant, percent-encoded>:<user id>`, with the newest `max_items` items of each user.

    A history that would grow beyond `max_items` loses its oldest `trim_step` items at a time, so it starts at a multiple of
    `trim_step` events. If `trim_step` is the prompt's `drop_block`, the prompt's window moves once in `drop_block` events,
    however long the history. With a step of 1 it would move at every event, and no prefix of the prompt would stay cached.

    Deployments with different `max_items` may share a Redis. `LIMIT_KEY` holds the largest one. A list keeps that number of
    items, and each deployment shows its own newest. After that key is deleted, the limit is the largest one in use.

    The caller closes `client`. It must not retry (`atspeed.engine.kv.redis_client.connect`), since an append that is sent twice
    adds its items twice. Callers check user and item ids. Users of different tenants are different users.
    """

    def __init__(self, client: Redis, max_items: int, *, trim_step: int = 1, timeout_seconds: float = 1.0) -> None:
        if max_items < 1:
            raise ValueError(f"max_items: {max_items} is less than 1")
        if not 1 <= trim_step <= max_items:
            raise ValueError(f"trim_step: {trim_step} is not between 1 and max_items, {max_items}")
        self._client = client
        self._timeout_seconds = timeout_seconds
        self._max_items = max_items
        self._trim_step = trim_step
        self._warned = False

    async def publish_limit(self) -> None:
        """Publish this deployment's limit to the others, before it stores anything. Raises HistoryUnavailable."""
        limit = await self._call(
            lambda: cast("Awaitable[int]", self._client.eval(_RAISE_LIMIT, 1, LIMIT_KEY, str(self._max_items)))
        )
        self._warn_if_below(int(limit))

    async def append(self, user_id: str, item_ids: Sequence[str], *, tenant: str = "") -> int:
        """Add items, oldest first, drop the oldest beyond `max_items` in the same step, and return the new length.

        Raises HistoryUnavailable. All of the items may then be stored, or none.
        """
        key = _key(tenant, user_id)
        if not item_ids:
            stored = int(await self._call(lambda: self._client.llen(key)))
            return stored - self._hidden(stored)
        arguments = (key, LIMIT_KEY, str(self._max_items), str(self._trim_step), *item_ids)
        stored, limit = await self._call(
            lambda: cast("Awaitable[list[int]]", self._client.eval(_APPEND, 2, *arguments))
        )
        self._warn_if_below(limit)
        return stored - self._hidden(stored)

    async def get(self, user_id: str, *, tenant: str = "") -> list[str] | None:
        """Return a user's items, oldest first; None when nothing is stored. Raises HistoryUnavailable."""
        items = await self._call(lambda: self._client.lrange(_key(tenant, user_id), 0, -1))
        return [_text(item) for item in items[self._hidden(len(items)) :]] or None

    async def forget(self, user_id: str, *, tenant: str = "") -> bool:
        """Erase a user's history and the keys and values of the user's prompts in every tier (`atspeed.engine.kv.erasure`).

        Returns whether there was a history. Raises HistoryUnavailable; the caller should then repeat the call.
        """
        existed = await self._call(lambda: self._client.delete(_key(tenant, user_id)))
        await self._call(lambda: publish_erasure(self._client, user_cache_key(tenant, user_id)))
        return bool(existed)

    async def reachable(self) -> bool:
        """Return whether the store answers now and takes writes."""
        try:
            await self._call(lambda: check_writable(self._client))
        except HistoryUnavailable:
            return False
        return True

    def _hidden(self, stored: int) -> int:
        """Return how many of a list's oldest items are not shown: whole steps, as if the list had been cut there."""
        return max(0, math.ceil((stored - self._max_items) / self._trim_step) * self._trim_step)

    def _warn_if_below(self, limit: int) -> None:
        if limit > self._max_items and not self._warned:
            self._warned = True
            _log.warning(
                "history_limit_below_stored",
                max_history_items=self._max_items,
                stored_limit=limit,
                see=f"histories keep stored_limit items; delete the Redis key {LIMIT_KEY} once no deployment needs them",
            )

    async def _call(self, call: Callable[[], Awaitable[_Answer]]) -> _Answer:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await call()
        except (RedisError, OSError) as error:
            raise HistoryUnavailable(f"history store: {type(error).__name__}") from error


def _key(tenant: str, user_id: str) -> str:
    """Return the key of a user. Keys are unique: an encoded tenant has no colon, so the second colon ends the tenant."""
    return f"history:{quote(tenant, safe='')}:{user_id}"


def _text(item: bytes | str) -> str:
    return item if isinstance(item, str) else item.decode("utf-8", "replace")
