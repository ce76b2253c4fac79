"""The memory of open trees: never more than the limit, never a buffer in two hands, and all of it free in the end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.arrays import KvArray
from atspeed.engine.errors import OverloadedError
from atspeed.engine.kv.buffer_pool import BufferPool, capacity_for

TOKEN_BYTES = 8


def make(tokens: int) -> KvArray:
    return np.zeros((1, 2, tokens, 1, 1), dtype=np.float32)


@given(st.integers(1, 100_000))
def test_a_capacity_is_enough_and_at_most_half_too_much(tokens: int) -> None:
    capacity = capacity_for(tokens)
    assert tokens <= capacity < max(65, 1.5 * tokens)
    assert capacity_for(capacity) == capacity


@given(st.lists(st.tuples(st.sampled_from(["open", "grow", "take", "end"]), st.integers(1, 300), st.integers(0, 9))))
def test_held_and_idle_memory_stay_within_the_limit(steps: list[tuple[str, int, int]]) -> None:
    """Trees that reserve, take and end in any order. New ones leave an eighth to those that grow, unless nothing else is open."""
    made: list[KvArray] = []

    def counted(tokens: int) -> KvArray:
        made.append(make(tokens))
        return made[-1]

    pool = BufferPool(counted, limit_bytes=1000 * TOKEN_BYTES)
    made.clear()
    reserved: list[int] = []
    held: list[KvArray] = []
    for action, tokens, which in steps:
        if action in {"open", "grow"}:
            capacity, growing = capacity_for(tokens), action == "grow"
            others = sum(reserved) + sum(kv.shape[2] for kv in held)
            if others + capacity <= (1000 if growing or not others else 875):
                pool.reserve(capacity, growing=growing)
                reserved.append(capacity)
            else:
                with pytest.raises(OverloadedError, match="kv_open_mb"):
                    pool.reserve(capacity, growing=growing)
        elif action == "take" and reserved:
            taken = pool.take(reserved.pop(which % len(reserved)))
            assert not any(taken is other for other in held)
            held.append(taken)
        elif action == "end" and held:
            pool.give_back(held.pop(which % len(held)))
        assert pool.used_bytes == TOKEN_BYTES * (sum(reserved) + sum(kv.shape[2] for kv in held))
        assert sum(kv.nbytes for kv in held) + pool.idle_bytes <= pool.limit_bytes
    for capacity in reserved:
        pool.cancel(capacity)
    for kv in held:
        pool.give_back(kv)
    assert pool.used_bytes == 0


def test_a_buffer_that_came_back_is_used_again_and_makes_way_for_others() -> None:
    pool = BufferPool(make, limit_bytes=300 * TOKEN_BYTES)
    pool.reserve(128)
    first = pool.take(128)
    pool.give_back(first)
    pool.reserve(128)
    assert pool.take(128) is first
    pool.give_back(first)
    assert pool.idle_bytes == 128 * TOKEN_BYTES
    pool.reserve(192)
    assert pool.take(192).shape[2] == 192
    assert pool.idle_bytes == 0
