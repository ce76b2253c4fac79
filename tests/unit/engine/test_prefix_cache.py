"""The prefix cache over a tier that is a dictionary and is controlled by the test."""

from __future__ import annotations

import asyncio
import unittest.mock
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from atspeed.engine.arrays import KvArray
from atspeed.engine.kv.fetch_policy import FetchPolicy
from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache, block_keys, copy_blocks, user_key_of
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.tier import TierStatistics

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=2, dtype="float32", block_tokens=4)


class FakeStore:
    """A KvTier in a dictionary. `gate` holds writes back until it is set."""

    name = "fake"

    def __init__(self) -> None:
        self.blocks: dict[bytes, KvArray] = {}
        self.reads: list[list[bytes]] = []
        self.writes: list[list[bytes]] = []
        self.erased: list[set[bytes]] = []
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

    async def erase(self, user_keys: Collection[bytes]) -> None:
        self.erased.append(set(user_keys))
        self.blocks = {key: block for key, block in self.blocks.items() if user_key_of(key) not in user_keys}

    @property
    def statistics(self) -> TierStatistics:
        return TierStatistics()

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
    return sum(found.tokens_by_tier.values())


async def test_empty_cache_finds_no_block() -> None:
    found = await PrefixCache(LAYOUT, memory(), [FakeStore()]).lookup(prompt(16)[0])
    assert (found.blocks, found.tokens_by_tier) == ((), {"memory": 0, "fake": 0})


async def test_remembered_blocks_are_in_memory_at_once_and_in_the_tier_soon() -> None:
    cache = PrefixCache(LAYOUT, memory(), [store := FakeStore()])
    keys, blocks = prompt(18)
    cache.remember(keys, blocks)
    found = await cache.lookup(keys)
    assert [id(block) for block in found.blocks] == [id(block) for block in blocks], "copied on the event loop"
    assert found.tokens_by_tier == {"memory": 16, "fake": 0}
    await cache.close()
    assert list(store.blocks) == keys


async def test_lower_tier_continues_the_run_and_its_blocks_move_up() -> None:
    store = FakeStore()
    keys, blocks = prompt(16)
    writer = PrefixCache(LAYOUT, memory(), [store])
    writer.remember(keys, blocks)
    await writer.close()

    tier = memory()
    tier.put_chain(keys[:1], blocks[:1])
    reader = PrefixCache(LAYOUT, tier, [store])
    found = await reader.lookup(keys)
    assert store.reads == [keys[1:]]
    assert found.tokens_by_tier == {"memory": 4, "fake": 12}
    assert [id(block) for block in found.blocks] == [id(block) for block in blocks], "copied on the event loop"

    again = await reader.lookup(keys)
    assert again.tokens_by_tier == {"memory": 16, "fake": 0}
    assert len(store.reads) == 1
    tier.check_integrity()


async def test_only_new_blocks_are_written() -> None:
    store = FakeStore()
    cache = PrefixCache(LAYOUT, memory(), [store])
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
    cache = PrefixCache(LAYOUT, memory(), [store], max_pending_writes=2)
    chains = [prompt(8, seed) for seed in range(5)]
    for keys, blocks in chains:
        cache.remember(keys, blocks)
    assert (cache.pending_writes, cache.dropped_writes) == (2, 3)
    assert all([(await cache.lookup(keys)).tokens_by_tier["memory"] == 8 for keys, _ in chains])
    store.gate.set()
    await cache.close()
    assert set(store.blocks) == {*chains[0][0], *chains[1][0]}
    assert cache.pending_writes == 0


async def test_close_cancels_what_does_not_end() -> None:
    store = FakeStore()
    store.gate.clear()
    cache = PrefixCache(LAYOUT, memory(), [store])
    cache.remember(*prompt(8))
    async with asyncio.timeout(30):
        await cache.close(timeout_seconds=0.01)
    assert store.blocks == {}
    assert cache.pending_writes == 0
    cache.remember(*prompt(8, seed=1))
    assert (cache.pending_writes, cache.dropped_writes) == (0, 1)


