"""Prefix KV in Redis, the tier below memory.

Redis is never needed for an answer. Whatever goes wrong with it, here it is a miss.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from atspeed.engine.arrays import KvArray
from atspeed.engine.kv.memory_cache import KvLayout, decode_block, encode_block, is_shared_prefix_key, owner_of

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
        self._client = client
        self._layout = layout
        self._ttl_seconds = ttl_seconds
        self._owner_blocks = owner_blocks
        self._timeout_seconds = timeout_seconds
        self._write_timeout_seconds = write_timeout_seconds
        self._backoff_seconds = backoff_seconds
        self._clock = clock
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
        shared, own = keys[: is_shared_prefix_key(keys)], list(keys[is_shared_prefix_key(keys) :])
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
        shared, own = keys[: is_shared_prefix_key(keys)], keys[is_shared_prefix_key(keys) :]
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


def group_name(owner: bytes) -> str:
    """The Redis key of all blocks of one user."""
    return f"kv:{owner.hex()}"


def _name(key: bytes) -> str:
    return f"kv:{key.hex()}"
