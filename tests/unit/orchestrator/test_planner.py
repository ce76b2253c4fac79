"""Plan sizes on simulated machines, where the best size is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import Plan, PlanSize
from atspeed.engine.search.scoring import Perturbation
from orchestrator.planning import planner as planner_module
from orchestrator.planning.adaptive_sizer import AdaptivePlanSizer
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext
from orchestrator.planning.planner import PlanLimits, Planner, PlannerKind, refresh_curves
from orchestrator.planning.planner_state import SkipBackoff
from orchestrator.serving.snapshots import Planners
from tests.catalogues import random_catalogue
from tests.oracles.simulation import (
    DEAR,
    FLAT,
    PROMPT_TOKENS,
    STEEP,
    Machine,
    Served,
    Simulation,
    curve,
)
from tests.placeholder_bundles import placeholder_bundle

NOISE = Perturbation(seed=5, temperature=0.8)
USELESS = 30.0


def adaptive(simulation: Simulation, **limits: float) -> Planner:
    planner = Planner(simulation.catalogue.trie, PlanLimits(**limits))  # type: ignore[arg-type]
    planner.set_curves(simulation.machine.target, simulation.machine.draft)
    return planner


def mean_ms(served: list[Served]) -> float:
    return float(np.mean([one.milliseconds for one in served]))


def both(
    simulation: Simulation, planner: Planner, users: range, distort: Callable[[Plan], Plan] = lambda plan: plan
) -> tuple[list[Served], list[Served]]:
    """Serve users with a planner, and by the target alone; the lists are the same."""
    planned = [simulation.serve(planner, user, distort=distort) for user in users]
    alone = [simulation.serve(None, user) for user in users]
    assert [one.list for one in planned] == [one.list for one in alone]
    return planned, alone


def test_planner_with_flat_passes_plans_everything() -> None:
    """Nodes cost nothing, so every request takes one pass, though the draft is far from the target."""
    simulation = Simulation(FLAT, noise=1.5)
    planner = adaptive(simulation)
    both(simulation, planner, range(30))
    planned, alone = both(simulation, planner, range(30, 50))
    assert np.mean([len(one.target.costs) for one in planned]) < 1.2
    assert mean_ms(planned) < 0.45 * mean_ms(alone)
    assert min(one.report.nodes_asked for one in planned) > 150


@pytest.mark.parametrize(("machine", "noise"), [(DEAR, 0.0), (STEEP, USELESS), (FLAT, USELESS)])
def test_planner_with_a_useless_draft_hardly_drafts(machine: Machine, noise: float) -> None:
    """The draft takes as long as the target, or its logits are noise; only exploration costs time."""
    if machine is FLAT:
        machine = replace(machine, draft=curve(30, 1000, 0.0))
    simulation = Simulation(machine, noise=noise)
    planner = adaptive(simulation)
    both(simulation, planner, range(30))
    planned, alone = both(simulation, planner, range(30, 70))
    assert mean_ms(planned) <= 1.01 * mean_ms(alone)
    assert np.mean([one.report.nodes_asked > 0 for one in planned]) < 0.2


def test_planner_while_no_plan_pays_evaluates_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip backoff applies at the root and after a miss on every level."""
    simulation, evaluations = Simulation(DEAR, noise=0.0), list[int]()
    extend, reset = SkipBackoff.extend, SkipBackoff.reset  # every evaluation ends with one of them

    def counting_extend(backoff: SkipBackoff, *args: float) -> None:
        evaluations.append(backoff.length)
        extend(backoff, *args)  # type: ignore[arg-type]

    def counting_reset(backoff: SkipBackoff) -> None:
        evaluations.append(backoff.length)
        reset(backoff)

    monkeypatch.setattr(SkipBackoff, "extend", counting_extend)
    monkeypatch.setattr(SkipBackoff, "reset", counting_reset)
    planner = adaptive(simulation)
    both(simulation, planner, range(70))
    evaluations.clear()
    planned, _ = both(simulation, planner, range(70, 134))
    assert 0 < len(evaluations) <= 2 * (64 // 32 + 1)
    assert {one.report.expected_passes for one in planned} == {3.0}
    assert all(one.report.expected_ns for one in planned)


def test_planner_with_a_useful_draft_beats_fixed_sizes() -> None:
    """Tokens have a cost: requests are faster than with fixed sizes and than without plans."""
    machine = Machine(curve(20, 64, 0.3), curve(1, 64, 0.01))
    simulation = Simulation(machine, noise=0.3)
    planner, fixed = adaptive(simulation), Planner(simulation.catalogue.trie, PlanLimits(kind=PlannerKind.FIXED))
    both(simulation, planner, range(30))
    planned, alone = both(simulation, planner, range(30, 60))
    with_fixed, _ = both(simulation, fixed, range(30, 60))
    assert mean_ms(planned) < 0.6 * mean_ms(alone)
    assert mean_ms(planned) <= 1.01 * mean_ms(with_fixed)


def test_planner_with_co_batched_requests_plans_less() -> None:
    """One request fits the flat part of a pass; eight that share it are beyond it, and every token costs."""
    tokens = []
    for occupancy in (1, 8):
        machine = Machine(curve(20, 128, 0.3), curve(1, 128, 0.01), batch_occupancy=occupancy)
        simulation = Simulation(machine, noise=0.7)
        planner = adaptive(simulation)
        for user in range(30):
            simulation.serve(planner, user)
        served = [simulation.serve(planner, user) for user in range(30, 45)]
        tokens.append(float(np.mean([one.target.cost.new_tokens for one in served])))
    assert tokens[1] < 0.8 * tokens[0]


def test_planner_finds_a_draft_that_becomes_useful() -> None:
    """Exploration finds it; without a share of exploration nothing would.

    It takes as many plans as the planner needed to learn that the draft is useless, and a good part of that again.
    """
    machine = Machine(curve(20, 24, 0.6), curve(10, 64, 0.05))
    useless, useful = (_with_a_wide_first_level(machine, noise=noise) for noise in (USELESS, 0.0))
    for share, found in ((0.5, True), (0.0, False)):
        planner = adaptive(useless, explored_share=share)
        asked = [useless.serve(planner, user).report.nodes_asked > 0 for user in range(40)]
        assert share or not any(asked[32:])
        asked = [useful.serve(planner, user).report.nodes_asked > 0 for user in range(110)]
        assert all(asked[80:]) if found else not any(asked)


def _with_a_wide_first_level(machine: Machine, noise: float) -> Simulation:
    """Return a simulation whose first level is too wide to be planned as a whole by a useless draft."""
    return Simulation(machine, noise=noise, items=1000, codes=(100, 12, 10))


def test_planner_skips_a_draft_with_a_long_queue() -> None:
    """A perfect draft waits 300 ms for each of its passes: it is skipped, and asked again once the queue is gone."""
    machine = Machine(curve(20, 64, 0.3), curve(1, 64, 0.01))
    crowded, calm = (Simulation(replace(machine, draft_queue_ms=ms), noise=0.0) for ms in (300.0, 0.0))
    planner = adaptive(crowded)
    for user in range(30):
        crowded.serve(planner, user)
    assert np.mean([crowded.serve(planner, user).report.nodes_asked > 0 for user in range(100)]) < 0.05
    for user in range(600):
        calm.serve(planner, user % 50)
    assert all(calm.serve(planner, user).report.nodes_asked for user in range(20))


def test_planner_with_a_saturated_target_drafts_nothing() -> None:
    """Passes are flat, so everything is planned, except while they wait longer than they take."""
    calm, busy, full = (Simulation(replace(FLAT, target_queue_ms=ms), noise=0.3) for ms in (0.0, 15.0, 40.0))
    planner = adaptive(calm, explored_share=0.5)
    for simulation in (calm, busy):
        both(simulation, planner, range(30))
        planned, _ = both(simulation, planner, range(30, 40))
        assert all(one.report.nodes_asked for one in planned)
    both(full, planner, range(30))
    planned, alone = both(full, planner, range(30, 80))
    assert not any(one.draft.waits for one in planned)
    assert [one.target.costs for one in planned] == [one.target.costs for one in alone]
    assert {one.report.expected_passes for one in planned} == {3.0}
    both(calm, planner, range(10))
    planned, _ = both(calm, planner, range(10, 30))
    assert all(one.draft.waits for one in planned)


def test_planner_skips_a_draft_that_is_always_late() -> None:
    """Timeouts: a plan that was given up counts as a wait of at least that length."""
    simulation = Simulation(replace(FLAT, draft_fails=True, draft_queue_ms=500.0), noise=0.0)
    planner = adaptive(simulation)
    asked = [simulation.serve(planner, user).report.nodes_asked > 0 for user in range(60)]
    assert asked[0]
    assert np.mean(asked[30:]) < 0.2


def test_patience_is_a_multiple_of_the_target_alone() -> None:
    """The target takes 60 ms for three passes, and 3 ms; the least patience is 0.1 s."""
    for floor_ms, patience in ((20, 0.24), (1, 0.1)):
        simulation = Simulation(Machine(curve(floor_ms, 1000, 0.0), FLAT.draft), noise=0.0)
        sizer = adaptive(simulation).sizer(Mode.STRICT, PlanContext(BeamWidths.of(10), PROMPT_TOKENS, PROMPT_TOKENS))
        assert sizer.size(Beams.root()) is not None
        assert sizer.patience_seconds == pytest.approx(patience)


def test_planner_with_new_curves_keeps_its_estimates() -> None:
    simulation = Simulation(FLAT, noise=0.3)
    planner = adaptive(simulation)
    before = [simulation.serve(planner, user).report for user in range(30)][-1]
    planner.set_curves(FLAT.target, FLAT.draft)
    after = simulation.serve(planner, 29).report
    assert after.expected_passes is not None
    assert after.expected_passes == pytest.approx(before.expected_passes, rel=0.05)
    assert after.expected_passes < 2


def _all_alike(plan: Plan) -> Plan:
    return replace(plan, margin=np.full(len(plan.node), 5.0))


def _upside_down(plan: Plan) -> Plan:
    """Reverse the margins of each level; deeper nodes are lower, so that none exceeds its parent."""
    depth = Simulation(STEEP, noise=0.5).catalogue.trie.depth(plan.node)
    return replace(plan, margin=np.asarray(-100.0 * depth - np.clip(plan.margin, -40.0, 40.0)))


@pytest.mark.parametrize("distort", [_all_alike, _upside_down])
@pytest.mark.parametrize("machine", [STEEP, FLAT])
def test_planner_with_misleading_margins_loses_little(machine: Machine, distort: Callable[[Plan], Plan]) -> None:
    """The planner learns the value of such plans too."""
    simulation = Simulation(machine, noise=0.5)
    planner = adaptive(simulation)
    both(simulation, planner, range(60), distort)
    planned, alone = both(simulation, planner, range(60, 90), distort)
    assert mean_ms(planned) <= 1.02 * mean_ms(alone)


def test_predictions_on_a_slower_machine_come_true() -> None:
    machine = Machine(curve(20, 64, 0.3), curve(1, 64, 0.01), target_error=3.0)
    simulation = Simulation(machine, noise=0.5)
    planner = adaptive(simulation)
    planned, _ = both(simulation, planner, range(80))
    for one in planned[40:]:
        assert one.report.target_predicted_ns == pytest.approx(one.target.cost.forward_ns, rel=0.08)
    passes = [len(one.target.costs) for one in planned[40:]]
    assert np.mean([one.report.expected_passes for one in planned[40:]]) == pytest.approx(np.mean(passes), abs=0.3)


@pytest.mark.parametrize("mode", [Mode.STRICT, Mode.EXACT_SAMPLING])
def test_planner_at_any_state_keeps_the_list(mode: Mode) -> None:
    for machine in (FLAT, STEEP):
        simulation = Simulation(machine, noise=1.0)
        planner = adaptive(simulation, explored_share=0.5)
        for user in range(25):
            assert simulation.serve(planner, user, mode=mode).list == simulation.serve(None, user, mode=mode).list


def test_plan_after_a_miss_has_a_share_of_the_nodes() -> None:
    simulation = Simulation(FLAT, noise=1.0)
    planner = adaptive(simulation)
    trie = simulation.catalogue.trie
    sizer = planner.sizer(Mode.STRICT, PlanContext(BeamWidths.of(10), PROMPT_TOKENS, PROMPT_TOKENS))
    first = sizer.size(Beams.root())
    children = trie.children(0)[:5].astype(np.int64)
    second = sizer.size(Beams(children, *(np.zeros(5) for _ in range(3))))
    assert first is not None
    assert second is not None
    assert second.max_nodes <= 60 < 240


@pytest.mark.parametrize(
    ("beam_width", "levels", "nodes"), [(20, 4, 120), (20, 3, 80), (50, 4, 240), (1, 2, 2), (5, 1, 1)]
)
def test_fixed_size_grows_with_the_beams(beam_width: int, levels: int, nodes: int) -> None:
    """A plan has two nodes for each beam of each planned level, at most 240, and no share per level."""
    simulation = Simulation(FLAT, noise=0.0, items=30, codes=(4,) * levels)
    planner = Planner(simulation.catalogue.trie, PlanLimits(kind=PlannerKind.FIXED))
    sized = planner.sizer(Mode.STRICT, PlanContext(BeamWidths.of(beam_width), 1, 1)).size(Beams.root())
    assert sized == PlanSize(BeamWidths.of(beam_width), width=nodes, max_nodes=nodes)


@pytest.mark.parametrize("mode", [Mode.RELAXED_SAMPLING, Mode.TARGET_ONLY])
def test_modes_that_cannot_be_cut_have_a_fixed_size(mode: Mode) -> None:
    planner = adaptive(Simulation(STEEP, noise=0.0))
    assert type(planner.sizer(mode, PlanContext(BeamWidths.of(10), 8, 8))) is FixedPlanSizer


def test_planner_without_curves_uses_the_fixed_size() -> None:
    simulation = Simulation(FLAT, noise=0.3)
    planner = Planner(simulation.catalogue.trie, PlanLimits())
    served = simulation.serve(planner, 0)
    assert served.report.nodes_asked == 40
    assert (served.report.target_predicted_ns, served.report.expected_passes) == (None, None)


def test_planner_with_a_failing_draft_keeps_the_list() -> None:
    simulation = Simulation(replace(FLAT, draft_fails=True), noise=0.3)
    planner = adaptive(simulation)
    for user in range(5):
        served = simulation.serve(planner, user)
        assert (served.list, served.report.nodes_proposed) == (simulation.serve(None, user).list, 0)


def test_planners_of_the_same_models_share_estimates(tmp_path: Path) -> None:
    """A changed catalogue keeps the estimates of its models; other models begin anew."""
    manifest = placeholder_bundle(tmp_path, random_catalogue(20, (4, 4, 4), seed=0)).manifest
    trie = random_catalogue(30, (4, 4, 4), seed=1).trie
    planners, context = Planners(PlanLimits()), PlanContext(beam_widths=BeamWidths.of(4), prompt_tokens=8)
    first = planners.of(manifest, trie)
    first.set_curves(STEEP.target, STEEP.draft)
    other = manifest.model_copy(update={"target": manifest.target.model_copy(update={"fingerprint": "other"})})
    changed = manifest.model_copy(update={"catalogue_version": "changed"})
    assert isinstance(planners.of(changed, trie).sizer(Mode.STRICT, context), AdaptivePlanSizer)
    assert not isinstance(planners.of(other, trie).sizer(Mode.STRICT, context), AdaptivePlanSizer)


class FakeModel:
    """Model service that publishes its cost curve, or fails."""

    def __init__(self, *replies: CostCurve | Exception) -> None:
        self._replies = list(replies)

    async def cost_curve(self) -> CostCurve:
        """Return the next reply; the last one again and again."""
        reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        if isinstance(reply, Exception):
            raise reply
        return reply


def test_curves_after_any_error_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "_FIRST_RETRY_SECONDS", 0)
    monkeypatch.setattr(planner_module, "_REFRESH_SECONDS", 0)
    measured: list[CostCurve] = []
    enough = asyncio.Event()

    class RecordingPlanner(Planner):
        def set_curves(self, target: CostCurve, draft: CostCurve) -> None:
            measured.append(target)
            if len(measured) == 3:
                enough.set()

    async def refresh() -> None:
        planner = RecordingPlanner(Simulation(FLAT, noise=0.0).catalogue.trie, PlanLimits())
        target = FakeModel(ValueError("odd"), STEEP.target, RuntimeError("odder"), DEAR.target, FLAT.target)
        refreshing = asyncio.create_task(refresh_curves(planner, target, FakeModel(FLAT.draft)))
        await enough.wait()
        refreshing.cancel()

    asyncio.run(refresh())
    assert measured[:3] == [STEEP.target, DEAR.target, FLAT.target]
