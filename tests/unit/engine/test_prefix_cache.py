"""The two tiers as one, over a store that is a dictionary and obeys the test."""

from __future__ import annotations

import asyncio
import logging
import unittest.mock
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.arrays import KvArray
from atspeed.engine.kv.fetch_cost import FetchPolicy
from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache, block_keys, copy_blocks, owner_of
from atspeed.engine.kv.prefix_cache import PrefixCache

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=2, dtype="float32", block_tokens=4)


class FakeStore:
    """A KvStore in a dictionary. `gate` holds writes back until it is set."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, KvArray] = {}
        self.reads: list[list[bytes]] = []
        self.writes: list[list[bytes]] = []
        self.forgotten: list[set[bytes]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def get_chain(self, keys: Sequence[bytes]) -> list[KvArray]:
        self.reads.append(list(keys))
        await asyncio.sleep(0)
        run = []
        for key in keys:
            if key not in self.blocks:
                break
            run.append(self.blocks[key])
        return run

    async def put(self, blocks: Mapping[bytes, KvArray]) -> None:
        self.writes.append(list(blocks))
        await self.gate.wait()
        self.blocks.update(blocks)

    async def forget(self, owners: Collection[bytes]) -> None:
        self.forgotten.append(set(owners))
        self.blocks = {key: block for key, block in self.blocks.items() if owner_of(key) not in owners}

    @property
    def failures(self) -> int:
        return 0


def prompt(tokens: int, seed: int = 0) -> tuple[list[bytes], list[KvArray]]:
    """The keys and the contents of a prompt's whole blocks. A seed's prompts share prefixes."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 1000, size=64)[:tokens]
    shape = (LAYOUT.layers, 2, tokens, LAYOUT.kv_heads, LAYOUT.head_dim)
    base = ids[None, None, :, None, None].astype(np.float32)
    keys = block_keys(b"n", ids, LAYOUT.block_tokens)
    return keys, copy_blocks(LAYOUT, np.broadcast_to(base, shape), 0, len(keys))


def memory(blocks: int = 100) -> MemoryKvCache:
    return MemoryKvCache(blocks * LAYOUT.block_bytes)


async def tokens_of(cache: PrefixCache, keys: Sequence[bytes]) -> int:
    """Prompt tokens that a cache has, in whichever tier."""
    found = await cache.lookup(keys)
    return found.memory_tokens + found.redis_tokens


async def test_an_empty_cache_finds_nothing() -> None:
    found = await PrefixCache(LAYOUT, memory(), FakeStore()).lookup(prompt(16)[0])
    assert (found.blocks, found.memory_tokens, found.redis_tokens) == ((), 0, 0)


async def test_what_is_remembered_is_in_memory_at_once_and_in_the_store_soon() -> None:
    cache = PrefixCache(LAYOUT, memory(), store := FakeStore())
    keys, blocks = prompt(18)
    cache.remember(keys, blocks)
    found = await cache.lookup(keys)
    assert [id(block) for block in found.blocks] == [id(block) for block in blocks], "copied on the event loop"
    assert (found.memory_tokens, found.redis_tokens) == (16, 0)
    await cache.close()
    assert list(store.blocks) == keys


async def test_the_store_answers_where_memory_ends_and_its_blocks_move_up() -> None:
    store = FakeStore()
    keys, blocks = prompt(16)
    writer = PrefixCache(LAYOUT, memory(), store)
    writer.remember(keys, blocks)
    await writer.close()

    tier = memory()
    tier.put_chain(keys[:1], blocks[:1])
    reader = PrefixCache(LAYOUT, tier, store)
    found = await reader.lookup(keys)
    assert store.reads == [keys[1:]]
    assert (found.memory_tokens, found.redis_tokens) == (4, 12)
    assert [id(block) for block in found.blocks] == [id(block) for block in blocks], "copied on the event loop"

    again = await reader.lookup(keys)
    assert (again.memory_tokens, again.redis_tokens) == (16, 0)
    assert len(store.reads) == 1
    tier.check_integrity()


async def test_only_new_blocks_are_written() -> None:
    store = FakeStore()
    cache = PrefixCache(LAYOUT, memory(), store)
    keys, blocks = prompt(8)
    cache.remember(keys, blocks)
    longer, blocks = prompt(16)
    found = await cache.lookup(longer)
    cache.remember(longer, blocks[len(found.blocks) :])
    cache.remember(longer, blocks[len(found.blocks) :])
    await cache.close()
    assert store.writes == [keys, longer[2:]]


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 8))
async def test_a_chain_longer_than_memory_keeps_its_head(already: int, new: int, room: int) -> None:
    """Dropping the head would make the rest unreachable, and a prompt larger than the tier would never hit it."""
    tier = memory(room)
    cache = PrefixCache(LAYOUT, tier)
    keys, blocks = prompt(4 * (already + new))
    cache.remember(keys[:already], blocks[:already])
    found = await cache.lookup(keys)
    cache.remember(keys, blocks[len(found.blocks) :])
    tier.check_integrity()
    assert len((await cache.lookup(keys)).blocks) == min(len(keys), room)


