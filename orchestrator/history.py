"""Users' histories in Redis: item ids in time order, one list per user, never expiring.

    Exception
    +-- HistoryUnavailable   Redis did not do it: down, late, out of memory, or holding something else

No time to live, so that under `volatile-lru` a full Redis evicts cached KV and never a history.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

_Answer = TypeVar("_Answer")


class HistoryUnavailable(Exception):  # noqa: N818  it is a state of the store, as in gRPC's UNAVAILABLE
    """The history store did not answer. The text says why, and never whose history it was."""


class HistoryStore:
    """Histories under `history:<user id>`, the newest `max_items` of each.

    `client` stays its caller's to close. It should be one that does not retry (`engine.kv_store.connect`): an append
    that is sent twice is a history with an item too many. User and item ids are taken as they are; check them before.
    """

    def __init__(self, client: Redis, max_items: int, *, timeout_seconds: float = 1.0) -> None:
        if max_items < 1:
            raise ValueError(f"max_items: {max_items} is less than 1")
        self._client, self._max_items, self._timeout_seconds = client, max_items, timeout_seconds

    async def append(self, user_id: str, item_ids: Sequence[str]) -> int:
        """Add items, oldest first, and drop the oldest beyond `max_items`, in one step. Returns the new length.

        Raises HistoryUnavailable; the items may then be stored all the same, all of them or none.
        """
        key, newest = _key(user_id), item_ids[-self._max_items :]
        if not newest:
            return int(await self._ask(lambda: self._client.llen(key)))
        pipeline = self._client.pipeline(transaction=True)
        pipeline.rpush(key, *newest)
        pipeline.ltrim(key, -self._max_items, -1)
        length, _ = await self._ask(pipeline.execute)
        return min(int(length), self._max_items)

    async def get(self, user_id: str) -> list[str] | None:
        """A user's items, oldest first; None when nothing is stored. Raises HistoryUnavailable."""
        items = await self._ask(lambda: self._client.lrange(_key(user_id), 0, -1))
        return [_text(item) for item in items] or None

    async def forget(self, user_id: str) -> bool:
        """Erase a user's history. Returns whether there was one. Raises HistoryUnavailable."""
        return bool(await self._ask(lambda: self._client.delete(_key(user_id))))

    async def reachable(self) -> bool:
        """Whether the store answers now."""
        try:
            await self._ask(lambda: self._client.exists(_key("")))
        except HistoryUnavailable:
            return False
        return True

    async def _ask(self, call: Callable[[], Awaitable[_Answer]]) -> _Answer:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await call()
        except (RedisError, OSError) as error:
            raise HistoryUnavailable(f"history store: {type(error).__name__}") from error


def _key(user_id: str) -> str:
    return f"history:{user_id}"


def _text(item: bytes | str) -> str:
    return item if isinstance(item, str) else item.decode("utf-8", "replace")
