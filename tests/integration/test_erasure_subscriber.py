"""The erasure subscriber against a real Redis: late writes, outages, failed erasures, invalid entries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from structlog.testing import capture_logs

from atspeed.engine.arrays import KvArray
from atspeed.engine.kv.erasure import STREAM, ErasureSubscriber, publish_erasure
from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache, block_keys
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.redis_client import connect
from atspeed.engine.kv.redis_store import RedisKvStore, user_blocks_name
from atspeed.local.redis_server import LocalRedis
from orchestrator.user_key import user_cache_key
from tests.serving import LIVENESS_SECONDS

LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=2, dtype="float32", block_tokens=4)
USER_KEY = user_cache_key("", "subscriber")


def prompt(user_key: bytes = USER_KEY) -> tuple[list[bytes], list[KvArray]]:
    keys = block_keys(b"n", np.arange(8), LAYOUT.block_tokens, user_key)
    return keys, [np.full(LAYOUT.block_shape, index, dtype=np.float32) for index in range(2)]


@asynccontextmanager
async def subscribed(client: Redis, cache: PrefixCache, **options: float) -> AsyncIterator[ErasureSubscriber]:
    """A subscriber that has started, with these options."""
    subscriber = ErasureSubscriber(client, cache, **options)
    await subscriber.start()
    try:
        yield subscriber
    finally:
        await subscriber.close()


async def becomes(condition: Callable[[], bool]) -> None:
    """Return when a condition holds that has no event."""
    async with asyncio.timeout(LIVENESS_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class FailingStore(RedisKvStore):
    """A store whose erasures fail until `failing` is False."""

    failing = True

    async def erase(self, user_keys: Collection[bytes]) -> None:
        if self.failing:
            raise RedisConnectionError
        await super().erase(user_keys)


class CountingCache(PrefixCache):
    """Counts the users of each erasure."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[int] = []

    async def erase(self, user_keys: Collection[bytes]) -> None:
        self.steps.append(len(user_keys))
        await super().erase(user_keys)


