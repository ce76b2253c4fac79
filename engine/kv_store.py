"""Prefix KV in Redis, and the two tiers as one: memory first, then Redis.

Redis is never needed for an answer. Whatever goes wrong with it, here it is a miss.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from redis.asyncio import ConnectionPool, Redis, SSLConnection
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from engine.fetch_cost import FetchPolicy
from engine.kv_cache import (
    NO_OWNER,
    KvArray,
    KvLayout,
    MemoryKvCache,
    decode_block,
    encode_block,
    nobodys,
    owner_of,
)

_logger = logging.getLogger(__name__)
_LOG_INTERVAL_SECONDS = 60.0
_WRITE_BYTES = 2**19
# A user's hash never stands without an expiry, counted from its first field on: else what an active user's windows leave behind
# would never go. One step, as a connection may break between two. Too full, it begins anew.
_WRITE_OWNED = """
if redis.call('HLEN', KEYS[1]) > tonumber(ARGV[2]) then redis.call('UNLINK', KEYS[1]) end
for field = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[field], ARGV[field + 1]) end
if redis.call('TTL', KEYS[1]) < 0 then redis.call('EXPIRE', KEYS[1], ARGV[1]) end
"""
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class RedisTls:
    """PEM files for rediss://. ca: of Redis's certificate, the system's CAs without one; certificate and key: what it sees."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


class _TlsConnection(SSLConnection):
    """Reads the files for every handshake: redis-py alone would for the first, and a renewed certificate would go unused."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None
        return super()._connection_arguments()


def connect(url: str, *, timeout_seconds: float, tls: RedisTls | None = None) -> Redis:
    """A Redis client that fails within about `timeout_seconds` instead of retrying behind its caller's back.

    Ten retries are the default of `Redis()`, none that of `from_url`, in redis-py 8; said here, it cannot change. A retry
    is seconds where a request has milliseconds, and an RPUSH that runs twice when only its reply was lost.
    """
    encrypted = url.startswith("rediss://")
    files = tls or RedisTls()
    pool = ConnectionPool.from_url(
        url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        # Where these are on, as by default, redis-py takes a pooled connection that the server has closed for one with a
        # notification, and the first call on each after a restart of the server fails.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        **(
            {"ssl_ca_certs": files.ca, "ssl_certfile": files.certificate, "ssl_keyfile": files.key} if encrypted else {}
        ),
    )
    if encrypted:
        pool.connection_class = _TlsConnection
    return Redis.from_pool(pool)


class KvStore(Protocol):
    """A tier below memory. But for `forget`, no method ever raises because of the store's state: its failure is a miss.

    The keys of one call are of one prompt: nobody's first, then one owner's.
    """

    @property
    def failures(self) -> int:
        """Calls that were not answered."""

    async def get_chain(self, keys: Sequence[bytes]) -> list[KvArray]:
        """The blocks of the longest leading run of `keys` that is stored and valid, each a read-only array of its own."""

    async def put(self, blocks: Mapping[bytes, KvArray]) -> None:
        """Store blocks of one prompt by key, as many as may be."""

    async def forget(self, owners: Collection[bytes]) -> None:
        """Erase all blocks with these owners' tags, one or more. Raises RedisError or OSError where that was not done."""


@dataclass(frozen=True)
class StoreStatistics:
    """What a Redis tier has done since it was made. All but `failures` and `skipped` count blocks."""

    hits: int
    misses: int
    invalid: int
    """Blocks found damaged or foreign; each is also a miss."""
    failures: int
    """Calls that Redis failed: refused, late, out of memory, not understood."""
    skipped: int
    """Calls not made because Redis had just failed."""


