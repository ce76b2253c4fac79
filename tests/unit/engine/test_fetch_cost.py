"""When Redis is worth asking: what reads have shown, against what computing takes; and how the estimate recovers."""

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
    """Reads of 80 tokens that take so long."""
    for _ in range(times):
        policy.observe(80, found, latency_ns + found * BYTES * ns_per_byte)


class TestCost:
    @given(
        st.floats(1e4, 1e8),
        st.floats(0, 100),
        st.lists(st.integers(0, 4_000_000), min_size=2, max_size=12, unique=True).filter(lambda x: max(x) > 1_000_000),
    )
    def test_reads_on_a_line_are_found_out(self, latency: float, per_byte: float, sizes: list[int]) -> None:
        """From whatever was believed before: the prior has faded after some hundred reads."""
        cost = FetchCost()
        for size in sizes * 200:
            cost.observe(size, size, latency + per_byte * size)
        for size in sizes:
            assert cost.predict(size) == pytest.approx(latency + per_byte * size, rel=0.3, abs=5e5)

    @given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 1e12)), max_size=50), st.integers(0, 10**9))
    def test_whatever_was_read_the_prediction_is_a_time_that_grows(
        self, reads: list[tuple[int, float]], size: int
    ) -> None:
        cost = FetchCost()
        for found, ns in reads:
            cost.observe(max(found, 1), found, ns)
        assert 0 <= cost.predict(size) <= cost.predict(2 * size) < np.inf
        assert 0 <= cost.found <= 1

    def test_one_read_that_was_held_up_does_not_count_for_what_it_took(self) -> None:
        cost = FetchCost()
        for _ in range(50):
            cost.observe(100_000, 100_000, 1 * MS)
        cost.observe(100_000, 100_000, 1_000 * MS)
        assert cost.predict(100_000) < 2 * MS


class TestPolicy:
    def test_redis_is_read_where_that_is_quicker(self) -> None:
        """80 tokens: 0.8 MB, 2.8 ms to read; 8 ms to compute on a large model, 0.8 on a small one."""
        large, small = policy(0.1 * MS), policy(0.01 * MS)
        for one in (large, small):
            read(one, times=100, latency_ns=2 * MS)
        assert large.wants_read(80, 0)
        assert not small.wants_read(80, 0)
        assert large.wants_write(80)
        assert not small.wants_write(80)

    def test_a_short_tail_is_not_worth_the_way(self) -> None:
        """The item that a returning user has new: memory has all the rest, and nobody has written it yet."""
        large = policy(0.1 * MS)
        read(large, times=100, latency_ns=2 * MS)
        assert not large.wants_read(4, 80)

    def test_where_nothing_is_ever_found_it_is_not_read(self) -> None:
        """New users only: each read would cost its latency for nothing."""
        large = policy(0.1 * MS)
        read(large, times=200, latency_ns=2 * MS, found=0)
        assert not large.wants_read(80, 0)
        assert large.wants_write(80), "what nobody writes is never found"

    def test_it_recovers_from_a_bad_time(self) -> None:
        """A slow Redis is asked now and then, and is used again as soon as it is quick again."""
        large = policy(0.1 * MS)
        read(large, times=100, latency_ns=2 * MS)
        read(large, times=100, latency_ns=40 * MS)
        decisions = [large.wants_read(80, 0) for _ in range(64)]
        assert sum(decisions) == 4
        asked = 0
        while not all(large.wants_read(80, 0) for _ in range(2)):
            read(large, times=1, latency_ns=2 * MS)
            asked += 1
            assert asked < 200
        statistics = large.statistics
        assert statistics.explored >= 4
        assert statistics.not_worth >= 60

    def test_everything_is_counted(self) -> None:
        small = policy(0.01 * MS)
        read(small, times=3, latency_ns=2 * MS)
        read(small, times=100, latency_ns=2 * MS, found=0)
        answers = [small.wants_read(80, 0) for _ in range(16)]
        assert not small.wants_write(80)
        assert answers == [False] * 15 + [True]
        assert small.statistics == FetchStatistics(asked=1, hits=3, explored=1, not_worth=15, writes_not_worth=1)

    def test_without_a_cost_of_computing_it_is_always_read(self) -> None:
        always = FetchPolicy(BYTES)
        read(always, times=100, latency_ns=1_000 * MS, found=0)
        assert always.wants_read(1, 0)
        assert always.wants_write(1)
