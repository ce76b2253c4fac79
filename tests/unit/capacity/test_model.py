"""The capacity model: its queue beside a simulated one, and what no plan may do."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from atspeed.capacity.errors import CapacityError
from atspeed.capacity.model import CapacityPlan, Costs, Way, host_saturation, make_plan, replicas_needed, wait_p99
from atspeed.capacity.sizes import Sizes, orchestrator_gib, redis_size

COSTS = Costs()
SIZES = Sizes({"target": 3.5e8, "draft": 1.5e6}, {"target": 73_728.0, "draft": 1_024.0}, items=12_000)
PLAIN = Way("target-only", 4.0, {1: 60.0})
rates = st.floats(0.01, 1e5)
p99s = st.floats(20.0, 5000.0)
utilisations = st.floats(0.0, 0.99)


@st.composite
def ways(draw: st.DrawFn) -> Way:
    alone = draw(st.floats(1.0, 500.0))
    together = {1: alone}
    for trees in (2, 4, 8)[: draw(st.integers(0, 3))]:
        together[trees] = alone * draw(st.floats(1.0, float(trees)))
    return Way("any", draw(st.floats(1.0, 6.0)), together, draw(st.sampled_from([0.0, 4.0, 40.0])))


def made(rate: float, p99: float, some: list[Way]) -> CapacityPlan | None:
    try:
        return make_plan(rate, p99, some, COSTS, SIZES)
    except CapacityError:
        return None


def targets(plan: CapacityPlan) -> int:
    return plan.stations[0].replicas


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("variation", [0.0, 0.25, 1.0])
def test_the_wait_is_that_of_a_simulated_queue(utilisation: float, variation: float) -> None:
    """Lindley's recursion over Poisson arrivals and gamma times. The model is exact for exponential times, else above."""
    random, jobs = np.random.default_rng(7), 400_000
    times = random.gamma(1 / variation, variation, jobs) if variation else np.ones(jobs)
    steps = times[:-1] - random.exponential(1 / utilisation, jobs)[1:]
    walk = np.concatenate([[0.0], np.cumsum(steps)])
    waits = walk - np.minimum.accumulate(walk)
    simulated = np.percentile(waits, 99)
    most = {0.0: 1.33, 0.25: 1.17, 1.0: 1.05}[variation]
    assert 0.99 * simulated <= wait_p99(utilisation, 1.0, variation) <= most * simulated


@given(st.lists(utilisations, min_size=2, max_size=2), st.floats(0.1, 1e3), st.floats(0, 2), st.floats(1, 8))
def test_a_busier_replica_never_waits_less(two: list[float], job: float, variation: float, visits: float) -> None:
    less, more = sorted(two)
    assert wait_p99(less, job, variation, visits) <= wait_p99(more, job, variation, visits)
    assert wait_p99(1.0, job, variation, visits) == math.inf


@given(st.floats(0.01, 500), st.floats(0.1, 100), st.floats(0.1, 1000), st.floats(1, 8))
def test_replicas_are_the_fewest_that_keep_the_rules(rate: float, busy: float, wait: float, visits: float) -> None:
    def keeps(replicas: int) -> bool:
        used = rate * busy / 1e3 / replicas
        return used <= COSTS.most_utilisation and wait_p99(used, busy, COSTS.variation, visits) <= wait

    found = replicas_needed(rate, busy, wait, COSTS, busy, visits)
    assert keeps(found)
    assert all(not keeps(fewer) for fewer in range(max(1, found - 20), found))


@given(st.lists(ways(), min_size=1, max_size=3), st.lists(rates, min_size=2, max_size=2), p99s)
def test_a_higher_rate_never_needs_fewer_targets(some: list[Way], two: list[float], p99: float) -> None:
    low, high = (made(rate, p99, some) for rate in sorted(two))
    assume(low is not None and high is not None)
    assert low
    assert high
    assert targets(low) <= targets(high)


@given(st.lists(ways(), min_size=1, max_size=3), rates, st.lists(p99s, min_size=2, max_size=2))
def test_a_tighter_p99_never_needs_fewer_targets(some: list[Way], rate: float, two: list[float]) -> None:
    tight, loose = (made(rate, p99, some) for p99 in sorted(two))
    assume(tight is not None)
    assert tight
    assert loose, "what a tight p99 allows, a loose one allows too"
    assert targets(tight) >= targets(loose)


