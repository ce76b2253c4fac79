"""Required depths, and the estimate of their distribution when some are censored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.arrays import Float64
from atspeed.engine.ewma import MEMORY
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.speculation.acceptance_model import (
    DEPTHS,
    EMPTY_DEPTH,
    PRIOR,
    AcceptanceModel,
    PlanPrefixes,
    RequiredDepth,
    SurvivalCurve,
    WorkloadKey,
)

WORKLOAD = WorkloadKey("strict", 4)
depths = st.sampled_from([float(depth) for depth in DEPTHS[::6]]) | st.floats(-3, 70)
required_depths = st.builds(RequiredDepth, depths, censored=st.booleans())


def survival(curve: SurvivalCurve, depth: Float64) -> Float64:
    """Return P(required depth > d) for depths d [c], rounded down to the grid."""
    return np.asarray(curve.survived[np.searchsorted(DEPTHS, depth, side="right") - 1])


def kaplan_meier(observed: Sequence[RequiredDepth], depth: float) -> float:
    """Return P(required > depth) from the definition: at every depth with an event, the share that survives.

    Required depths are rounded up to the grid and censored ones down. An observation weighs less with each later one.
    """
    events = [(float(at), float(weight)) for at, weight in zip(DEPTHS, PRIOR, strict=True)]
    censored = []
    for age, one in enumerate(reversed(observed)):
        weight = (1 - 1 / MEMORY) ** age
        above = [float(at) for at in DEPTHS if at >= one.depth]
        if one.censored or not above:
            censored.append((max(float(at) for at in DEPTHS if at <= one.depth), weight))
        else:
            events.append((above[0], weight))
    survival = 1.0
    for at in sorted({at for at, _ in events if at <= depth}):
        at_risk = math.fsum(weight for exit_at, weight in (*events, *censored) if exit_at >= at)
        survival *= 1 - math.fsum(weight for event_at, weight in events if event_at == at) / at_risk
    return survival


@given(st.lists(required_depths, max_size=30), st.lists(depths, min_size=1, max_size=5))
def test_survival_curve_of_any_observations_is_the_kaplan_meier_estimate(
    observed: list[RequiredDepth], asked: list[float]
) -> None:
    estimate = SurvivalCurve()
    for one in observed:
        estimate.add(one)
    expected = [kaplan_meier(observed, depth) for depth in asked]
    assert survival(estimate, np.array(asked)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("cut", [0.5, 1.0, 2.0])
def test_survival_curve_of_censored_observations_is_unbiased(cut: float) -> None:
    """Exponential required_depths, of which plans of varying depth show only the shallower ones."""
    rng, estimate = np.random.default_rng(int(10 * cut)), SurvivalCurve()
    for required, seen in zip(rng.exponential(1.0, 4_000), rng.uniform(0.0, 2 * cut, 4_000), strict=True):
        estimate.add(RequiredDepth(seen, censored=True) if required > seen else RequiredDepth(required))
    asked = np.linspace(0.1, cut, 5)
    assert survival(estimate, asked) == pytest.approx(np.exp(-asked), abs=0.1)


def test_survival_curve_after_a_change_forgets_old_observations() -> None:
    estimate = SurvivalCurve()
    for depth in [0.1] * 1_000 + [3.0] * 1_000:
        estimate.add(RequiredDepth(depth))
    assert survival(estimate, np.array([1.0])) > 0.8


def test_survival_curve_without_observations_falls_with_the_depth() -> None:
    survived = survival(SurvivalCurve(), DEPTHS)
    assert survived[0] == 1.0
    assert (np.diff(survived) <= 0).all()
    assert survived[-1] < 1e-9


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Draw plans with many ties of margin. Parents make no difference to a prefix, so all nodes are siblings."""
    margin = draw(st.lists(st.sampled_from([math.inf, 1.0, 0.5, 0.0, -0.5, -2.0]), max_size=12))
    nodes = np.arange(1, len(margin) + 1)
    return Plan(Beams.root(), nodes, np.zeros(len(nodes)), np.array(margin, dtype=float))


