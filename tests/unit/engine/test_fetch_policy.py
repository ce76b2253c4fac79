"""Decision to read Redis: measured reads against recomputing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.kv.fetch_policy import FetchPolicy, FetchStatistics

MS = 1_000_000
BYTES = 10_000  # of a token


def policy(ns_per_token: float) -> FetchPolicy:
    return FetchPolicy(lambda missing, cached: missing * ns_per_token)


def read(policy: FetchPolicy, *, times: int, latency_ns: float, ns_per_byte: float = 1.0, found: int = 80) -> None:
    """Observe reads of 80 tokens that take so long."""
    for _ in range(times):
        policy.observe(80, found, latency_ns + found * BYTES * ns_per_byte)


def test_policy_reads_redis_where_that_is_faster() -> None:
    """80 tokens: 0.8 MB, 2.8 ms to read; 8 ms to compute on a large model, 0.8 on a small one."""
    large, small = policy(0.1 * MS), policy(0.01 * MS)
    for one in (large, small):
        read(one, times=100, latency_ns=2 * MS)
    assert large.should_read(80, 0)
    assert not small.should_read(80, 0)
    assert large.should_write(80)
    assert not small.should_write(80)


def test_policy_skips_redis_for_a_short_tail() -> None:
    """A returning user has one new item: memory holds the rest, and no service has written the new one yet."""
    large = policy(0.1 * MS)
    read(large, times=100, latency_ns=2 * MS)
    assert not large.should_read(4, 80)


def test_policy_skips_redis_if_reads_find_nothing() -> None:
    """All users are new: a read costs its latency and finds nothing."""
    large = policy(0.1 * MS)
    read(large, times=200, latency_ns=2 * MS, found=0)
    assert not large.should_read(80, 0)
    assert large.should_write(80), "a prompt that is not written is never found"


def test_policy_after_a_slow_time_reads_again() -> None:
    """A slow Redis is read now and then, and always again once it is fast."""
    large = policy(0.1 * MS)
    read(large, times=100, latency_ns=2 * MS)
    read(large, times=100, latency_ns=40 * MS)
    decisions = [large.should_read(80, 0) for _ in range(64)]
    assert sum(decisions) == 4
    asked = 0
    while not all(large.should_read(80, 0) for _ in range(2)):
        read(large, times=1, latency_ns=2 * MS)
        asked += 1
        assert asked < 200
    statistics = large.statistics
    assert statistics.explored >= 4
    assert statistics.not_worth >= 60


def test_policy_counts_every_decision() -> None:
    small = policy(0.01 * MS)
    read(small, times=3, latency_ns=2 * MS)
    read(small, times=100, latency_ns=2 * MS, found=0)
    answers = [small.should_read(80, 0) for _ in range(16)]
    assert not small.should_write(80)
    assert answers == [False] * 15 + [True]
    assert small.statistics == FetchStatistics(asked=1, hits=3, explored=1, not_worth=15, writes_not_worth=1)


def test_policy_without_a_cost_of_recomputing_always_reads() -> None:
    always = FetchPolicy()
    read(always, times=100, latency_ns=1_000 * MS, found=0)
    assert always.should_read(1, 0)
    assert always.should_write(1)


def test_policy_limits_the_effect_of_one_slow_read() -> None:
    large = policy(0.1 * MS)
    read(large, times=50, latency_ns=1 * MS)
    read(large, times=1, latency_ns=1_000 * MS)
    assert large.should_read(80, 0)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e12)), max_size=50), st.integers(0, 10**6))
def test_policy_after_any_reads_prefers_longer_ones(reads: list[tuple[int, float]], missing: int) -> None:
    """More missing tokens never make a read less worthwhile, and a read that is free of charge always pays."""
    one, free = policy(0.1 * MS), FetchPolicy(lambda missing, cached: float("inf"))
    for found, ns in reads:
        for each in (one, free):
            each.observe(found + 1, found + 1, ns)
    assert one.should_write(2 * missing) or not one.should_write(missing)
    assert free.should_read(1, 0)
