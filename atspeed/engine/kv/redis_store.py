"""Prefix KV in Redis: the tier below memory.

No reply needs Redis. Every failure of Redis is a cache miss here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from atspeed.concurrency.circuit_breaker import CircuitBreaker
from atspeed.engine.arrays import KvArray
from atspeed.engine.kv.memory_cache import KvLayout, decode_block, encode_block, shared_prefix_length, user_key_of
from atspeed.engine.kv.tier import TierStatistics

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
# One warning a minute while Redis fails: often enough to be seen, too rare to fill a log.
_LOG_INTERVAL_SECONDS = 60.0
# Bytes of a pipeline. redis-py joins its commands on the event loop, which takes some milliseconds for 8 MB.
_WRITE_BYTES = 2**19
# Least time limit of a write: no request waits for it. Chosen, not measured.
_WRITE_TIMEOUT_SECONDS = 2.0
# Write a user's hash so that it always has an expiry, counted from its first field on. Otherwise the prompts that an active
# user has left behind would never expire. One script, as a connection may break between two commands. A hash with too many
# fields is emptied first.
_WRITE_USER_BLOCKS = """
if redis.call('HLEN', KEYS[1]) > tonumber(ARGV[2]) then redis.call('UNLINK', KEYS[1]) end
for field = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[field], ARGV[field + 1]) end
if redis.call('TTL', KEYS[1]) < 0 then redis.call('EXPIRE', KEYS[1], ARGV[1]) end
"""
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class RedisTierStatistics(TierStatistics):
    """Counters of a Redis tier since it was made.

    Attributes:
        invalid: blocks that were damaged or foreign; each is also a miss.
        failures: calls that Redis failed: refused, late, out of memory, not understood.
        skipped: calls that were not made because the circuit breaker was open.
    """

    invalid: int = 0
    failures: int = 0
    skipped: int = 0


class RedisKvStore:
    """A `KvTier`: blocks in Redis with a time to live. The eviction policy `volatile-lru` evicts them, and no histories.

    The blocks of a stored user are the fields of one hash, `kv:<user key in hex>`, so one command erases them, whatever model
    they belong to. The hash expires as a whole, one TTL after its first write. It holds about `user_blocks` at most, of all
    models together: a hash that holds more is emptied before the next prompt is written. Other blocks are `kv:<key in hex>`.

    Any failure opens a circuit breaker for `open_seconds`: Redis is not called, except by one probe afterwards. So a dead Redis
    costs one request its timeout now and then, and not every request. Encoding and decoding take milliseconds for a long
    prefix, so a worker thread does them. For the event loop only.

    Args:
        client: must return bytes; it stays the caller's to close.
        layout: the layout of the blocks.
        ttl_seconds: time to live of what is written.
        timeout_seconds: time limit of a read.
        user_blocks: number of blocks of one user.
        write_timeout_seconds: time limit of a write; two seconds, or that of a read if it is longer, when None.
        open_seconds: time without calls after a failure.
        clock: seconds on a monotonic clock.
    """

    name = "redis"

    def __init__(
        self,
        client: Redis,
        layout: KvLayout,
        ttl_seconds: int,
        timeout_seconds: float,
        *,
        user_blocks: int = 1024,
        write_timeout_seconds: float | None = None,
        open_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if client.connection_pool.connection_kwargs.get("decode_responses"):
            raise ValueError("Redis client: decode_responses is set, KV blocks are bytes")
        if ttl_seconds < 1:
            raise ValueError(f"ttl_seconds: {ttl_seconds} is less than 1")
        self._client = client
        self._layout = layout
        self._ttl_seconds = ttl_seconds
        self._user_blocks = user_blocks
        self._timeout_seconds = timeout_seconds
        self._write_timeout_seconds = write_timeout_seconds or max(_WRITE_TIMEOUT_SECONDS, timeout_seconds)
        self._breaker = CircuitBreaker(1, open_seconds, clock)
        self._clock = clock
        self._log_at = -float("inf")
        self._hits = 0
        self._misses = 0
        self._invalid = 0
        self._failures = 0
        self._skipped = 0

    @property
    def statistics(self) -> RedisTierStatistics:
        """Return the counters as they are now."""
        return RedisTierStatistics(self._hits, self._misses, self._invalid, self._failures, self._skipped)

    @property
    def failures(self) -> int:
        """Return the number of calls that Redis failed, or that were not made because the breaker was open."""
        return self._failures + self._skipped

    async def get_chain(self, keys: Sequence[bytes]) -> list[KvArray]:
        """Return the blocks of the longest leading run of `keys` that Redis holds intact, each an array of its own.

        Takes one MGET or HMGET; both when blocks of the shared prefix and of a user are wanted.
        """
        if not keys:
            return []
        values = await self._call(lambda: self._read(keys), self._timeout_seconds) or []
        run = await asyncio.to_thread(self._decode_run, keys, values) if values else []
        self._hits += len(run)
        self._misses += len(keys) - len(run)
        # A value that follows the run and did not decode.
        self._invalid += any(value is not None for value in values[len(run) : len(run) + 1])
        return run

    async def put(self, blocks: Mapping[bytes, KvArray]) -> None:
        """Write blocks over the values of their keys, in pipelines. Raises ValueError for a block of another layout."""
        if blocks:
            await self._call(lambda: self._write(blocks), self._write_timeout_seconds)

    async def erase(self, user_keys: Collection[bytes]) -> None:
        """Erase users' blocks, in one command. Ignores the breaker: no later call would erase them."""
        async with asyncio.timeout(self._write_timeout_seconds):
            await self._client.unlink(*map(user_blocks_name, user_keys))

    async def _read(self, keys: Sequence[bytes]) -> list[Any]:
        shared, own = _split(keys)
        answers: list[Any] = []
        if shared:
            answers.append(await self._client.mget([_name(key) for key in shared]))
        if own:
            answers.append(await cast("Awaitable[Any]", self._client.hmget(user_blocks_name(user_key_of(own[0])), own)))
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
        """Write all blocks, a pipeline of about `_WRITE_BYTES` at a time."""
        keys, step = list(blocks), max(1, _WRITE_BYTES // self._layout.block_bytes)
        for start in range(0, len(keys), step):
            entries = await asyncio.to_thread(self._encode, {key: blocks[key] for key in keys[start : start + step]})
            pipeline = self._client.pipeline(transaction=False)
            self._add_writes(pipeline, entries, limit=self._user_blocks + start)
            # Raised here and not by redis-py, whose error text quotes the whole command: megabytes.
            for result in await pipeline.execute(raise_on_error=False):
                if isinstance(result, Exception):
                    raise result
        return True

    def _add_writes(self, pipeline: Pipeline, entries: Mapping[bytes, bytes], *, limit: int) -> None:
        """Add the commands that write `entries`. limit: blocks of a user's hash before, this prompt's written ones included."""
        shared, own = _split(list(entries))
        for key in shared:
            pipeline.set(_name(key), entries[key], ex=self._ttl_seconds)
        if own:
            fields = [part for key in own for part in (key, entries[key])]
            name = user_blocks_name(user_key_of(own[0]))
            pipeline.eval(_WRITE_USER_BLOCKS, 1, name, self._ttl_seconds, limit, *fields)

    async def _call(self, call: Callable[[], Awaitable[_Answer]], timeout_seconds: float) -> _Answer | None:
        """Return the answer of Redis, or None when it failed or the breaker is open."""
        if not self._breaker.allow():
            self._skipped += 1
            return None
        try:
            async with asyncio.timeout(timeout_seconds):
                answer = await call()
        except (RedisError, OSError) as error:
            self._fail(error)
            return None
        self._breaker.record_success()
        return answer

    def _fail(self, error: Exception) -> None:
        self._breaker.record_failure()
        self._failures += 1
        now = self._clock()
        if now >= self._log_at:
            self._log_at = now + _LOG_INTERVAL_SECONDS
            # Without the error's text: redis-py and Redis quote commands and keys in it.
            _log.warning("kv_redis_failed", failures=self._failures, error=type(error).__name__)


def user_blocks_name(user_key: bytes) -> str:
    """Return the Redis key of the hash that holds all blocks of one user."""
    return f"kv:{user_key.hex()}"


def _name(key: bytes) -> str:
    return f"kv:{key.hex()}"


def _split(keys: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Return the keys of the shared prefix, and those of one user."""
    shared = shared_prefix_length(keys)
    return list(keys[:shared]), list(keys[shared:])