@given(ways(), st.lists(rates, min_size=2, max_size=2), st.lists(p99s, min_size=2, max_size=2))
def test_one_way_of_making_lists_never_needs_fewer_of_any_service(
    way: Way, two: list[float], limits: list[float]
) -> None:
    one = replace(way, together_ms={1: way.together_ms[1]})
    harder, easier = made(max(two), min(limits), [one]), made(min(two), max(limits), [one])
    assume(harder is not None)
    assert harder
    assert easier
    for more, fewer in zip(harder.stations, easier.stations, strict=True):
        assert more.service == fewer.service
        assert more.replicas >= fewer.replicas


@given(st.lists(ways(), min_size=1, max_size=3), rates, p99s)
def test_a_plan_keeps_what_it_was_asked_for(some: list[Way], rate: float, p99: float) -> None:
    plan = made(rate, p99, some)
    assume(plan is not None)
    assert plan
    assert plan.p99_ms <= p99 * (1 + 1e-9)
    assert plan.latency_ms < p99
    for station in plan.stations:
        assert station.utilisation <= COSTS.most_utilisation
        assert station.utilisation == pytest.approx(rate * station.busy_ms / 1e3 / station.replicas)


def test_the_way_with_the_fewest_targets_is_taken_and_shared_passes_count() -> None:
    shared = Way("strict", 1.0, {1: 20.0, 4: 30.0}, draft_ms=3.0)
    plan = make_plan(200.0, 400.0, [PLAIN, shared], COSTS, SIZES)
    assert (plan.way, plan.lists_together) == ("strict", 4)
    assert plan.stations[0].busy_ms == 7.5
    assert [each.service for each in plan.stations] == ["target", "draft", "orchestrator"]


def test_a_quick_model_leaves_its_event_loop_as_the_limit() -> None:
    plan = make_plan(1000.0, 100.0, [Way("target-only", 4.0, {1: 0.4})], COSTS, SIZES)
    assert plan.stations[0].busy_ms == pytest.approx(4 * COSTS.pass_ms)
    assert plan.limits == ("the target's event loop: 5.60 ms of a replica per list",)


def test_a_p99_below_the_time_of_a_list_is_refused_with_that_time() -> None:
    with pytest.raises(CapacityError, match=r"^p99: 70 ms is below 70\.0 ms, the time of a list that does not wait$"):
        make_plan(1.0, 70.0, [PLAIN], COSTS, SIZES)


@given(st.integers(1, 16), st.floats(1, 200), st.floats(1, 6), st.integers(1, 64))
def test_a_host_serves_no_more_than_its_replicas_and_no_more_than_its_cores(
    replicas: int, model: float, passes: float, cores: int
) -> None:
    found = host_saturation(replicas, model, passes, COSTS, cores)
    assert found <= replicas * 1e3 / model * (1 + 1e-9)
    assert found <= cores * 1e3 / model * (1 + 1e-9)
    assert found <= host_saturation(replicas + 1, model, passes, COSTS, cores)
    assert found <= host_saturation(replicas, model, passes, COSTS, cores + 1)


def test_redis_holds_histories_and_kv_and_moves_what_the_targets_do_not_hold() -> None:
    sizes = replace(SIZES, users=100_000, history_items=50, prompt_tokens=80.0, prefix_hit=0.75)
    found = redis_size(100.0, 4, sizes)
    prompt = 80 * (73_728 + 1_024)
    held = 4 * sizes.kv_memory / (100_000 * 80 * 73_728)
    assert found.memory_share == pytest.approx(held)
    assert found.histories_gib == pytest.approx(100_000 * 50 * 85 / 2**30)
    assert found.kv_gib == pytest.approx(100_000 * prompt * 1.1 / 2**30)
    moved = 100 * (prompt * (0.75 * (1 - held) + 0.25) + 50 * 85)
    assert found.megabytes_per_second == pytest.approx(moved / 1e6)
    assert found.calls_per_second == pytest.approx(100 * (3 - held))


def test_without_cached_prefixes_redis_holds_histories_only() -> None:
    found = redis_size(100.0, 4, replace(SIZES, users=1000))
    assert found.kv_gib == 0
    assert found.calls_per_second == 100
    assert found.megabytes_per_second == pytest.approx(100 * 50 * 85 / 1e6)


def test_redis_beyond_one_instance_is_the_first_limit() -> None:
    sizes = replace(SIZES, users=10**8, prefix_hit=0.9)
    plan = make_plan(1e5, 400.0, [PLAIN], COSTS, sizes)
    assert [limit.partition(":")[0] for limit in plan.limits[:2]] == ["Redis' network", "Redis' calls"]


def test_a_hundred_million_items_are_in_the_memory_of_every_process() -> None:
    small, large = (orchestrator_gib(replace(SIZES, items=items)) for items in (10**4, 10**8))
    assert large - small == pytest.approx(77e8 / 2**30, abs=0.11)