class RedisKvStore:
    """Blocks in Redis with a time to live: `volatile-lru` then evicts them and not histories.

    A stored user's are the fields of one hash, `kv:<tag in hex>`, so that they can be erased in one step, whatever they are of;
    it expires as a whole, one TTL after its first write, and holds about `owner_blocks` at most, of all models together: one that
    has more is emptied before the next prompt's are written. Others stand under `kv:<key in hex>`.

    `client` must return bytes; it stays its caller's to close. Reads give up after `timeout_seconds`; writes, for which
    nobody waits, after `write_timeout_seconds`. After a failure Redis is left alone for `backoff_seconds`; then one
    call tries while others still do without: a dead Redis costs one request its timeout now and then, not every one.
    For the event loop only. Encoding and decoding take milliseconds for a long prefix, so a worker thread does them.
    """

    def __init__(
        self,
        client: Redis,
        layout: KvLayout,
        ttl_seconds: int,
        timeout_seconds: float,
        *,
        owner_blocks: int = 1024,
        write_timeout_seconds: float = 2.0,
        backoff_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if client.connection_pool.connection_kwargs.get("decode_responses"):
            raise ValueError("Redis client: decode_responses is set, KV blocks are bytes")
        if ttl_seconds < 1:
            raise ValueError(f"ttl_seconds: {ttl_seconds} is less than 1")
        self._client, self._layout, self._ttl_seconds, self._owner_blocks = client, layout, ttl_seconds, owner_blocks
        self._timeout_seconds, self._write_timeout_seconds = timeout_seconds, write_timeout_seconds
        self._backoff_seconds, self._clock = backoff_seconds, clock
        self._failing = False
        self._resume_at = self._log_at = -float("inf")
        self._hits = self._misses = self._invalid = self._failures = self._skipped = 0

    @property
    def statistics(self) -> StoreStatistics:
        """A snapshot of the counters."""
        return StoreStatistics(self._hits, self._misses, self._invalid, self._failures, self._skipped)

    @property
    def failures(self) -> int:
        """Calls that Redis failed or that were not made because it had just failed."""
        return self._failures + self._skipped

    async def get_chain(self, keys: Sequence[bytes]) -> list[KvArray]:
        """The blocks of the longest leading run of `keys` that Redis holds intact, each an array of its own.

        One MGET or HMGET; both where nobody's blocks and an owner's are wanted.
        """
        if not keys:
            return []
        values = await self._ask(lambda: self._read(keys), self._timeout_seconds) or []
        run = await asyncio.to_thread(self._decode_run, keys, values) if values else []
        self._hits += len(run)
        self._misses += len(keys) - len(run)
        self._invalid += any(value is not None for value in values[len(run) : len(run) + 1])
        return run

    async def put(self, blocks: Mapping[bytes, KvArray]) -> None:
        """Write blocks over what their keys hold, in pipelines. Raises ValueError for a block of another layout."""
        # Looked at here already, because encoding for a Redis that will not be asked is a waste.
        if not blocks or self._resting():
            self._skipped += bool(blocks)
            return
        await self._ask(lambda: self._write(blocks), self._write_timeout_seconds)

    async def forget(self, owners: Collection[bytes]) -> None:
        """Erase users' blocks, in one step. It asks a Redis that is left alone, too: nothing else would erase them."""
        async with asyncio.timeout(self._write_timeout_seconds):
            await self._client.unlink(*map(group_name, owners))

    async def _read(self, keys: Sequence[bytes]) -> list[Any]:
        shared, own = keys[: nobodys(keys)], list(keys[nobodys(keys) :])
        answers: list[Any] = []
        if shared:
            answers.append(await self._client.mget([_name(key) for key in shared]))
        if own:
            answers.append(await cast("Awaitable[Any]", self._client.hmget(group_name(owner_of(own[0])), own)))
        return [value for answer in answers if isinstance(answer, list) for value in answer]

    def _decode_run(self, keys: Sequence[bytes], values: Sequence[Any]) -> list[KvArray]:
        run: list[KvArray] = []
        for key, value in zip(keys, values, strict=False):
            block = decode_block(self._layout, key, value) if isinstance(value, bytes) else None
            if block is None:
                break
            run.append(block)
        return run

    def _encode(self, blocks: Mapping[bytes, KvArray]) -> dict[bytes, bytes]:
        return {key: encode_block(self._layout, key, block) for key, block in blocks.items()}

    async def _write(self, blocks: Mapping[bytes, KvArray]) -> bool:
        """All blocks, some at a time: redis-py joins a pipeline's commands on the event loop, some ms for 8 MB."""
        keys, step = list(blocks), max(1, _WRITE_BYTES // self._layout.block_bytes)
        for start in range(0, len(keys), step):
            entries = await asyncio.to_thread(self._encode, {key: blocks[key] for key in keys[start : start + step]})
            pipeline = self._client.pipeline(transaction=False)
            self._add_writes(pipeline, entries, most=self._owner_blocks + start)
            # Raised by hand: redis-py would quote the whole command, megabytes of it, in the error's text.
            for result in await pipeline.execute(raise_on_error=False):
                if isinstance(result, Exception):
                    raise result
        return True

    def _add_writes(self, pipeline: Pipeline, entries: Mapping[bytes, bytes], *, most: int) -> None:
        """most: blocks that a user's hash may hold before, what is already written of this prompt included."""
        keys = list(entries)
        shared, own = keys[: nobodys(keys)], keys[nobodys(keys) :]
        for key in shared:
            pipeline.set(_name(key), entries[key], ex=self._ttl_seconds)
        if own:
            fields = [part for key in own for part in (key, entries[key])]
            pipeline.eval(_WRITE_OWNED, 1, group_name(owner_of(own[0])), self._ttl_seconds, most, *fields)

    async def _ask(self, call: Callable[[], Awaitable[_Answer]], timeout_seconds: float) -> _Answer | None:
        """Redis's answer, or None: it failed, or it is being left alone."""
        if self._resting():
            self._skipped += 1
            return None
        if self._failing:
            # This call is the one that tries; the others go on resting until it is back.
            self._resume_at = self._clock() + self._backoff_seconds
        try:
            async with asyncio.timeout(timeout_seconds):
                answer = await call()
        except (RedisError, OSError) as error:
            self._fail(error)
            return None
        self._failing = False
        self._resume_at = -float("inf")
        return answer

    def _resting(self) -> bool:
        return self._clock() < self._resume_at

    def _fail(self, error: Exception) -> None:
        now = self._clock()
        self._failing = True
        self._failures += 1
        self._resume_at = now + self._backoff_seconds
        if now >= self._log_at:
            self._log_at = now + _LOG_INTERVAL_SECONDS
            # Not its text: redis-py and Redis quote commands and keys in it.
            _logger.warning("Redis KV tier failed (%d so far): %s", self._failures, type(error).__name__)


@dataclass(frozen=True)
class CachedPrefix:
    """What the tiers hold of a prompt's beginning.

    blocks: read-only [layers, 2, block_tokens, kv_heads, head_dim] each, in prompt order.
    memory_tokens, redis_tokens: how many prompt tokens came from which tier, memory's first.
    """

    blocks: tuple[KvArray, ...]
    memory_tokens: int
    redis_tokens: int


class PrefixCache:
    """Memory and, where there is a `store`, Redis as one cache. For the event loop only.

    The store never fails a request and delays it by its read timeout at most; `fetching` says when it is read and written.
    Writes are background tasks, up to `max_pending_writes` of them; beyond that a write is dropped and counted. `memory` and
    `store` stay the caller's.

    For `hold_seconds` after `forget`, nothing of that owner is kept: passes that had begun before may still bring blocks.
    """

    hold_seconds = 60.0

    def __init__(
        self,
        layout: KvLayout,
        memory: MemoryKvCache,
        store: KvStore | None = None,
        *,
        fetching: FetchPolicy | None = None,
        max_pending_writes: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout, self._memory, self._store = layout, memory, store
        self.fetching = fetching or FetchPolicy(layout.bytes_per_token)
        self._max_pending_writes = max_pending_writes
        self._clock = clock
        self._keeps_owned = True
        # Until when nothing of an owner is kept.
        self._forgotten: dict[bytes, float] = {}
        # With the owners of what they write; the event loop itself only keeps weak references to tasks.
        self._writes: dict[asyncio.Task[None], bytes] = {}
        self._dropped_writes = 0
        self._closed = False

    @property
    def pending_writes(self) -> int:
        """Writes to the store that are under way."""
        return len(self._writes)

    @property
    def dropped_writes(self) -> int:
        """Writes given up because too many were pending, or because the cache was closed."""
        return self._dropped_writes

    async def lookup(self, keys: Sequence[bytes]) -> CachedPrefix:
        """The longest cached beginning of a prompt with these block keys. What the store adds moves up into memory."""
        found = self._memory.get_chain(keys)
        fetched = await self._fetch(keys[len(found) :], len(found))
        kept = self._keepable(keys)[: len(found) + len(fetched)]
        new = fetched[: max(0, len(kept) - len(found))]
        if new:
            fetched = [*self._memory.put_chain(kept, new), *fetched[len(new) :]]
        step = self._layout.block_tokens
        return CachedPrefix((*found, *fetched), len(found) * step, len(fetched) * step)

    async def _fetch(self, missing: Sequence[bytes], known: int) -> list[KvArray]:
        """What the store has of the blocks after the first `known`, where reading it is worth while."""
        step = self._layout.block_tokens
        if self._store is None or not missing or not self.fetching.wants_read(len(missing) * step, known * step):
            return []
        begun, failures = time.perf_counter_ns(), self._store.failures
        fetched = await self._store.get_chain(missing)
        if self._store.failures == failures:  # else the store leaves Redis alone for a while by itself
            self.fetching.observe(len(missing) * step, len(fetched) * step, time.perf_counter_ns() - begun)
        return fetched

    def remember(self, keys: Sequence[bytes], new: Sequence[KvArray]) -> None:
        """Keep the blocks that `lookup` did not find: in memory before this returns, in the store some time later.

        keys: of the prompt's whole blocks. new: the blocks of the last `len(new)` of them, as `copy_blocks` makes them; they
        are not copied again. Raises ValueError when there are more than keys.
        """
        found = len(keys) - len(new)
        keys = self._keepable(keys)
        new = new[: max(0, len(keys) - found)]
        last = keys[max(0, len(keys) - len(new)) :]
        # Another request with the same prefix may have been quicker; then its write is under way.
        known = [key in self._memory for key in last]
        kept = self._memory.put_chain(keys, new)
        unknown = {key: block for key, block, was_known in zip(last, kept, known, strict=True) if not was_known}
        if unknown and self._store and self.fetching.wants_write(len(keys) * self._layout.block_tokens):
            self._write(unknown)

    @property
    def keeps_owned(self) -> bool:
        """Whether blocks of stored users are kept. Only where someone says when a user is to be forgotten; False drops them."""
        return self._keeps_owned

    @keeps_owned.setter
    def keeps_owned(self, value: bool) -> None:
        self._keeps_owned = value
        if not value:
            self._memory.drop(lambda key: owner_of(key) != NO_OWNER)

    async def forget(self, owners: Collection[bytes]) -> None:
        """Drop users' blocks, here and in the store, with those that are on their way there. Looks at all keys in memory, once.

        Raises RedisError or OSError where the store did not do it; here it is done then, and it should be called again.
        """
        now = self._clock()
        self._forgotten = {tag: until for tag, until in self._forgotten.items() if until > now}
        self._forgotten |= dict.fromkeys(owners, now + self.hold_seconds)
        gone = frozenset(owners)
        self._memory.drop(lambda key: owner_of(key) in gone)
        if self._store and gone:
            if writing := {task for task, owner in self._writes.items() if owner in gone}:
                await asyncio.wait(writing)
            await self._store.forget(gone)

    def _keepable(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """A chain, or only what of it is nobody's while its owner's may not be kept."""
        owner = owner_of(keys[-1]) if keys else NO_OWNER
        held = self._forgotten.get(owner, -float("inf")) > self._clock()
        if owner == NO_OWNER or (self._keeps_owned and not held):
            return keys
        return keys[: nobodys(keys)]

    async def close(self, timeout_seconds: float = 2.0) -> None:
        """Give pending writes `timeout_seconds` to end, then cancel them. Later writes are dropped."""
        self._closed = True
        if not self._writes:
            return
        _, late = await asyncio.wait(self._writes, timeout=timeout_seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def _write(self, blocks: Mapping[bytes, KvArray]) -> None:
        if self._store is None or not blocks:
            return
        if self._closed or len(self._writes) >= self._max_pending_writes:
            self._dropped_writes += 1
            return
        task = asyncio.get_running_loop().create_task(self._store.put(blocks), name="kv-write")
        self._writes[task] = owner_of(list(blocks)[-1])
        task.add_done_callback(self._written)

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writes.pop(task, None)
        if not task.cancelled() and (error := task.exception()):
            _logger.error("KV write failed", exc_info=error)


def group_name(owner: bytes) -> str:
    """The Redis key of all blocks of one user."""
    return f"kv:{owner.hex()}"


def _name(key: bytes) -> str:
    return f"kv:{key.hex()}"