class FailsWhenCancelled(PrefixCache):
    """A cache whose cancelled erasure raises a Redis error, as a client does whose timeout ends at that moment."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked = asyncio.Event()

    async def erase(self, user_keys: Collection[bytes]) -> None:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise RedisConnectionError from None


async def test_cancellation_that_fails_in_redis_ends_the_subscriber(redis_client: Redis) -> None:
    """This holds without `close` too: an event loop that ends cancels its tasks once and waits."""
    cache = FailsWhenCancelled(LAYOUT, MemoryKvCache(10**6))
    async with subscribed(redis_client, cache, poll_seconds=0.01):
        await publish_erasure(redis_client, USER_KEY)
        await cache.asked.wait()
        (task,) = [each for each in asyncio.all_tasks() if each.get_name() == "erasure-subscriber"]
        task.cancel()
        async with asyncio.timeout(LIVENESS_SECONDS):
            await asyncio.wait([task])


async def test_erasures_before_the_start_are_applied(redis_client: Redis) -> None:
    """A pass for the user may still run when the replica starts. Its blocks are not kept."""
    await publish_erasure(redis_client, USER_KEY)
    cache = PrefixCache(LAYOUT, tier := MemoryKvCache(10**6))
    async with subscribed(redis_client, cache):
        cache.remember(*prompt())
        assert len(tier) == 0
        cache.remember(*prompt(user_cache_key("", "another")))
        assert len(tier) == 2


async def test_late_write_is_erased(redis_client: Redis) -> None:
    """The write reaches Redis after the orchestrator erased the user there."""
    store = RedisKvStore(redis_client, LAYOUT, 60, 5.0)
    cache = PrefixCache(LAYOUT, MemoryKvCache(10**6), [store])
    await publish_erasure(redis_client, USER_KEY)
    await store.put(dict(zip(*prompt(), strict=True)))
    assert await redis_client.exists(user_blocks_name(USER_KEY)) == 1
    async with subscribed(redis_client, cache):
        assert await redis_client.exists(user_blocks_name(USER_KEY)) == 0


async def test_lag_beyond_the_limit_drops_all_stored_users(redis_url: str, redis_server: LocalRedis) -> None:
    """No user block is kept until the stream is read again. Blocks of histories in requests belong to no user and stay."""
    async with connect(redis_url, timeout_seconds=1.0) as client:
        cache = PrefixCache(LAYOUT, tier := MemoryKvCache(10**6))
        async with subscribed(client, cache, max_lag_seconds=1.0, poll_seconds=0.02):
            shared_keys = block_keys(b"n", np.arange(8), LAYOUT.block_tokens)
            cache.remember(*prompt())
            cache.remember(shared_keys, prompt()[1])
            assert len(tier) == 4
            await asyncio.to_thread(redis_server.kill)
            await becomes(lambda: not cache.accepts_user_blocks)
            assert [key in tier for key in (*prompt()[0], *shared_keys)] == [False, False, True, True]
            cache.remember(*prompt())
            assert len(tier) == 2
            await asyncio.to_thread(redis_server.start)
            await becomes(lambda: cache.accepts_user_blocks)
            cache.remember(*prompt())
            assert len(tier) == 4


async def test_start_without_redis_keeps_no_stored_user(redis_url: str, redis_server: LocalRedis) -> None:
    redis_server.kill()
    async with connect(redis_url, timeout_seconds=1.0) as client:
        cache = PrefixCache(LAYOUT, tier := MemoryKvCache(10**6))
        async with subscribed(client, cache):
            cache.remember(*prompt())
            assert len(tier) == 0


async def test_failed_erasure_is_tried_again(redis_url: str) -> None:
    """Blocks written after the erasure once stayed for a day, because one erasure in Redis failed.

    In a database of its own: a service that other tests share at this server would read the erasure too.
    """
    async with connect(f"{redis_url.rpartition('/')[0]}/1", timeout_seconds=5.0) as client:
        store = FailingStore(client, LAYOUT, 60, 5.0)
        cache = PrefixCache(LAYOUT, MemoryKvCache(10**6), [store])
        await publish_erasure(client, USER_KEY)
        await store.put(dict(zip(*prompt(), strict=True)))
        async with subscribed(client, cache, poll_seconds=0.01):
            assert await client.exists(user_blocks_name(USER_KEY)) == 1
            assert not cache.accepts_user_blocks
            store.failing = False
            await becomes(lambda: cache.accepts_user_blocks)
            assert await client.exists(user_blocks_name(USER_KEY)) == 0


async def test_unexpected_error_counts_as_lag_and_does_not_end_the_subscriber(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PrefixCache(LAYOUT, tier := MemoryKvCache(10**6))
    async with subscribed(redis_client, cache, max_lag_seconds=1.0, poll_seconds=0.01) as subscriber:
        cache.remember(*prompt())
        assert len(tier) == 2
        with monkeypatch.context() as patched, capture_logs() as logged:
            patched.setattr(redis_client, "xrange", None)
            await becomes(lambda: not cache.accepts_user_blocks)
            assert len(tier) == 0
            assert subscriber.lag_seconds > 1.0
        await becomes(lambda: cache.accepts_user_blocks)
        failed, dropped = logged
        assert failed["event"] == "erasure_stream_failed"
        assert failed["exc_info"], "a bug without a trace"
        assert dropped["event"] == "user_kv_dropped"


async def test_many_erasures_are_applied_in_steps(redis_client: Redis) -> None:
    """One answer with all of them would exceed the replica's timeout, on every try."""
    user_keys = [user_cache_key("", f"user {number}") for number in range(600)]
    for user_key in user_keys:
        await publish_erasure(redis_client, user_key)
    cache = CountingCache(LAYOUT, tier := MemoryKvCache(10**6))
    async with subscribed(redis_client, cache):
        assert cache.steps == [256, 256, 88]
        for user_key in user_keys:
            cache.remember(*prompt(user_key))
        assert len(tier) == 0


async def test_entries_without_a_user_key_are_skipped(redis_client: Redis) -> None:
    await redis_client.xadd(STREAM, {"owner": b"short"})
    await redis_client.xadd(STREAM, {"something": b"else"})
    await publish_erasure(redis_client, USER_KEY)
    cache = PrefixCache(LAYOUT, tier := MemoryKvCache(10**6))
    async with subscribed(redis_client, cache):
        cache.remember(*prompt())
        assert len(tier) == 0


async def test_old_entries_leave_the_stream(redis_client: Redis) -> None:
    """Entries older than an hour are removed when a new one is written."""
    await redis_client.xadd(STREAM, {"owner": USER_KEY}, id="5-0")
    await publish_erasure(redis_client, USER_KEY)
    assert await redis_client.xlen(STREAM) == 1