async def test_writes_beyond_the_bound_are_dropped_not_queued() -> None:
    store = FakeStore()
    store.gate.clear()
    cache = PrefixCache(LAYOUT, memory(), store, max_pending_writes=2)
    chains = [prompt(8, seed) for seed in range(5)]
    for keys, blocks in chains:
        cache.remember(keys, blocks)
    assert (cache.pending_writes, cache.dropped_writes) == (2, 3)
    assert all([(await cache.lookup(keys)).memory_tokens == 8 for keys, _ in chains])
    store.gate.set()
    await cache.close()
    assert set(store.blocks) == {*chains[0][0], *chains[1][0]}
    assert cache.pending_writes == 0


async def test_close_cancels_what_does_not_end() -> None:
    store = FakeStore()
    store.gate.clear()
    cache = PrefixCache(LAYOUT, memory(), store)
    cache.remember(*prompt(8))
    async with asyncio.timeout(30):
        await cache.close(timeout_seconds=0.01)
    assert store.blocks == {}
    assert cache.pending_writes == 0
    cache.remember(*prompt(8, seed=1))
    assert (cache.pending_writes, cache.dropped_writes) == (0, 1)


async def test_a_store_that_breaks_its_promise_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeStore):
        async def put(self, blocks: Mapping[bytes, KvArray]) -> None:
            raise RuntimeError("promise broken")

    cache = PrefixCache(LAYOUT, memory(), Broken())
    with caplog.at_level(logging.ERROR):
        cache.remember(*prompt(8))
        await cache.close()
        await asyncio.sleep(0)
    assert "KV write failed" in caplog.text


async def test_works_without_a_store() -> None:
    cache = PrefixCache(LAYOUT, memory())
    keys, blocks = prompt(8)
    cache.remember(keys, blocks)
    assert await tokens_of(cache, keys) == 8
    await cache.close()


async def test_refuses_more_blocks_than_keys() -> None:
    cache = PrefixCache(LAYOUT, memory())
    keys, blocks = prompt(8)
    with pytest.raises(ValueError, match="2 blocks for a chain of 1"):
        cache.remember(keys[:1], blocks)


OWNER = b"somebody"


def owned(tokens: int, seed: int = 0, owner: bytes = OWNER) -> tuple[list[bytes], list[KvArray]]:
    """A stored user's prompt."""
    ids = np.random.default_rng(seed).integers(0, 1000, size=64)[:tokens]
    return block_keys(b"n", ids, LAYOUT.block_tokens, owner), prompt(tokens, seed)[1]


async def test_a_forgotten_user_is_in_no_tier_and_others_are() -> None:
    store, clock = FakeStore(), [0.0]
    cache = PrefixCache(LAYOUT, tier := memory(), store, clock=lambda: clock[0])
    (keys, blocks), (others, _) = owned(16), owned(16, owner=b"stranger")
    is_shared_prefix_key = prompt(16)[0]
    for chain in (keys, others, is_shared_prefix_key):
        cache.remember(chain, blocks)
    await cache.forget({OWNER})
    assert not any(key in tier for key in keys)
    assert not store.blocks.keys() & set(keys)
    assert [(await cache.lookup(chain)).memory_tokens for chain in (keys, others, is_shared_prefix_key)] == [0, 16, 16]
    assert set(store.blocks) == {*others, *is_shared_prefix_key}
    tier.check_integrity()

    cache.remember(keys, blocks)
    assert await tokens_of(cache, keys) == 0, "a pass that had begun before brought it back"
    clock[0] = cache.hold_seconds
    cache.remember(keys, blocks)
    assert (await cache.lookup(keys)).memory_tokens == 16
    await cache.close()


async def test_a_write_that_is_under_way_ends_before_the_store_forgets() -> None:
    store = FakeStore()
    store.gate.clear()
    cache = PrefixCache(LAYOUT, memory(), store)
    cache.remember(*owned(16))
    forgetting = asyncio.create_task(cache.forget({OWNER}))
    await asyncio.sleep(0)
    store.gate.set()
    await forgetting
    assert store.blocks == {}
    await cache.close()


