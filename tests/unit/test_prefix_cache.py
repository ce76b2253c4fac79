"""The two tiers as one, over a store that is a dictionary and obeys the test."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv_cache import KvArray, KvLayout, MemoryKvCache, block_keys
from engine.kv_store import PrefixCache

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=2, dtype="float32", block_tokens=4)


class FakeStore:
    """A KvStore in a dictionary. `gate` holds writes back until it is set."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, KvArray] = {}
        self.reads: list[list[bytes]] = []
        self.writes: list[list[bytes]] = []
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


def prompt(tokens: int, seed: int = 0) -> tuple[list[bytes], KvArray]:
    """The block keys of a prompt and its KV [layers, 2, tokens, kv_heads, head_dim]. A seed's prompts share prefixes."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 1000, size=64)[:tokens]
    shape = (LAYOUT.layers, 2, tokens, LAYOUT.kv_heads, LAYOUT.head_dim)
    base = ids[None, None, :, None, None].astype(np.float32)
    return block_keys(b"n", ids, LAYOUT.block_tokens), np.broadcast_to(base, shape)


def joined(blocks: Sequence[KvArray]) -> KvArray:
    return np.concatenate(blocks, axis=2)


def memory(blocks: int = 100) -> MemoryKvCache:
    return MemoryKvCache(blocks * LAYOUT.block_bytes)


async def test_an_empty_cache_finds_nothing() -> None:
    found = await PrefixCache(LAYOUT, memory(), FakeStore()).lookup(prompt(16)[0])
    assert (found.blocks, found.tokens) == ((), 0)


async def test_what_is_remembered_is_in_memory_at_once_and_in_the_store_soon() -> None:
    cache = PrefixCache(LAYOUT, memory(), store := FakeStore())
    keys, kv = prompt(18)
    cache.remember(keys, kv, already=0)
    found = await cache.lookup(keys)
    assert np.array_equal(joined(found.blocks), kv[:, :, :16])
    assert (found.memory_tokens, found.redis_tokens) == (16, 0)
    await cache.close()
    assert list(store.blocks) == keys


async def test_the_store_answers_where_memory_ends_and_its_blocks_move_up() -> None:
    store = FakeStore()
    keys, kv = prompt(16)
    writer = PrefixCache(LAYOUT, memory(), store)
    writer.remember(keys, kv, already=0)
    await writer.close()

    tier = memory()
    tier.put(keys[0], kv[:, :, :4])
    reader = PrefixCache(LAYOUT, tier, store)
    found = await reader.lookup(keys)
    assert store.reads == [keys[1:]]
    assert (found.memory_tokens, found.redis_tokens) == (4, 12)
    assert np.array_equal(joined(found.blocks), kv)
    assert not any(block.flags.writeable for block in found.blocks)

    again = await reader.lookup(keys)
    assert (again.memory_tokens, again.redis_tokens) == (16, 0)
    assert len(store.reads) == 1
    tier.check_integrity()


async def test_only_new_blocks_are_written() -> None:
    store = FakeStore()
    cache = PrefixCache(LAYOUT, memory(), store)
    keys, kv = prompt(8)
    cache.remember(keys, kv, already=0)
    longer, kv = prompt(16)
    found = await cache.lookup(longer)
    cache.remember(longer, kv, already=len(found.blocks))
    cache.remember(longer, kv, already=len(found.blocks))
    await cache.close()
    assert store.writes == [keys, longer[2:]]


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 8))
async def test_a_chain_longer_than_memory_keeps_its_head(already: int, new: int, room: int) -> None:
    """Dropping the head would make the rest unreachable, and a prompt larger than the tier would never hit it."""
    tier = memory(room)
    cache = PrefixCache(LAYOUT, tier)
    keys, kv = prompt(4 * (already + new))
    cache.remember(keys[:already], kv, already=0)
    found = await cache.lookup(keys)
    cache.remember(keys, kv, already=len(found.blocks))
    tier.check_integrity()
    assert len((await cache.lookup(keys)).blocks) == min(len(keys), room)


async def test_later_changes_of_the_callers_array_do_not_reach_the_cache() -> None:
    """The evaluator goes on writing into the same buffer."""
    cache = PrefixCache(LAYOUT, memory(), store := FakeStore())
    keys, kv = prompt(8)
    buffer = kv.copy()
    cache.remember(keys, buffer, already=0)
    buffer[:] = -1
    await cache.close()
    assert np.array_equal(joined((await cache.lookup(keys)).blocks), kv)
    assert np.array_equal(joined(list(store.blocks.values())), kv)


async def test_writes_beyond_the_bound_are_dropped_not_queued() -> None:
    store = FakeStore()
    store.gate.clear()
    cache = PrefixCache(LAYOUT, memory(), store, max_pending_writes=2)
    chains = [prompt(8, seed) for seed in range(5)]
    for keys, kv in chains:
        cache.remember(keys, kv, already=0)
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
    cache.remember(*prompt(8), already=0)
    async with asyncio.timeout(30):
        await cache.close(timeout_seconds=0.01)
    assert store.blocks == {}
    assert cache.pending_writes == 0
    cache.remember(*prompt(8, seed=1), already=0)
    assert (cache.pending_writes, cache.dropped_writes) == (0, 1)


async def test_a_store_that_breaks_its_promise_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeStore):
        async def put(self, blocks: Mapping[bytes, KvArray]) -> None:
            raise RuntimeError("promise broken")

    cache = PrefixCache(LAYOUT, memory(), Broken())
    with caplog.at_level(logging.ERROR):
        cache.remember(*prompt(8), already=0)
        await cache.close()
        await asyncio.sleep(0)
    assert "KV write failed" in caplog.text


async def test_works_without_a_store() -> None:
    cache = PrefixCache(LAYOUT, memory())
    keys, kv = prompt(8)
    cache.remember(keys, kv, already=0)
    assert (await cache.lookup(keys)).tokens == 8
    await cache.close()


async def test_refuses_what_cannot_be() -> None:
    cache = PrefixCache(LAYOUT, memory())
    keys, kv = prompt(8)
    with pytest.raises(ValueError, match="3 of 2"):
        cache.remember(keys, kv, already=3)
    with pytest.raises(ValueError, match="layout wants"):
        cache.remember(keys, kv[:, :, :7], already=0)
