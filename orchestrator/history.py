"""Users' histories in Redis: item ids in time order, one list per user, never expiring.

    Exception
    +-- HistoryUnavailable   Redis did not do it: down, late, out of memory, or holding something else

No time to live, so that under `volatile-lru` a full Redis evicts cached KV and never a history.
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
from atspeed.engine.kv.redis_pool import change_nothing
from orchestrator.user_key import user_cache_key

_Answer = TypeVar("_Answer")
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The largest limit of all deployments that ever stored a history here: none of them cuts what another one keeps.
LIMIT_KEY = "history-limit"
_RAISE_LIMIT = """\
local own, known = tonumber(ARGV[1]), tonumber(redis.call('GET', KEYS[1]) or '') or 0
if own > known then redis.call('SET', KEYS[1], own) end
return math.max(own, known)
"""
# One step for the server. RPUSH comes first: it is refused when memory is full or the key holds something else, and then
# nothing has happened. By the thousand, since a Lua call takes some thousands of arguments only.
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


class HistoryUnavailable(Exception):  # noqa: N818  it is a state of the store, as in gRPC's UNAVAILABLE
    """The history store did not answer. The text says why, and never whose history it was."""


class HistoryStore:
    """Histories under `history:<tenant, percent-encoded>:<user id>`, the newest of each, `max_items` at most.

    A history that would grow beyond `max_items` loses its oldest `trim_step` items at a time, so it starts at a multiple of
    `trim_step` events. With a prompt's `drop_block` for a step, its window starts at multiples of that too, and moves once
    in `drop_block` events however long the history; with a step of 1 it would move at every event.

    Deployments with several `max_items` may share a Redis. A list holds what the one with the most shows, which `LIMIT_KEY`
    remembers, and each shows its own newest. Deleting that key lets the limit fall to those that are in use.

    `client` stays its caller's to close. It should be one that does not retry (`atspeed.engine.kv.redis_client.connect`): an append
    that is sent twice is a history with an item too many. User and item ids are taken as they are; check them before.
    Users of different tenants are different users.
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

    async def state_limit(self) -> None:
        """Let other deployments know how much this one keeps, before it stores anything. Raises HistoryUnavailable."""
        most = await self._ask(
            lambda: cast("Awaitable[int]", self._client.eval(_RAISE_LIMIT, 1, LIMIT_KEY, str(self._max_items)))
        )
        self._compare(int(most))

    async def append(self, user_id: str, item_ids: Sequence[str], *, tenant: str = "") -> int:
        """Add items, oldest first, and drop the oldest beyond `max_items`, in one step. Returns the new length.

        Raises HistoryUnavailable; the items may then be stored all the same, all of them or none.
        """
        key = _key(tenant, user_id)
        if not item_ids:
            stored = int(await self._ask(lambda: self._client.llen(key)))
            return stored - self._beyond(stored)
        given = (key, LIMIT_KEY, str(self._max_items), str(self._trim_step), *item_ids)
        stored, most = await self._ask(lambda: cast("Awaitable[list[int]]", self._client.eval(_APPEND, 2, *given)))
        self._compare(most)
        return stored - self._beyond(stored)

    async def get(self, user_id: str, *, tenant: str = "") -> list[str] | None:
        """A user's items, oldest first; None when nothing is stored. Raises HistoryUnavailable."""
        items = await self._ask(lambda: self._client.lrange(_key(tenant, user_id), 0, -1))
        return [_text(item) for item in items[self._beyond(len(items)) :]] or None

    async def forget(self, user_id: str, *, tenant: str = "") -> bool:
        """Erase a user's history, and the keys and values of the user's prompts in every tier (`atspeed.engine.kv.erasure`).

        Returns whether there was a history. Raises HistoryUnavailable; it should then be called again.
        """
        existed = await self._ask(lambda: self._client.delete(_key(tenant, user_id)))
        await self._ask(lambda: publish_erasure(self._client, user_cache_key(tenant, user_id)))
        return bool(existed)

    async def reachable(self) -> bool:
        """Whether the store answers now, and takes writes."""
        try:
            await self._ask(lambda: change_nothing(self._client))
        except HistoryUnavailable:
            return False
        return True

    def _beyond(self, stored: int) -> int:
        """How many of a list's oldest items are left out: in whole steps, so that what is shown starts as if cut there."""
        return max(0, math.ceil((stored - self._max_items) / self._trim_step) * self._trim_step)

    def _compare(self, most: int) -> None:
        if most > self._max_items and not self._warned:
            self._warned = True
            _log.warning(
                "history_limit_below_stored",
                max_history_items=self._max_items,
                stored_limit=most,
                see=f"histories keep stored_limit items; delete the Redis key {LIMIT_KEY} once no deployment needs them",
            )

    async def _ask(self, call: Callable[[], Awaitable[_Answer]]) -> _Answer:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await call()
        except (RedisError, OSError) as error:
            raise HistoryUnavailable(f"history store: {type(error).__name__}") from error


def _key(tenant: str, user_id: str) -> str:
    """No two pairs share a key: an encoded tenant holds no colon, so the second colon is the one before the user id."""
    return f"history:{quote(tenant, safe='')}:{user_id}"


def _text(item: bytes | str) -> str:
    return item if isinstance(item, str) else item.decode("utf-8", "replace")