async def test_what_is_on_its_way_from_the_store_is_not_kept() -> None:
    """It was read before the user was forgotten, and arrives after it."""

    class Late(FakeStore):
        async def get_chain(self, keys: Sequence[bytes]) -> list[KvArray]:
            found = await super().get_chain(keys)
            await cache.forget({OWNER})
            return found

    store = Late()
    keys, blocks = owned(16)
    store.blocks = dict(zip(keys, blocks, strict=True))
    cache = PrefixCache(LAYOUT, tier := memory(), store)
    assert (await cache.lookup(keys)).redis_tokens == 16
    assert len(tier) == 0
    await cache.close()


async def test_nothing_of_stored_users_is_kept_by_who_cannot_hear_of_their_leaving() -> None:
    cache = PrefixCache(LAYOUT, tier := memory())
    keys, blocks = owned(16)
    is_shared_prefix_key = prompt(16)[0]
    cache.remember(keys, blocks)
    cache.remember(is_shared_prefix_key, blocks)
    cache.accepts_user_blocks = False
    assert [key in tier for key in (*keys, *is_shared_prefix_key)] == [False] * 4 + [True] * 4
    cache.remember(keys, blocks)
    assert await tokens_of(cache, keys) == 0
    cache.accepts_user_blocks = True
    cache.remember(keys, blocks)
    assert await tokens_of(cache, keys) == 16


async def test_the_store_is_asked_and_written_as_the_policy_says() -> None:
    store = FakeStore()
    worth = [False]
    fetching = FetchPolicy(LAYOUT.bytes_per_token, lambda missing, cached: 1e12 if worth[0] else 0.0)
    cache = PrefixCache(LAYOUT, memory(0), store, fetching=fetching)
    keys, blocks = prompt(16)
    cache.remember(keys, blocks)
    assert (await tokens_of(cache, keys), store.reads, store.writes) == (0, [], [])
    worth[0] = True
    cache.remember(keys, blocks)
    await cache.close()
    assert (await cache.lookup(keys)).redis_tokens == 16
    assert (fetching.statistics.asked, fetching.statistics.hits, fetching.statistics.not_worth) == (1, 1, 1)
    assert fetching.statistics.writes_not_worth == 1


async def test_many_are_forgotten_in_one_step() -> None:
    """A look through memory and a command to the store for each would hold requests up."""
    cache = PrefixCache(LAYOUT, tier := memory(), store := FakeStore())
    owners = [b"user%04d" % number for number in range(50)]
    for owner in owners:
        cache.remember(*owned(8, owner=owner))
    with unittest.mock.patch.object(tier, "drop", wraps=tier.drop) as drop:
        await cache.forget(set(owners[:40]))
    assert drop.call_count == 1
    assert len(tier) == 20
    assert store.forgotten == [set(owners[:40])]
    await cache.close()


async def test_only_writes_of_the_forgotten_are_waited_for() -> None:
    store = FakeStore()
    store.gate.clear()
    cache = PrefixCache(LAYOUT, memory(), store)
    cache.remember(*owned(8, owner=b"stranger"))
    async with asyncio.timeout(30):
        await cache.forget({OWNER})
    assert cache.pending_writes == 1
    store.gate.set()
    await cache.close()


async def test_of_who_may_not_be_kept_the_templates_words_are() -> None:
    """They are nobody's: blocks that hold nothing of a user's are common to all, in both tiers, at all times."""
    store = FakeStore()
    cache = PrefixCache(LAYOUT, tier := memory(), store)
    ids = np.arange(16)
    mine, yours = (
        block_keys(b"n", ids, LAYOUT.block_tokens, owner, template_tokens=9) for owner in (OWNER, b"stranger")
    )
    blocks = prompt(16)[1]
    assert mine[:2] == yours[:2] == block_keys(b"n", ids, LAYOUT.block_tokens)[:2]
    await cache.forget({OWNER})
    cache.remember(mine, blocks)
    assert [key in tier for key in mine] == [True, True, False, False]
    assert await tokens_of(cache, yours) == 8
    cache.remember(yours, blocks[2:])
    assert await tokens_of(cache, yours) == 16
    await cache.close()
    assert store.writes == [mine[:2], yours[2:]]
    # The store has all of one that may not be kept: the answer is whole, memory takes what is nobody's.
    store.blocks |= dict(zip(mine, blocks, strict=True))
    late = PrefixCache(LAYOUT, other := memory(), store)
    late.accepts_user_blocks = False
    found = await late.lookup(mine)
    assert (found.memory_tokens, found.redis_tokens, len(found.blocks)) == (0, 16, 4)
    assert [key in other for key in mine] == [True, True, False, False]
