"""Predicted latency of calls, checked on calls of known latency."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from atspeed.engine.ewma import Ewma, EwmaRegression
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.speculation.latency_model import OPENS_STREAM, LatencyModel, Pass

CURVE = CostCurve.smoothed([1, 101], [0, 100], np.array([[1e6, 2e6], [3e6, 6e6]]))


def observed(latency: LatencyModel, *, error: float, fixed_ns: int, per_node_ns: int, calls: int = 1_000) -> None:
    rng = np.random.default_rng(0)
    for _ in range(calls):
        one = Pass(new=int(rng.integers(1, 100)), cached=int(rng.integers(0, 100)), nodes=int(rng.integers(1, 100)))
        forward = int(error * float(CURVE.predict(one.new, one.cached)))
        latency.observe(
            [one], PassStats(forward_ns=forward, queue_ns=777), forward + 777 + fixed_ns + per_node_ns * one.nodes
        )


def test_latency_model_before_the_first_call_is_the_curve() -> None:
    latency = LatencyModel(CURVE)
    assert latency.forward_ns([1, 51, 101], 50).tolist() == [1.5e6, 3e6, 4.5e6]
    assert latency.predict([Pass(1, 0, 1), Pass(101, 100, 50)], PassStats()) == 7e6
    assert latency.overhead_ns([0, 10]).tolist() == [0, 0]


@pytest.mark.parametrize("error", [0.3, 1.0, 4.0])
def test_latency_model_after_many_calls_knows_speed_and_overhead(error: float) -> None:
    latency = LatencyModel(CURVE)
    observed(latency, error=error, fixed_ns=200_000, per_node_ns=1_000)
    assert latency.forward_ns([1, 51], 50) == pytest.approx(np.array([1.5e6, 3e6]) * error, rel=1e-3)
    assert latency.predict([Pass(101, 100, 5)], PassStats()) == pytest.approx(6e6 * error, rel=1e-3)
    assert latency.overhead_ns([0, 50]) == pytest.approx([200_000, 250_000], rel=1e-3)


def test_latency_model_after_a_slow_time_forgets_it() -> None:
    latency = LatencyModel(CURVE)
    observed(latency, error=10.0, fixed_ns=0, per_node_ns=0)
    observed(latency, error=1.0, fixed_ns=0, per_node_ns=0)
    assert float(latency.forward_ns(1, 0)) == pytest.approx(1e6, rel=0.01)


def test_latency_model_limits_the_effect_of_an_absurd_reply() -> None:
    latency = LatencyModel(CURVE)
    observed(latency, error=1.0, fixed_ns=0, per_node_ns=0)
    latency.observe([Pass(1, 0, 1)], PassStats(forward_ns=2**62), 2**63)
    assert float(latency.forward_ns(1, 0)) < 1.02e6
    assert float(latency.overhead_ns(1)) < 10_000


def test_latency_model_limits_the_effect_of_the_first_reply() -> None:
    """The first reply may come over a connection that is still opening."""
    latency = LatencyModel(CURVE)
    latency.observe([Pass(1, 0, 1)], PassStats(forward_ns=int(50e6)), int(900e6))
    assert float(latency.forward_ns(1, 0)) < 1.5e6
    assert float(latency.overhead_ns(1)) < 1e6


def test_latency_model_does_not_take_co_batched_tokens_for_slowness() -> None:
    """Four requests share a pass: it takes the time of all their tokens, and each of them waits for all of it."""
    latency = LatencyModel(CURVE)
    for _ in range(1_000):
        forward = int(float(CURVE.predict(80, 0)))
        cost = PassStats(forward_ns=forward, new_tokens=20, batch_requests=4, batch_tokens=80)
        assert latency.predict([Pass(20, 0, 19)], cost) == pytest.approx(forward, rel=1e-6)
        latency.observe([Pass(20, 0, 19)], cost, forward)
    assert float(latency.forward_ns(20, 0)) == pytest.approx(float(CURVE.predict(80, 0)), rel=1e-3)


def test_queue_is_learned_per_pass_and_decays_without_calls() -> None:
    """A queue of 300 ms a pass is known after a few calls. In a call it counts for at most one pass."""
    latency = LatencyModel(CURVE)
    assert latency.queue_ns == 0
    for _ in range(12):
        cost = PassStats(forward_ns=int(2e6), queue_ns=int(600e6))
        latency.observe([Pass(1, 0, 1), Pass(1, 0, 1)], cost, int(602e6))
    assert latency.queue_ns == pytest.approx(300e6)
    assert float(latency.call_ns(1, 0, 1)) == pytest.approx(2e6, rel=0.01)
    for _ in range(2_000):
        latency.decay_queue()
    assert latency.queue_ns < 0.1e6


def test_queue_after_timeouts_covers_the_wait() -> None:
    latency = LatencyModel(CURVE)
    latency.observe_timeout(passes=2, expected_ns=4e6, waited_ns=3e6)
    assert latency.queue_ns == 0
    for _ in range(10):
        latency.observe_timeout(passes=2, expected_ns=4e6 + 2 * latency.queue_ns, waited_ns=100e6)
    assert 2 * latency.queue_ns == pytest.approx(96e6, rel=0.05)


def test_overhead_of_opening_a_stream_is_not_taken_for_a_cost_per_node() -> None:
    """First passes have the most nodes; opening a stream takes 3 ms more, whatever they hold. All wait for 2 ms."""
    latency, rng = LatencyModel(CURVE), np.random.default_rng(0)
    for turn in range(1_000):
        opens = turn % 2 == 0
        nodes = int(rng.integers(80, 120)) if opens else int(rng.integers(5, 20))
        wait = int(3e6) + 1_000 * nodes + (int(3e6) if opens else 0)
        cost = PassStats(forward_ns=int(1e6), queue_ns=int(2e6), lookup_ns=int(2.5e6) if opens else 0)
        latency.observe([Pass(1, 0, nodes, call=OPENS_STREAM if opens else 0)], cost, wait)
    assert latency.overhead_ns([0, 100]) == pytest.approx([0, 100_000], rel=0.05, abs=3_000)
    assert latency.overhead_ns([0, 100], call=OPENS_STREAM) == pytest.approx([3e6, 3.1e6], rel=0.01)
    assert latency.queue_ns == pytest.approx(2e6)


@pytest.mark.parametrize("opens", [True, False])
def test_model_is_saturated_while_passes_wait_longer_than_one_takes(opens: bool) -> None:
    """A pass takes 3 ms. The kind of pass and the number of co-batched requests make no difference."""
    latency, plain = LatencyModel(CURVE), Pass(51, 50, 50)
    assert not latency.is_saturated(plain)
    for queue_ms, saturated in ((2.8, False), (3.2, True), (2.8, False)):
        for _ in range(100):
            cost = PassStats(
                forward_ns=int(4.5e6), queue_ns=int(queue_ms * 1e6), new_tokens=51, batch_requests=2, batch_tokens=101
            )
            latency.observe([replace(plain, call=OPENS_STREAM if opens else 0)], cost, int(8e6))
        assert latency.is_saturated(plain) is saturated


def test_ewma_starts_at_the_guess_and_forgets() -> None:
    mean = Ewma(9.0, memory=10)
    assert mean.value == 9.0
    for value in (1.0, 3.0):
        mean.add(value)
    assert mean.value == 2.0
    for _ in range(200):
        mean.add(7.0)
    assert mean.value == pytest.approx(7.0, rel=1e-6)


def test_stats_of_passes_add_up() -> None:
    first = PassStats(1, 2, 3, 4, {"memory": 5, "redis": 0}, 6, 7, 8, 1)
    second = PassStats(10, 20, 30, 40, {"redis": 50, "device": 9}, 60, 70, 80, 0)
    both = PassStats(11, 22, 33, 44, {"memory": 5, "redis": 50, "device": 9}, 60, 77, 88, 1)
    assert first + second == both
    assert second + first == both
    assert first + PassStats() == first


def test_ewma_regression_is_level_at_first_and_never_falls() -> None:
    line = EwmaRegression()
    assert float(line.predict(5)) == 0.0
    line.add(10, 4.0)
    assert line.predict([0, 10, 100]).tolist() == [4.0, 4.0, 4.0]
    line.add(20, 2.0)
    assert line.predict([0, 100]).tolist() == [3.0, 3.0]
    steep = EwmaRegression()
    for x in (10, 20):
        steep.add(x, x * x)
    assert (steep.predict([0, 1, 30]) >= 0).all()
    assert [steep.at(x) for x in (0, 1, 30)] == steep.predict([0, 1, 30]).tolist()