async def test_a_tier_that_breaks_its_contract_is_logged() -> None:
    class Broken(FakeStore):
        async def put(self, blocks: Mapping[bytes, KvArray]) -> None:
            raise RuntimeError("promise broken")

    cache = PrefixCache(LAYOUT, memory(), [Broken()])
    with capture_logs() as logged:
        cache.remember(*prompt(8))
        await cache.close()
        await asyncio.sleep(0)
    assert [(entry["event"], entry["log_level"]) for entry in logged] == [("kv_write_failed", "error")]
    assert isinstance(logged[0]["exc_info"], RuntimeError)


async def test_cache_works_with_memory_alone() -> None:
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


USER_KEY = b"somebody"


def user_prompt(tokens: int, seed: int = 0, user_key: bytes = USER_KEY) -> tuple[list[bytes], list[KvArray]]:
    """A stored user's prompt."""
    ids = np.random.default_rng(seed).integers(0, 1000, size=64)[:tokens]
    return block_keys(b"n", ids, LAYOUT.block_tokens, user_key), prompt(tokens, seed)[1]


async def test_erased_user_is_in_no_tier_and_others_are() -> None:
    store, clock = FakeStore(), [0.0]
    cache = PrefixCache(LAYOUT, tier := memory(), [store], clock=lambda: clock[0])
    (keys, blocks), (others, _) = user_prompt(16), user_prompt(16, user_key=b"stranger")
    shared_keys = prompt(16)[0]
    for chain in (keys, others, shared_keys):
        cache.remember(chain, blocks)
    await cache.erase({USER_KEY})
    assert not any(key in tier for key in keys)
    assert not store.blocks.keys() & set(keys)
    assert [(await cache.lookup(chain)).tokens_by_tier["memory"] for chain in (keys, others, shared_keys)] == [
        0,
        16,
        16,
    ]
    assert set(store.blocks) == {*others, *shared_keys}
    tier.check_integrity()

    cache.remember(keys, blocks)
    assert await tokens_of(cache, keys) == 0, "a pass that had begun before brought it back"
    clock[0] = cache.hold_seconds
    cache.remember(keys, blocks)
    assert (await cache.lookup(keys)).tokens_by_tier["memory"] == 16
    await cache.close()


async def test_pending_write_ends_before_the_tier_erases() -> None:
    store = FakeStore()
    store.gate.clear()
    cache = PrefixCache(LAYOUT, memory(), [store])
    cache.remember(*user_prompt(16))
    forgetting = asyncio.create_task(cache.erase({USER_KEY}))
    await asyncio.sleep(0)
    store.gate.set()
    await forgetting
    assert store.blocks == {}
    await cache.close()


async def test_blocks_read_during_an_erasure_are_not_kept() -> None:
    """It was read before the user was erased, and arrives afterwards."""

    class Late(FakeStore):
        async def get_chain(self, keys: Sequence[bytes]) -> list[KvArray]:
            found = await super().get_chain(keys)
            await cache.erase({USER_KEY})
            return found

    store = Late()
    keys, blocks = user_prompt(16)
    store.blocks = dict(zip(keys, blocks, strict=True))
    cache = PrefixCache(LAYOUT, tier := memory(), [store])
    assert (await cache.lookup(keys)).tokens_by_tier["fake"] == 16
    assert len(tier) == 0
    await cache.close()


async def test_user_blocks_are_not_kept_while_not_accepted() -> None:
    cache = PrefixCache(LAYOUT, tier := memory())
    keys, blocks = user_prompt(16)
    shared_keys = prompt(16)[0]
    cache.remember(keys, blocks)
    cache.remember(shared_keys, blocks)
    cache.accepts_user_blocks = False
    assert [key in tier for key in (*keys, *shared_keys)] == [False] * 4 + [True] * 4
    cache.remember(keys, blocks)
    assert await tokens_of(cache, keys) == 0
    cache.accepts_user_blocks = True
    cache.remember(keys, blocks)
    assert await tokens_of(cache, keys) == 16