@given(plans(), st.sets(st.integers(1, 14)), st.booleans())
def test_required_depth_of_a_level_separates_sufficient_prefixes(plan: Plan, needed: set[int], complete: bool) -> None:
    """A prefix of at least the required depth holds all needed nodes. A part of a tie has no depth of its own."""
    prefixes = PlanPrefixes.of(plan, complete=complete)
    required = prefixes.required(plan, np.array(sorted(needed), dtype=np.int64))
    assert required.censored == (not needed <= set(plan.node.tolist()))
    for count, depth in enumerate(prefixes.depth.tolist()):
        kept = set(plan.node[prefixes.order[:count]].tolist())
        if required.censored:
            assert required.depth >= depth
        elif required.depth <= depth:
            assert needed <= kept
        elif count == 0 or plan.margin[prefixes.order[count - 1]] > min(plan.margin, default=0.0):
            assert not needed <= kept or _within_a_tie(plan, prefixes, count)


def _within_a_tie(plan: Plan, prefixes: PlanPrefixes, count: int) -> bool:
    margin = plan.margin[prefixes.order]
    return 0 < count < len(margin) and margin[count] == margin[count - 1]


def test_required_depth_of_a_level_without_needed_nodes_is_empty() -> None:
    assert PlanPrefixes.of(Plan.empty(Beams.root()), complete=True).required(
        Plan.empty(Beams.root()), np.empty(0, dtype=np.int64)
    ) == RequiredDepth(EMPTY_DEPTH)


@given(
    st.lists(st.lists(required_depths, min_size=3, max_size=3), max_size=10), st.lists(depths, min_size=1, max_size=5)
)
def test_acceptance_model_counts_levels_below_a_missed_one_as_missed(
    seen: list[list[RequiredDepth]], asked: list[float]
) -> None:
    acceptance = AcceptanceModel(levels=4, max_nodes=240)
    for levels in seen:
        acceptance.learn(WORKLOAD, 0, levels)
    missed = acceptance.missed(WORKLOAD, 0, np.array(asked))
    assert missed.shape == (3, len(asked))
    assert (np.diff(missed, axis=0) >= 0).all()
    assert acceptance.observations(WORKLOAD, 0) == len(seen)
    assert acceptance.observations(WORKLOAD, 1) == 0


def test_size_profile_is_the_mean_over_plans_of_that_size() -> None:
    acceptance = AcceptanceModel(levels=3, max_nodes=8)
    assert acceptance.profile(WORKLOAD, 0, 2)[0].tolist() == []
    acceptance.record_plan(WORKLOAD, 0, np.linspace(1, 0.5, 5) * np.ones((2, 1)), complete=False)
    acceptance.record_plan(WORKLOAD, 0, np.linspace(1, 0.1, 3) * np.ones((2, 1)), complete=True)
    sizes, missed = acceptance.profile(WORKLOAD, 0, 2)
    assert sizes.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert missed[0].tolist() == pytest.approx([(0.875 + 0.55) / 2, (0.75 + 0.1) / 2, 0.3625, 0.3, 0.1, 0.1, 0.1, 0.1])


def test_workload_key_groups_widths_by_powers_of_two() -> None:
    assert len({WorkloadKey.of("strict", BeamWidths.of(width)) for width in (9, 10, 16)}) == 1
    assert len({WorkloadKey.of("strict", BeamWidths.of(width)) for width in (1, 2, 3, 5, 9, 17)}) == 6
    assert WorkloadKey.of("strict", BeamWidths.of(2, 16)) == WorkloadKey.of("strict", BeamWidths.of(12, 5))
    assert WorkloadKey.of("strict", BeamWidths.of(2, 16)) != WorkloadKey.of("strict", BeamWidths.of(16))
