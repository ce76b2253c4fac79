"""Store of users' histories in Redis: one hash of events per user.

    Exception
    +-- HistoryUnavailable   Redis is down, late or out of memory, or the key holds another type

Histories have no time to live. So under `volatile-lru` a full Redis evicts cached KV and never a history.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast
from urllib.parse import quote

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from atspeed.engine.kv.erasure import publish_erasure
from atspeed.engine.kv.redis_pool import check_writable
from orchestrator.events import META, Entry, StoredEvent, entries, entries_of_list
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
# One atomic step. Its first write deletes nothing: Redis refuses it when memory is full, and then nothing has changed.
# ARGV: own limit, number of events that may be stored beyond it, then key, time and rest of the value of each event.
# Reply: number of stored events, limit, duplicates, expired events.
_RECORD = """\
local own, slack = tonumber(ARGV[1]), tonumber(ARGV[2])
local known = tonumber(redis.call('GET', KEYS[2]) or '') or 0
local most = math.max(own, known)
local listed = redis.call('TYPE', KEYS[1]).ok == 'list' and redis.call('LRANGE', KEYS[1], 0, -1) or {}
if #listed > 0 or own > known then redis.call('SET', KEYS[2], most) end
local number = #listed
if number > 0 then redis.call('DEL', KEYS[1]) end
for place, item in ipairs(listed) do
  redis.call('HSET', KEYS[1], string.format('n%012d', place), string.format('%d %d ', place - number - 1, #item) .. item)
end
local meta = redis.call('HGET', KEYS[1], 'meta') or string.format('0 %d 0 -1e15', number)
local last, dropped, floor
last, number, dropped, floor = string.match(meta, '(%S+) (%S+) (%S+) (%S+)')
last, number, dropped, floor = tonumber(last), tonumber(number), tonumber(dropped), tonumber(floor)
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local duplicates, expired = 0, 0
for first = 3, #ARGV, 3 do
  local key, time = ARGV[first], tonumber(ARGV[first + 1])
  if key ~= '' and redis.call('HEXISTS', KEYS[1], 'k' .. key) == 1 then
    duplicates = duplicates + 1
  elseif time and time < floor then
    expired = expired + 1
  else
    if not time then last = math.max(now, last + 1) end
    if key == '' then number = number + 1 end
    local field = key == '' and string.format('n%012.0f', number) or 'k' .. key
    redis.call('HSET', KEYS[1], field, string.format('%.0f ', time or last) .. ARGV[first + 2])
  end
end
local count = redis.call('HLEN', KEYS[1]) - redis.call('HEXISTS', KEYS[1], 'meta')
if count > most + slack then
  local all, found = redis.call('HGETALL', KEYS[1]), {}
  for place = 1, #all, 2 do
    if all[place] ~= 'meta' then
      found[#found + 1] = {tonumber(string.match(all[place + 1], '^%S+')), all[place]}
    end
  end
  table.sort(found, function(one, other)
    if one[1] ~= other[1] then return one[1] < other[1] end
    return one[2] < other[2]
  end)
  for place = 1, count - most do redis.call('HDEL', KEYS[1], found[place][2]) end
  dropped, floor, count = dropped + count - most, found[count - most][1], most
end
if count > 0 then
  redis.call('HSET', KEYS[1], 'meta', string.format('%.0f %.0f %.0f %.0f', last, number, dropped, floor))
end
return {count, most, duplicates, expired}
"""
_RECORD_SHA = hashlib.sha1(_RECORD.encode(), usedforsecurity=False).hexdigest()  # as Redis names scripts
_PART_EVENTS = 250  # in one round trip of a batch: other calls wait for a few milliseconds behind it, in Redis and here
_LEAST_SLACK = 64  # events: a full history is sorted once in so many


@dataclass(frozen=True)
class Recorded:
    """Result of storing events.

    Attributes:
        length: events that the history shows now.
        duplicates: events that changed nothing, since an event of the same key is stored.
        expired: events that are older than all that a full history keeps.
    """

    length: int
    duplicates: int
    expired: int


@dataclass(frozen=True)
class UserEvents:
    """Events of one user, as a batch holds them."""

    user_id: str
    events: Sequence[StoredEvent]
    tenant: str = ""


class HistoryUnavailable(Exception):  # noqa: N818  a state of the store, like gRPC's UNAVAILABLE
    """The history store did not answer. The text has the reason and never names a user."""


class HistoryStore:
    """Store under `history:<tenant, percent-encoded>:<user id>`, with the newest `max_items` events of each user.

    A history is a hash of events (`orchestrator.events`), in the order of their times. So the newest events are the same in
    whatever order they arrive, and however often. Its oldest events are dropped some at a time. The newest dropped time is the
    floor: events below it cannot be among the newest and are not stored again.

    The prompt's history starts at a multiple of `trim_step` events, of all that were ever stored. If `trim_step` is the prompt's
    `drop_block`, the prompt's window moves once in `drop_block` events, however long the history. With a step of 1 it would move
    at every event, and no prefix of the prompt would stay cached.

    Deployments with different `max_items` may share a Redis. `LIMIT_KEY` holds the largest one. A history keeps that number of
    events, and each deployment shows its own newest. After that key is deleted, the limit is the largest one in use.

    The caller closes `client`. It must not retry (`atspeed.engine.kv.redis_client.connect`), since events without a key that are
    sent twice are stored twice. Callers check user ids and events. Users of different tenants are different users.
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
        self._turn = asyncio.Lock()
        self._warned = False

    async def publish_limit(self) -> None:
        """Publish this deployment's limit to the others, before it stores anything. Raises HistoryUnavailable."""
        limit = await self._call(
            lambda: cast("Awaitable[int]", self._client.eval(_RAISE_LIMIT, 1, LIMIT_KEY, str(self._max_items)))
        )
        self._warn_if_below(int(limit))

    async def record(self, user_id: str, events: Sequence[StoredEvent], *, tenant: str = "") -> Recorded:
        """Add events where their times put them; an event whose key is stored changes nothing.

        Raises HistoryUnavailable. All of the events may then be stored, or none.
        """
        arguments = self._record_arguments(UserEvents(user_id, events, tenant))
        counts = await self._call(lambda: cast("Awaitable[list[int]]", self._client.eval(_RECORD, 2, *arguments)))
        return self._recorded(counts)

    async def record_batch(self, batch: Sequence[UserEvents]) -> list[Recorded | HistoryUnavailable]:
        """Add events of many users, each as `record` does, in their order and in few round trips.

        Batches take turns part by part, so that none waits for Redis behind many others. Returns what was stored of each user,
        or why it is not known to be stored. After a failure of the store itself the rest is not tried.
        """
        results: list[Recorded | HistoryUnavailable] = []
        for part in _parts(batch):
            try:
                async with self._turn:
                    answers = await self._call(partial(self._run_batch, part))
            except HistoryUnavailable as error:
                return [*results, *[error] * (len(batch) - len(results))]
            results += map(self._answered, answers)
        return results

    def _run_batch(self, batch: Sequence[UserEvents]) -> Awaitable[list[list[int] | Exception]]:
        """Send a call per user without waiting in between. The first one brings the script, and the others name it."""
        pipeline = self._client.pipeline(transaction=False)
        for place, user in enumerate(batch):
            send, script = (pipeline.evalsha, _RECORD_SHA) if place else (pipeline.eval, _RECORD)
            send(script, 2, *self._record_arguments(user))
        return cast("Awaitable[list[list[int] | Exception]]", pipeline.execute(raise_on_error=False))

    def _answered(self, answer: list[int] | Exception) -> Recorded | HistoryUnavailable:
        if isinstance(answer, Exception):
            error = HistoryUnavailable(f"history store: {type(answer).__name__}")
            error.__cause__ = answer
            return error
        return self._recorded(answer)

    def _record_arguments(self, user: UserEvents) -> tuple[str, ...]:
        slack = max(_LEAST_SLACK, self._max_items // 8)
        packed = [argument for event in user.events for argument in event.arguments]
        return (_key(user.tenant, user.user_id), LIMIT_KEY, str(self._max_items), str(slack), *packed)

    def _recorded(self, counts: list[int]) -> Recorded:
        count, limit, duplicates, expired = counts
        self._warn_if_below(limit)
        return Recorded(min(count, self._max_items), duplicates, expired)

    async def get(self, user_id: str, *, tenant: str = "") -> list[str] | None:
        """Return a user's items for a prompt, oldest first; None when nothing is stored. Raises HistoryUnavailable."""
        stored, dropped = await self._read(user_id, tenant)
        hidden = max(0, len(stored) - self._max_items)
        start = hidden + -(dropped + hidden) % self._trim_step
        return [entry.item_id for entry in stored[start:]] or None

    async def events(self, user_id: str, *, tenant: str = "") -> list[StoredEvent]:
        """Return a user's newest `max_items` events, oldest first. Raises HistoryUnavailable."""
        stored, _ = await self._read(user_id, tenant)
        with _readable():
            return [entry.event for entry in stored[-self._max_items :]]

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

    async def _read(self, user_id: str, tenant: str) -> tuple[list[Entry], int]:
        """Return the stored events, oldest first, and how many older ones were dropped."""
        key = _key(tenant, user_id)
        try:
            fields = await self._call(lambda: cast("Awaitable[dict[bytes, bytes]]", self._client.hgetall(key)))
        except HistoryUnavailable as error:
            if not str(error.__cause__).startswith("WRONGTYPE"):
                raise
            listed = await self._call(lambda: cast("Awaitable[list[bytes]]", self._client.lrange(key, 0, -1)))
            return entries_of_list(listed), 0
        with _readable():
            dropped = int(fields[META].split(b" ")[2]) if META in fields else 0
            return entries(fields), dropped

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


def _parts(batch: Sequence[UserEvents]) -> Iterator[Sequence[UserEvents]]:
    """Yield a batch in parts of about `_PART_EVENTS` events."""
    start = events = 0
    for place, user in enumerate(batch):
        if events and events + len(user.events) > _PART_EVENTS:
            yield batch[start:place]
            start, events = place, 0
        events += len(user.events)
    if start < len(batch):
        yield batch[start:]


@contextmanager
def _readable() -> Iterator[None]:
    """Raise HistoryUnavailable for a hash that is no history."""
    try:
        yield
    except (ValueError, IndexError) as error:
        raise HistoryUnavailable(f"history store: {type(error).__name__}") from error


def _key(tenant: str, user_id: str) -> str:
    """Return the key of a user. Keys are unique: an encoded tenant has no colon, so the second colon ends the tenant."""
    return f"history:{quote(tenant, safe='')}:{user_id}"