async def test_fetch_policy_decides_reads_and_writes_of_a_tier() -> None:
    store = FakeStore()
    worth = [False]
    fetching = FetchPolicy(lambda missing, cached: 1e12 if worth[0] else 0.0)
    cache = PrefixCache(LAYOUT, memory(0), [store], fetch_policies={FakeStore.name: fetching})
    keys, blocks = prompt(16)
    cache.remember(keys, blocks)
    assert (await tokens_of(cache, keys), store.reads, store.writes) == (0, [], [])
    worth[0] = True
    cache.remember(keys, blocks)
    await cache.close()
    assert (await cache.lookup(keys)).tokens_by_tier["fake"] == 16
    assert (fetching.statistics.asked, fetching.statistics.hits, fetching.statistics.not_worth) == (1, 1, 1)
    assert fetching.statistics.writes_not_worth == 1


async def test_many_users_are_erased_in_one_step() -> None:
    """A look through memory and a command to the store for each would hold requests up."""
    cache = PrefixCache(LAYOUT, tier := memory(), [store := FakeStore()])
    user_keys = [b"user%04d" % number for number in range(50)]
    for user_key in user_keys:
        cache.remember(*user_prompt(8, user_key=user_key))
    with unittest.mock.patch.object(tier, "drop", wraps=tier.drop) as drop:
        await cache.erase(set(user_keys[:40]))
    assert drop.call_count == 1
    assert len(tier) == 20
    assert store.erased == [set(user_keys[:40])]
    await cache.close()


async def test_erasure_waits_only_for_writes_of_its_users() -> None:
    store = FakeStore()
    store.gate.clear()
    cache = PrefixCache(LAYOUT, memory(), [store])
    cache.remember(*user_prompt(8, user_key=b"stranger"))
    async with asyncio.timeout(30):
        await cache.erase({USER_KEY})
    assert cache.pending_writes == 1
    store.gate.set()
    await cache.close()


async def test_shared_prefix_of_an_erased_user_is_kept() -> None:
    """Blocks that contain nothing of a user belong to the shared prefix, in all tiers, at all times."""
    store = FakeStore()
    cache = PrefixCache(LAYOUT, tier := memory(), [store])
    ids = np.arange(16)
    mine, yours = (
        block_keys(b"n", ids, LAYOUT.block_tokens, user_key, template_tokens=9) for user_key in (USER_KEY, b"stranger")
    )
    blocks = prompt(16)[1]
    assert mine[:2] == yours[:2] == block_keys(b"n", ids, LAYOUT.block_tokens)[:2]
    await cache.erase({USER_KEY})
    cache.remember(mine, blocks)
    assert [key in tier for key in mine] == [True, True, False, False]
    assert await tokens_of(cache, yours) == 8
    cache.remember(yours, blocks[2:])
    assert await tokens_of(cache, yours) == 16
    await cache.close()
    assert store.writes == [mine[:2], yours[2:]]
    # The tier has all blocks of a user who may not be kept: the answer is complete, memory keeps the shared prefix.
    store.blocks |= dict(zip(mine, blocks, strict=True))
    late = PrefixCache(LAYOUT, other := memory(), [store])
    late.accepts_user_blocks = False
    found = await late.lookup(mine)
    assert (found.tokens_by_tier, len(found.blocks)) == ({"memory": 0, "fake": 16}, 4)
    assert [key in other for key in mine] == [True, True, False, False]


async def test_tiers_are_read_in_order_and_all_are_written_and_erased() -> None:
    """A further tier needs an entry in the list, and nothing else."""

    class Slower(FakeStore):
        name = "slower"

    keys, blocks = user_prompt(16)
    near, far = FakeStore(), Slower()
    near.blocks = dict(zip(keys[1:2], blocks[1:2], strict=True))
    far.blocks = dict(zip(keys, blocks, strict=True))
    cache = PrefixCache(LAYOUT, tier := memory(), [near, far])
    cache.remember(keys[:1], blocks[:1])
    found = await cache.lookup(keys)
    assert found.tokens_by_tier == {"memory": 4, "fake": 4, "slower": 8}
    assert (near.reads, far.reads) == ([keys[1:]], [keys[2:]])
    assert [id(block) for block in found.blocks] == [id(block) for block in blocks]
    assert all(key in tier for key in keys)
    await cache.erase({USER_KEY})
    assert (near.blocks, far.blocks, len(tier)) == ({}, {}, 0)
    await cache.close()
    assert near.writes == far.writes == [keys[:1]]
