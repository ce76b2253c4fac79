"""Prefix KV to put into Redis: chains of blocks whose content their keys determine."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from redis.asyncio import Redis

from atspeed.engine.arrays import KvArray
from atspeed.engine.kv.memory_cache import KvLayout, block_keys
from atspeed.engine.kv.redis_store import RedisKvStore

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=16, dtype="float32", block_tokens=16)
# For what must end at all, on however slow a machine.
LIVENESS_SECONDS = 60.0


class Clock:
    """Clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def chain(blocks: int, seed: int = 0) -> list[bytes]:
    tokens = np.random.default_rng(seed).integers(0, 1000, size=blocks * LAYOUT.block_tokens)
    return block_keys(b"test", tokens, LAYOUT.block_tokens)


def block_of(key: bytes) -> KvArray:
    """The one right content of a key."""
    return np.random.default_rng(list(key)).random(LAYOUT.block_shape, dtype=np.float32)


def content(keys: Sequence[bytes]) -> dict[bytes, KvArray]:
    return {key: block_of(key) for key in keys}


def assert_run(blocks: Sequence[KvArray], keys: Sequence[bytes]) -> None:
    for block, key in zip(blocks, keys, strict=True):
        assert np.array_equal(block, block_of(key))


def store_of(client: Redis, *, timeout: float = 5.0, ttl: int = 60, clock: Clock | None = None) -> RedisKvStore:
    return RedisKvStore(client, LAYOUT, ttl, timeout, write_timeout_seconds=timeout, clock=clock or time.monotonic)
