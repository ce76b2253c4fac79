"""Plans of the size that pays: on simulated machines, where what is best is known, and never at the price of another list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from atspeed.engine.search.beams import Beams
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import Plan, PlanSize
from atspeed.engine.search.scoring import Perturbation
from orchestrator.planning.adaptive_sizer import AdaptivePlanSizer
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext
from orchestrator.planning.planner import PlanLimits, Planner, PlannerKind
from orchestrator.serving.snapshots import Planners
from tests.bundles import random_catalogue, write_bundle
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

NOISE = Perturbation(seed=5, temperature=0.8)
USELESS = 30.0


def adaptive(simulation: Simulation, **limits: float) -> Planner:
    planner = Planner(simulation.catalogue.trie, PlanLimits(**limits))  # type: ignore[arg-type]
    planner.measure_by(simulation.machine.target, simulation.machine.draft)
    return planner


def mean_ms(served: list[Served]) -> float:
    return float(np.mean([one.milliseconds for one in served]))


def both(
    simulation: Simulation, planner: Planner, users: range, spoil: Callable[[Plan], Plan] = lambda plan: plan
) -> tuple[list[Served], list[Served]]:
    """Users served with a planner, and by the target alone; the lists are the same."""
    planned = [simulation.serve(planner, user, spoil=spoil) for user in users]
    alone = [simulation.serve(None, user) for user in users]
    assert [one.list for one in planned] == [one.list for one in alone]
    return planned, alone


def test_where_a_pass_is_flat_everything_is_planned() -> None:
    """One pass for every request, though the draft is far from the target: nodes cost nothing."""
    simulation = Simulation(FLAT, noise=1.5)
    planner = adaptive(simulation)
    both(simulation, planner, range(30))
    planned, alone = both(simulation, planner, range(30, 50))
    assert np.mean([len(one.target.costs) for one in planned]) < 1.2
    assert mean_ms(planned) < 0.45 * mean_ms(alone)
    assert min(one.report.nodes_asked for one in planned) > 150


@pytest.mark.parametrize(("machine", "noise"), [(DEAR, 0.0), (STEEP, USELESS), (FLAT, USELESS)])
def test_where_drafting_does_not_pay_there_is_hardly_any(machine: Machine, noise: float) -> None:
    """A draft that costs as much as the target, and one that knows nothing: a bit of time is spent on finding that out."""
    if machine is FLAT:
        machine = replace(machine, draft=curve(30, 1000, 0.0))
    simulation = Simulation(machine, noise=noise)
    planner = adaptive(simulation)
    both(simulation, planner, range(30))
    planned, alone = both(simulation, planner, range(30, 70))
    assert mean_ms(planned) <= 1.01 * mean_ms(alone)
    assert np.mean([one.report.nodes_asked > 0 for one in planned]) < 0.2


def test_while_nothing_pays_requests_are_seldom_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known to be without a plan costs no thought, at the root as below the beams of every level."""
    simulation, weighed = Simulation(DEAR, noise=0.0), []
    weigh = AdaptivePlanSizer._weighed

    def counting(planning: AdaptivePlanSizer, start: int, *rest: object) -> PlanSize | None:
        weighed.append(start)
        return weigh(planning, start, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(AdaptivePlanSizer, "_weighed", counting)
    planner = adaptive(simulation)
    both(simulation, planner, range(70))
    weighed.clear()
    planned, _ = both(simulation, planner, range(70, 134))
    assert 0 < len(weighed) <= 2 * (64 // 32 + 1)
    assert {one.report.expected_passes for one in planned} == {3.0}
    assert all(one.report.expected_ns > 0 for one in planned)


def test_a_useful_draft_is_used_as_far_as_it_pays() -> None:
    """Tokens cost something: plans are smaller than the fixed ones, and requests faster than with these or with none."""
    machine = Machine(curve(20, 64, 0.3), curve(1, 64, 0.01))
    simulation = Simulation(machine, noise=0.3)
    planner, fixed = adaptive(simulation), Planner(simulation.catalogue.trie, PlanLimits(kind=PlannerKind.FIXED))
    both(simulation, planner, range(30))
    planned, alone = both(simulation, planner, range(30, 60))
    with_fixed, _ = both(simulation, fixed, range(30, 60))
    assert mean_ms(planned) < 0.6 * mean_ms(alone)
    assert mean_ms(planned) <= 1.01 * mean_ms(with_fixed)


def test_plans_shrink_with_the_load() -> None:
    """Alone a request has a flat pass to itself; eight that share one are beyond its flat part, where every token counts."""
    tokens = []
    for together in (1, 8):
        machine = Machine(curve(20, 128, 0.3), curve(1, 128, 0.01), together=together)
        simulation = Simulation(machine, noise=0.7)
        planner = adaptive(simulation)
        for user in range(30):
            simulation.serve(planner, user)
        served = [simulation.serve(planner, user) for user in range(30, 45)]
        tokens.append(float(np.mean([one.target.cost.new_tokens for one in served])))
    assert tokens[1] < 0.8 * tokens[0]


def test_a_draft_that_becomes_useful_is_found_out() -> None:
    """It is asked now and then even where that does not pay; without that share it never would be.

    It takes as many plans as it took to learn that the draft is useless, and a good part of more, before these do not outweigh.
    """
    machine = Machine(curve(20, 24, 0.6), curve(10, 64, 0.05))
    for share, found in ((0.5, True), (0.0, False)):
        useless, useful = (_with_a_wide_first_level(machine, noise=noise) for noise in (USELESS, 0.0))
        planner = adaptive(useless, explored_share=share)
        asked = [useless.serve(planner, user).report.nodes_asked > 0 for user in range(40)]
        assert share or not any(asked[32:])
        asked = [useful.serve(planner, user).report.nodes_asked > 0 for user in range(110)]
        assert all(asked[80:]) if found else not any(asked)


def _with_a_wide_first_level(machine: Machine, noise: float) -> Simulation:
    """To list most of the level, which does not need a draft that knows something, is no way out."""
    return Simulation(machine, noise=noise, items=1000, codes=(100, 12, 10))


def test_a_draft_that_is_waited_for_is_left_out() -> None:
    """A perfect draft, but 300 ms in a queue for each of its passes: not worth the wait, and asked again when that is over."""
    machine = Machine(curve(20, 64, 0.3), curve(1, 64, 0.01))
    crowded, calm = (Simulation(replace(machine, draft_queue_ms=ms), noise=0.0) for ms in (300.0, 0.0))
    planner = adaptive(crowded)
    for user in range(30):
        crowded.serve(planner, user)
    assert np.mean([crowded.serve(planner, user).report.nodes_asked > 0 for user in range(100)]) < 0.05
    for user in range(600):
        calm.serve(planner, user % 50)
    assert all(calm.serve(planner, user).report.nodes_asked for user in range(20))


def test_while_the_target_is_full_nothing_is_drafted() -> None:
    """Passes that are flat, where all is planned: until they wait for longer than they take, and again when that is over."""
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


def test_a_draft_that_is_always_late_is_left_out() -> None:
    """Of a plan that never came, so much is known: it would have taken longer."""
    simulation = Simulation(replace(FLAT, draft_fails=True, draft_queue_ms=500.0), noise=0.0)
    planner = adaptive(simulation)
    asked = [simulation.serve(planner, user).report.nodes_asked > 0 for user in range(60)]
    assert asked[0]
    assert np.mean(asked[30:]) < 0.2


def test_a_plan_may_take_a_few_times_what_the_target_alone_would() -> None:
    """A target that takes 60 ms for three passes; a tenth of a second is always given."""
    for floor_ms, patience in ((20, 0.24), (1, 0.1)):
        simulation = Simulation(Machine(curve(floor_ms, 1000, 0.0), FLAT.draft), noise=0.0)
        planning = adaptive(simulation).planning(Mode.STRICT, PlanContext(10, PROMPT_TOKENS, PROMPT_TOKENS))
        assert planning.size(Beams.root()) is not None
        assert planning.patience_seconds == pytest.approx(patience)


def test_new_curves_do_not_cost_the_experience() -> None:
    simulation = Simulation(FLAT, noise=0.3)
    planner = adaptive(simulation)
    before = [simulation.serve(planner, user).report for user in range(30)][-1]
    planner.measure_by(FLAT.target, FLAT.draft)
    after = simulation.serve(planner, 29).report
    assert after.expected_passes == pytest.approx(before.expected_passes, rel=0.05)
    assert after.expected_passes < 2


def _all_alike(plan: Plan) -> Plan:
    return replace(plan, margin=np.full(len(plan.node), 5.0))


def _upside_down(plan: Plan) -> Plan:
    """By level, the likeliest nodes last: the deeper a node, the lower, so that none is above its parent."""
    depth = Simulation(STEEP, noise=0.5).catalogue.trie.depth(plan.node)
    return replace(plan, margin=np.asarray(-100.0 * depth - np.clip(plan.margin, -40.0, 40.0)))


@pytest.mark.parametrize("spoil", [_all_alike, _upside_down])
@pytest.mark.parametrize("machine", [STEEP, FLAT])
def test_margins_that_lie_cost_little(machine: Machine, spoil: Callable[[Plan], Plan]) -> None:
    """What such plans are worth is learnt like that of any others."""
    simulation = Simulation(machine, noise=0.5)
    planner = adaptive(simulation)
    both(simulation, planner, range(60), spoil)
    planned, alone = both(simulation, planner, range(60, 90), spoil)
    assert mean_ms(planned) <= 1.02 * mean_ms(alone)


def test_predictions_come_true_on_a_machine_that_is_slower_than_it_was() -> None:
    machine = Machine(curve(20, 64, 0.3), curve(1, 64, 0.01), target_error=3.0)
    simulation = Simulation(machine, noise=0.5)
    planner = adaptive(simulation)
    planned, _ = both(simulation, planner, range(80))
    for one in planned[40:]:
        assert one.report.target_predicted_ns == pytest.approx(one.target.cost.forward_ns, rel=0.08)
    passes = [len(one.target.costs) for one in planned[40:]]
    assert np.mean([one.report.expected_passes for one in planned[40:]]) == pytest.approx(np.mean(passes), abs=0.3)


@pytest.mark.parametrize("mode", [Mode.STRICT, Mode.EXACT_SAMPLING])
def test_no_experience_changes_a_list(mode: Mode) -> None:
    for machine in (FLAT, STEEP):
        simulation = Simulation(machine, noise=1.0)
        planner = adaptive(simulation, explored_share=0.5)
        for user in range(25):
            assert simulation.serve(planner, user, mode=mode).list == simulation.serve(None, user, mode=mode).list


def test_further_plans_have_a_share_of_the_budget() -> None:
    simulation = Simulation(FLAT, noise=1.0)
    planner = adaptive(simulation)
    trie = simulation.catalogue.trie
    planning = planner.planning(Mode.STRICT, PlanContext(10, PROMPT_TOKENS, PROMPT_TOKENS))
    first = planning.size(Beams.root())
    children = trie.children(0)[:5].astype(np.int64)
    second = planning.size(Beams(children, *(np.zeros(5) for _ in range(3))))
    assert first is not None
    assert second is not None
    assert second.max_nodes <= 60 < 240


@pytest.mark.parametrize(
    ("beam_width", "levels", "nodes"), [(20, 4, 120), (20, 3, 80), (50, 4, 240), (1, 2, 2), (5, 1, 1)]
)
def test_a_fixed_budget_grows_with_the_beams(beam_width: int, levels: int, nodes: int) -> None:
    """Two nodes for each beam of each planned level, at most 240, and no share per level."""
    simulation = Simulation(FLAT, noise=0.0, items=30, codes=(4,) * levels)
    planner = Planner(simulation.catalogue.trie, PlanLimits(kind=PlannerKind.FIXED))
    sized = planner.planning(Mode.STRICT, PlanContext(beam_width, 1, 1)).size(Beams.root())
    assert sized == PlanSize(beam_width, width=nodes, max_nodes=nodes)


@pytest.mark.parametrize("mode", [Mode.RELAXED_SAMPLING, Mode.TARGET_ONLY])
def test_what_cannot_be_cut_has_a_fixed_size(mode: Mode) -> None:
    planner = adaptive(Simulation(STEEP, noise=0.0))
    assert type(planner.planning(mode, PlanContext(10, 8, 8))) is FixedPlanSizer


def test_until_the_curves_are_known_plans_have_a_fixed_size() -> None:
    simulation = Simulation(FLAT, noise=0.3)
    planner = Planner(simulation.catalogue.trie, PlanLimits())
    served = simulation.serve(planner, 0)
    assert served.report.nodes_asked == 40
    assert (served.report.target_predicted_ns, served.report.expected_passes) == (0, 0)


def test_a_draft_that_fails_teaches_nothing_and_changes_nothing() -> None:
    simulation = Simulation(replace(FLAT, draft_fails=True), noise=0.3)
    planner = adaptive(simulation)
    for user in range(5):
        served = simulation.serve(planner, user)
        assert (served.list, served.report.nodes_proposed) == (simulation.serve(None, user).list, 0)


def test_models_that_are_known_are_planned_for_with_what_was_learnt(tmp_path: Path) -> None:
    """Of a canary that becomes stable, and of a catalogue that changes; other models begin anew."""
    manifest = write_bundle(tmp_path, random_catalogue(20, (4, 4, 4), seed=0)).bundle.manifest
    trie = random_catalogue(30, (4, 4, 4), seed=1).trie
    planners, task = Planners(PlanLimits()), PlanContext(beam_width=4, prompt_tokens=8)
    first = planners.of(manifest, trie)
    first.measure_by(STEEP.target, STEEP.draft)
    other = manifest.model_copy(update={"target": manifest.target.model_copy(update={"fingerprint": "other"})})
    changed = manifest.model_copy(update={"catalogue_version": "changed"})
    assert isinstance(planners.of(changed, trie).planning(Mode.STRICT, task), AdaptivePlanSizer)
    assert not isinstance(planners.of(other, trie).planning(Mode.STRICT, task), AdaptivePlanSizer)
