"""What a plan would have had to hold is read off a search, and its distribution estimated from what censoring leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.speculation.acceptance_model import (
    DEPTHS,
    MEMORY,
    NOTHING,
    PRIOR,
    AcceptanceModel,
    PlanPrefixes,
    Requirement,
    SurvivalCurve,
    WorkloadKey,
)

KIND = WorkloadKey("strict", 4)
depths = st.sampled_from([float(depth) for depth in DEPTHS[::6]]) | st.floats(-3, 70)
requirements = st.builds(Requirement, depths, censored=st.booleans())


def kaplan_meier(observed: Sequence[Requirement], depth: float) -> float:
    """P(required > depth) from the definition: at every depth where something was required, the share that went on.

    On the grid of depths, requirements rounded up and censorings down; an observation weighs less with each that came later.
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


@given(st.lists(requirements, max_size=30), st.lists(depths, min_size=1, max_size=5))
def test_the_estimate_is_kaplan_and_meiers(observed: list[Requirement], asked: list[float]) -> None:
    estimate = SurvivalCurve()
    for one in observed:
        estimate.add(one)
    expected = [kaplan_meier(observed, depth) for depth in asked]
    assert estimate.beyond(np.array(asked)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("cut", [0.5, 1.0, 2.0])
def test_what_was_cut_off_does_not_bias_it(cut: float) -> None:
    """Exponential requirements, of which plans of varying depth show only the shallower ones."""
    rng, estimate = np.random.default_rng(int(10 * cut)), SurvivalCurve()
    for required, seen in zip(rng.exponential(1.0, 4_000), rng.uniform(0.0, 2 * cut, 4_000), strict=True):
        estimate.add(Requirement(seen, censored=True) if required > seen else Requirement(required))
    asked = np.linspace(0.1, cut, 5)
    assert estimate.beyond(asked) == pytest.approx(np.exp(-asked), abs=0.1)


def test_it_follows_a_draft_that_changes() -> None:
    estimate = SurvivalCurve()
    for depth in [0.1] * 1_000 + [3.0] * 1_000:
        estimate.add(Requirement(depth))
    assert estimate.beyond(np.array([1.0])) > 0.8


def test_without_observations_deeper_plans_are_better_plans() -> None:
    beyond = SurvivalCurve().beyond(DEPTHS)
    assert beyond[0] == 1.0
    assert (np.diff(beyond) <= 0).all()
    assert beyond[-1] < 1e-9


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Margins with many ties. What hangs below what makes no difference to a cut, so the nodes stand side by side."""
    margin = draw(st.lists(st.sampled_from([math.inf, 1.0, 0.5, 0.0, -0.5, -2.0]), max_size=12))
    nodes = np.arange(1, len(margin) + 1)
    return Plan(Beams.root(), nodes, np.zeros(len(nodes)), np.array(margin, dtype=float))


@given(plans(), st.sets(st.integers(1, 14)), st.booleans())
def test_the_required_depth_tells_the_cuts_that_suffice(plan: Plan, needed: set[int], complete: bool) -> None:
    """A cut's depth says what it surely holds; half of a tie is no depth of its own, and what is not planned is below all."""
    cuts = PlanPrefixes.of(plan, complete=complete)
    required = cuts.required(plan, np.array(sorted(needed), dtype=np.int64))
    assert required.censored == (not needed <= set(plan.node.tolist()))
    for count, depth in enumerate(cuts.depth.tolist()):
        kept = set(plan.node[cuts.order[:count]].tolist())
        if required.censored:
            assert required.depth >= depth
        elif required.depth <= depth:
            assert needed <= kept
        elif count == 0 or plan.margin[cuts.order[count - 1]] > min(plan.margin, default=0.0):
            assert not needed <= kept or _within_a_tie(plan, cuts, count)


def _within_a_tie(plan: Plan, cuts: PlanPrefixes, count: int) -> bool:
    margin = plan.margin[cuts.order]
    return 0 < count < len(margin) and margin[count] == margin[count - 1]


def test_what_nothing_is_required_of_needs_no_plan() -> None:
    assert PlanPrefixes.of(Plan.empty(Beams.root()), complete=True).required(
        Plan.empty(Beams.root()), np.empty(0, dtype=np.int64)
    ) == Requirement(NOTHING)


@given(st.lists(st.lists(requirements, min_size=3, max_size=3), max_size=10), st.lists(depths, min_size=1, max_size=5))
def test_a_level_below_a_missed_one_counts_as_missed(seen: list[list[Requirement]], asked: list[float]) -> None:
    coverage = AcceptanceModel(levels=4, max_nodes=240)
    for levels in seen:
        coverage.learn(KIND, 0, levels)
    missed = coverage.missed(KIND, 0, np.array(asked))
    assert missed.shape == (3, len(asked))
    assert (np.diff(missed, axis=0) >= 0).all()
    assert coverage.observations(KIND, 0) == len(seen)
    assert coverage.observations(KIND, 1) == 0


def test_the_profile_is_the_mean_over_plans_that_were_so_large() -> None:
    coverage = AcceptanceModel(levels=3, max_nodes=8)
    assert coverage.profile(KIND, 0, 2)[0].tolist() == []
    coverage.note(KIND, 0, np.linspace(1, 0.5, 5) * np.ones((2, 1)), complete=False)
    coverage.note(KIND, 0, np.linspace(1, 0.1, 3) * np.ones((2, 1)), complete=True)
    sizes, missed = coverage.profile(KIND, 0, 2)
    assert sizes.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert missed[0].tolist() == pytest.approx([(0.875 + 0.55) / 2, (0.75 + 0.1) / 2, 0.3625, 0.3, 0.1, 0.1, 0.1, 0.1])


def test_requests_of_like_width_are_of_a_kind() -> None:
    assert len({WorkloadKey.of("strict", width) for width in (9, 10, 16)}) == 1
    assert len({WorkloadKey.of("strict", width) for width in (1, 2, 3, 5, 9, 17)}) == 6
