"""Decision to read Redis: measured reads against recomputing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.kv.fetch_cost import FetchCost, FetchPolicy, FetchStatistics

MS = 1_000_000
BYTES = 10_000  # of a token


def policy(ns_per_token: float) -> FetchPolicy:
    return FetchPolicy(BYTES, lambda missing, cached: missing * ns_per_token)


def read(policy: FetchPolicy, *, times: int, latency_ns: float, ns_per_byte: float = 1.0, found: int = 80) -> None:
    """Observe reads of 80 tokens that take so long."""
    for _ in range(times):
        policy.observe(80, found, latency_ns + found * BYTES * ns_per_byte)


class TestCost:
    @given(
        st.floats(1e4, 1e8),
        st.floats(0, 100),
        st.lists(st.integers(0, 4_000_000), min_size=2, max_size=12, unique=True).filter(lambda x: max(x) > 1_000_000),
    )
    def test_cost_after_reads_on_a_line_predicts_the_line(
        self, latency: float, per_byte: float, sizes: list[int]
    ) -> None:
        """A few hundred reads outweigh the prior."""
        cost = FetchCost()
        for size in sizes * 200:
            cost.observe(size, size, latency + per_byte * size)
        for size in sizes:
            assert cost.predict(size) == pytest.approx(latency + per_byte * size, rel=0.3, abs=5e5)

    @given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 1e12)), max_size=50), st.integers(0, 10**9))
    def test_cost_after_any_reads_grows_with_the_size(self, reads: list[tuple[int, float]], size: int) -> None:
        cost = FetchCost()
        for found, ns in reads:
            cost.observe(max(found, 1), found, ns)
        assert 0 <= cost.predict(size) <= cost.predict(2 * size) < np.inf
        assert 0 <= cost.hit_share <= 1

    def test_cost_limits_the_effect_of_one_slow_read(self) -> None:
        cost = FetchCost()
        for _ in range(50):
            cost.observe(100_000, 100_000, 1 * MS)
        cost.observe(100_000, 100_000, 1_000 * MS)
        assert cost.predict(100_000) < 2 * MS


class TestPolicy:
    def test_policy_reads_redis_where_that_is_faster(self) -> None:
        """80 tokens: 0.8 MB, 2.8 ms to read; 8 ms to compute on a large model, 0.8 on a small one."""
        large, small = policy(0.1 * MS), policy(0.01 * MS)
        for one in (large, small):
            read(one, times=100, latency_ns=2 * MS)
        assert large.should_read(80, 0)
        assert not small.should_read(80, 0)
        assert large.should_write(80)
        assert not small.should_write(80)

    def test_policy_skips_redis_for_a_short_tail(self) -> None:
        """A returning user has one new item: memory holds the rest, and no service has written the new one yet."""
        large = policy(0.1 * MS)
        read(large, times=100, latency_ns=2 * MS)
        assert not large.should_read(4, 80)

    def test_policy_skips_redis_if_reads_find_nothing(self) -> None:
        """All users are new: a read costs its latency and finds nothing."""
        large = policy(0.1 * MS)
        read(large, times=200, latency_ns=2 * MS, found=0)
        assert not large.should_read(80, 0)
        assert large.should_write(80), "a prompt that is not written is never found"

    def test_policy_after_a_slow_time_reads_again(self) -> None:
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

    def test_policy_counts_every_decision(self) -> None:
        small = policy(0.01 * MS)
        read(small, times=3, latency_ns=2 * MS)
        read(small, times=100, latency_ns=2 * MS, found=0)
        answers = [small.should_read(80, 0) for _ in range(16)]
        assert not small.should_write(80)
        assert answers == [False] * 15 + [True]
        assert small.statistics == FetchStatistics(asked=1, hits=3, explored=1, not_worth=15, writes_not_worth=1)

    def test_policy_without_a_cost_of_recomputing_always_reads(self) -> None:
        always = FetchPolicy(BYTES)
        read(always, times=100, latency_ns=1_000 * MS, found=0)
        assert always.should_read(1, 0)
        assert always.should_write(1)
