"""What calls cost is what the curve says, corrected by what they took; checked on calls whose costs are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.speculation.ewma import Ewma, EwmaRegression
from atspeed.engine.speculation.latency_model import LatencyModel, Pass

CURVE = CostCurve.smoothed([1, 101], [0, 100], np.array([[1e6, 2e6], [3e6, 6e6]]))


def observed(costs: LatencyModel, *, error: float, fixed_ns: int, per_node_ns: int, calls: int = 1_000) -> None:
    rng = np.random.default_rng(0)
    for _ in range(calls):
        one = Pass(new=int(rng.integers(1, 100)), cached=int(rng.integers(0, 100)), nodes=int(rng.integers(1, 100)))
        forward = int(error * float(CURVE.predict(one.new, one.cached)))
        costs.observe(
            [one], PassStats(forward_ns=forward, queue_ns=777), forward + 777 + fixed_ns + per_node_ns * one.nodes
        )


def test_before_the_first_call_it_is_the_curve() -> None:
    costs = LatencyModel(CURVE)
    assert costs.forward([1, 51, 101], 50).tolist() == [1.5e6, 3e6, 4.5e6]
    assert costs.predict([Pass(1, 0, 1), Pass(101, 100, 50)], PassStats()) == 7e6
    assert costs.besides([0, 10]).tolist() == [0, 0]


@pytest.mark.parametrize("error", [0.3, 1.0, 4.0])
def test_a_slower_machine_and_the_way_to_it_are_noticed(error: float) -> None:
    costs = LatencyModel(CURVE)
    observed(costs, error=error, fixed_ns=200_000, per_node_ns=1_000)
    assert costs.forward([1, 51], 50) == pytest.approx(np.array([1.5e6, 3e6]) * error, rel=1e-3)
    assert costs.predict([Pass(101, 100, 5)], PassStats()) == pytest.approx(6e6 * error, rel=1e-3)
    assert costs.besides([0, 50]) == pytest.approx([200_000, 250_000], rel=1e-3)


def test_it_forgets_how_slow_the_machine_was() -> None:
    costs = LatencyModel(CURVE)
    observed(costs, error=10.0, fixed_ns=0, per_node_ns=0)
    observed(costs, error=1.0, fixed_ns=0, per_node_ns=0)
    assert float(costs.forward(1, 0)) == pytest.approx(1e6, rel=0.01)


def test_one_absurd_answer_does_not_decide() -> None:
    costs = LatencyModel(CURVE)
    observed(costs, error=1.0, fixed_ns=0, per_node_ns=0)
    costs.observe([Pass(1, 0, 1)], PassStats(forward_ns=2**62), 2**63)
    assert float(costs.forward(1, 0)) < 1.02e6
    assert float(costs.besides(1)) < 10_000


def test_the_first_answer_does_not_decide() -> None:
    """It may come over a connection that is only being made, from a model that has not run for a while."""
    costs = LatencyModel(CURVE)
    costs.observe([Pass(1, 0, 1)], PassStats(forward_ns=int(50e6)), int(900e6))
    assert float(costs.forward(1, 0)) < 1.5e6
    assert float(costs.besides(1)) < 1e6


def test_what_others_have_in_a_pass_is_not_taken_for_slowness() -> None:
    """Four requests in a pass: it takes as long as all their tokens do, and so long each of them waits."""
    costs = LatencyModel(CURVE)
    for _ in range(1_000):
        forward = int(float(CURVE.predict(80, 0)))
        cost = PassStats(forward_ns=forward, new_tokens=20, batch_requests=4, batch_tokens=80)
        assert costs.predict([Pass(20, 0, 19)], cost) == pytest.approx(forward, rel=1e-6)
        costs.observe([Pass(20, 0, 19)], cost, forward)
    assert float(costs.forward(20, 0)) == pytest.approx(float(CURVE.predict(80, 0)), rel=1e-3)


def test_waiting_for_the_model_counts_by_the_pass() -> None:
    """A queue of 300 ms a pass is found within a few calls. Of the target it counts for no more than the pass itself."""
    costs = LatencyModel(CURVE)
    assert costs.queue_ns == 0
    for _ in range(12):
        cost = PassStats(forward_ns=int(2e6), queue_ns=int(600e6))
        costs.observe([Pass(1, 0, 1), Pass(1, 0, 1)], cost, int(602e6))
    assert costs.queue_ns == pytest.approx(300e6)
    assert float(costs.call(1, 0, 1)) == pytest.approx(2e6, rel=0.01)
    for _ in range(2_000):
        costs.not_asked()
    assert costs.queue_ns < 0.1e6


def test_a_call_that_was_given_up_took_so_long_at_least() -> None:
    costs = LatencyModel(CURVE)
    costs.late(passes=2, expected_ns=4e6, waited_ns=3e6)
    assert costs.queue_ns == 0
    for _ in range(10):
        costs.late(passes=2, expected_ns=4e6 + 2 * costs.queue_ns, waited_ns=100e6)
    assert 2 * costs.queue_ns == pytest.approx(96e6, rel=0.05)


def test_what_opening_a_stream_takes_is_not_taken_for_the_price_of_nodes() -> None:
    """First passes have most nodes and alone are let in and look up the prompt: 3 ms, whatever they hold; all wait for 2 ms."""
    costs, rng = LatencyModel(CURVE), np.random.default_rng(0)
    for turn in range(1_000):
        opens = turn % 2 == 0
        nodes = int(rng.integers(80, 120)) if opens else int(rng.integers(5, 20))
        wait = int(3e6) + 1_000 * nodes + (int(3e6) if opens else 0)
        cost = PassStats(forward_ns=int(1e6), queue_ns=int(2e6), lookup_ns=int(2.5e6) if opens else 0)
        costs.observe([Pass(1, 0, nodes, opens=opens)], cost, wait)
    assert costs.besides([0, 100]) == pytest.approx([0, 100_000], rel=0.05, abs=3_000)
    assert costs.besides([0, 100], opens=True) == pytest.approx([3e6, 3.1e6], rel=0.01)
    assert costs.queue_ns == pytest.approx(2e6)


@pytest.mark.parametrize("opens", [True, False])
def test_a_model_is_full_while_passes_wait_for_longer_than_one_takes(opens: bool) -> None:
    """Of 3 ms, whether requests are done in their opening pass or not, and however many have a part in it."""
    costs, plain = LatencyModel(CURVE), Pass(51, 50, 50)
    assert not costs.full(plain)
    for queue_ms, full in ((2.8, False), (3.2, True), (2.8, False)):
        for _ in range(100):
            cost = PassStats(
                forward_ns=int(4.5e6), queue_ns=int(queue_ms * 1e6), new_tokens=51, batch_requests=2, batch_tokens=101
            )
            costs.observe([replace(plain, opens=opens)], cost, int(8e6))
        assert costs.full(plain) is full


def test_a_mean_starts_at_a_guess_and_forgets() -> None:
    mean = Ewma(9.0, memory=10)
    assert mean.value == 9.0
    for value in (1.0, 3.0):
        mean.add(value)
    assert mean.value == 2.0
    for _ in range(200):
        mean.add(7.0)
    assert mean.value == pytest.approx(7.0, rel=1e-6)


def test_a_line_is_level_until_it_knows_better_and_never_falls() -> None:
    line = EwmaRegression(2)
    assert float(line.at(5)) == 0.0
    line.add(10, 4.0)
    assert line.at([0, 10, 100]).tolist() == [4.0, 4.0, 4.0]
    line.add(20, 2.0)
    assert line.at([0, 100]).tolist() == [3.0, 3.0]
    steep = EwmaRegression(2)
    for x in (10, 20):
        steep.add(x, x * x)
    assert (steep.at([0, 1, 30]) >= 0).all()
