"""The Redis tier against a real server that lives: what is kept, whose it is, and how memory stands above it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache, block_keys, encode_block
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.redis_client import connect
from atspeed.engine.kv.redis_store import RedisKvStore, user_blocks_name
from atspeed.local.redis_server import LocalRedis
from tests.kv_chains import LAYOUT, LIVENESS_SECONDS, Clock, assert_run, block_of, chain, content, store_of


@pytest.fixture
async def store(redis_client: Redis) -> RedisKvStore:
    return store_of(redis_client)


class TestAlive:
    async def test_what_is_put_is_got(self, store: RedisKvStore) -> None:
        keys = chain(5)
        await store.put(content(keys))
        blocks = await store.get_chain(keys)
        assert_run(blocks, keys)
        assert all(block.base is None and not block.flags.writeable for block in blocks), "memory would copy them"
        assert (store.statistics.hits, store.statistics.misses, store.statistics.failures) == (5, 0, 0)

    async def test_only_the_leading_run_counts(self, store: RedisKvStore) -> None:
        keys = chain(5)
        await store.put(content([keys[0], keys[1], keys[3]]))
        assert_run(await store.get_chain(keys), keys[:2])
        assert await store.get_chain(chain(3, seed=1)) == []
        assert (store.statistics.hits, store.statistics.misses) == (2, 6)

    async def test_nothing_asked_nothing_sent(self, store: RedisKvStore, redis_client: Redis) -> None:
        before = (await redis_client.info("stats"))["total_commands_processed"]
        assert await store.get_chain([]) == []
        await store.put({})
        assert (await redis_client.info("stats"))["total_commands_processed"] == before + 1

    async def test_entries_expire(self, store: RedisKvStore, redis_client: Redis) -> None:
        (key,) = chain(1)
        await store.put(content([key]))
        assert 0 < await redis_client.ttl(f"kv:{key.hex()}") <= 60

    async def test_blocks_are_shared_between_processes_by_key_alone(self, redis_url: str) -> None:
        keys = chain(3)
        async with connect(redis_url, timeout_seconds=5.0) as one, connect(redis_url, timeout_seconds=5.0) as other:
            await store_of(one).put(content(keys))
            assert_run(await store_of(other).get_chain(keys), keys)

    async def test_damaged_and_foreign_entries_end_the_run(self, store: RedisKvStore, redis_client: Redis) -> None:
        keys = chain(4)
        name = f"kv:{keys[2].hex()}"
        good = encode_block(LAYOUT, keys[2], block_of(keys[2]))
        flipped = bytearray(good)
        flipped[-1] ^= 1
        other = encode_block(LAYOUT, keys[3], block_of(keys[3]))
        await store.put(content(keys))
        for bad in (b"", b"garbage", good[:-1], good + b"\0", bytes(flipped), other):
            await redis_client.set(name, bad)
            assert_run(await store.get_chain(keys), keys[:2])
        assert store.statistics.invalid == 6
        await redis_client.delete(name)
        await redis_client.rpush(name, "a list")
        assert_run(await store.get_chain(keys), keys[:2])
        assert store.statistics.failures == 0

    async def test_a_damaged_entry_is_mended_by_the_next_write(self, store: RedisKvStore, redis_client: Redis) -> None:
        keys = chain(1)
        await redis_client.set(f"kv:{keys[0].hex()}", b"garbage")
        await store.put(content(keys))
        assert_run(await store.get_chain(keys), keys)

    async def test_refuses_a_client_that_decodes(self, redis_url: str) -> None:
        async with Redis.from_url(redis_url, decode_responses=True) as client:
            with pytest.raises(ValueError, match="decode_responses"):
                store_of(client)

    async def test_refuses_entries_that_never_live(self, redis_client: Redis) -> None:
        with pytest.raises(ValueError, match="ttl_seconds"):
            store_of(redis_client, ttl=0)


class TestOwned:
    """The blocks of stored users: one hash each, which expires and is erased as a whole."""

    def chain(self, blocks: int, user_key: bytes, seed: int = 0) -> list[bytes]:
        tokens = np.random.default_rng(seed).integers(0, 1000, size=blocks * LAYOUT.block_tokens)
        return block_keys(b"test", tokens, LAYOUT.block_tokens, user_key)

    async def test_what_is_put_is_got_and_only_by_its_owner(self, store: RedisKvStore) -> None:
        mine, yours = self.chain(5, b"me------"), self.chain(5, b"you-----")
        await store.put(content(mine))
        assert_run(await store.get_chain(mine), mine)
        assert await store.get_chain(yours) == []
        assert await store.get_chain(chain(5)) == []

    async def test_a_user_is_one_entry_that_expires_after_its_first_write(
        self, store: RedisKvStore, redis_client: Redis
    ) -> None:
        """Were it prolonged by each write, what an active user's windows leave behind would never go."""
        await store.put(content(self.chain(3, b"me------")))
        (name,) = await redis_client.keys()
        assert 0 < await redis_client.ttl(name) <= 60
        await redis_client.expire(name, 7)
        await store.put(content(self.chain(3, b"me------", seed=1)))
        assert await redis_client.keys() == [name]
        assert 0 < await redis_client.ttl(name) <= 7
        assert await redis_client.hlen(name) == 6

    async def test_forgetting_erases_one_user(self, store: RedisKvStore) -> None:
        mine, yours = self.chain(3, b"me------"), self.chain(3, b"you-----")
        for keys in (mine, yours, chain(3)):
            await store.put(content(keys))
        await store.erase({b"me------"})
        assert await store.get_chain(mine) == []
        assert_run(await store.get_chain(yours), yours)
        assert_run(await store.get_chain(chain(3)), chain(3))

    async def test_erasure_asks_redis_despite_the_open_circuit_and_raises_its_errors(
        self, store: RedisKvStore, redis_client: Redis, redis_server: LocalRedis
    ) -> None:
        """A skipped erasure would not be tried again, and the user's blocks would stay for a day."""
        keys = self.chain(3, b"me------")
        await store.put(content(keys))
        await redis_client.rename(user_blocks_name(b"me------"), "aside")
        await redis_client.set(user_blocks_name(b"me------"), "something")
        resting = store_of(redis_client, clock=Clock())
        assert await resting.get_chain(keys) == []
        assert resting.statistics.failures == 1
        await redis_client.rename("aside", user_blocks_name(b"me------"))
        await resting.erase({b"me------"})
        assert await redis_client.exists(user_blocks_name(b"me------")) == 0
        assert resting.statistics.skipped == 0
        await asyncio.to_thread(redis_server.kill)
        with pytest.raises((RedisError, OSError)):
            await resting.erase({b"me------"})

    async def test_a_user_has_an_expiry_from_the_first_byte_on(
        self, store: RedisKvStore, redis_client: Redis, redis_server: LocalRedis
    ) -> None:
        """In one command, so no cut can come between; a hash that lost its own gets one with the next write."""
        await store.put(content(self.chain(3, b"me------")))
        commands = await redis_client.info("commandstats")
        assert commands["cmdstat_eval"]["calls"] == 1
        await redis_client.persist(user_blocks_name(b"me------"))
        await store.put(content(self.chain(3, b"me------", seed=1)))
        assert 0 < await redis_client.ttl(user_blocks_name(b"me------")) <= 60

    async def test_a_user_holds_so_many_blocks_at_most(self, redis_client: Redis) -> None:
        """A prompt that is written stays whole while blocks are evicted, however many pipelines it takes."""
        layout = KvLayout(layers=4, kv_heads=4, head_dim=64, dtype="float32", block_tokens=16)
        patience = LIVENESS_SECONDS
        store = RedisKvStore(redis_client, layout, 60, patience, user_blocks=18, write_timeout_seconds=patience)
        lengths = []
        for seed in range(6):
            keys = self.chain(8, b"me------", seed)
            await store.put({key: np.zeros(layout.block_shape, dtype=np.float32) for key in keys})
            assert len(await store.get_chain(keys)) == 8
            lengths.append(await redis_client.hlen(user_blocks_name(b"me------")))
        assert lengths == [8, 16, 24, 8, 16, 24]
        assert 8 * layout.block_bytes > 2**19

    async def test_the_templates_words_are_nobodys(self, store: RedisKvStore, redis_client: Redis) -> None:
        """One prompt's blocks are in two places, and are found as one run."""
        tokens = np.arange(5 * LAYOUT.block_tokens)
        mine = block_keys(b"test", tokens, LAYOUT.block_tokens, b"me------", template_tokens=2 * LAYOUT.block_tokens)
        await store.put(content(mine))
        assert_run(await store.get_chain(mine), mine)
        assert_run(await store.get_chain(mine[1:3]), mine[1:3])
        await store.erase({b"me------"})
        assert_run(await store.get_chain(mine), mine[:2])

    async def test_damaged_fields_and_entries_of_another_type_are_misses(
        self, store: RedisKvStore, redis_client: Redis
    ) -> None:
        keys = self.chain(3, b"me------")
        await store.put(content(keys))
        (name,) = await redis_client.keys()
        await redis_client.hset(name, keys[1], b"garbage")
        assert_run(await store.get_chain(keys), keys[:1])
        await redis_client.set(name, "something")
        assert await store.get_chain(keys) == []

    async def test_a_long_prompt_is_written_in_parts_and_whole(self, redis_client: Redis) -> None:
        """More bytes than one pipeline takes."""
        layout = KvLayout(layers=4, kv_heads=4, head_dim=64, dtype="float32", block_tokens=16)
        store = RedisKvStore(redis_client, layout, 60, LIVENESS_SECONDS, write_timeout_seconds=LIVENESS_SECONDS)
        tokens = np.arange(20 * layout.block_tokens)
        keys = block_keys(b"test", tokens, layout.block_tokens)
        blocks = {key: np.full(layout.block_shape, n, dtype=np.float32) for n, key in enumerate(keys)}
        assert len(blocks) * layout.block_bytes > 4 * 2**19
        await store.put(blocks)
        assert [int(block.flat[0]) for block in await store.get_chain(keys)] == list(range(20))


class TestTiers:
    @pytest.fixture
    async def tiers(self, store: RedisKvStore) -> AsyncIterator[PrefixCache]:
        cache = PrefixCache(LAYOUT, MemoryKvCache(10**7), [store])
        yield cache
        await cache.close()

    async def test_a_second_process_starts_warm(self, tiers: PrefixCache, store: RedisKvStore) -> None:
        keys = chain(4)
        tiers.remember(keys, [block_of(key) for key in keys])
        await tiers.close()
        other = PrefixCache(LAYOUT, MemoryKvCache(10**7), [store])
        found = await other.lookup(keys)
        assert found.tokens_by_tier == {"memory": 0, "redis": 64}
        assert_run(found.blocks, keys)

    async def test_memory_serves_while_redis_is_dead(
        self, tiers: PrefixCache, redis_url: str, redis_server: LocalRedis
    ) -> None:
        redis_server.kill()
        keys = chain(4)
        tiers.remember(keys, [block_of(key) for key in keys])
        found = await tiers.lookup([*keys, *chain(1, seed=9)])
        assert found.tokens_by_tier == {"memory": 64, "redis": 0}
        assert_run(found.blocks, keys)
