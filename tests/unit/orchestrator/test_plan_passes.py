"""Plans of one draft pass: predicted calls come true, and the planner asks where a pass per level would not pay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from atspeed.engine.bundle.manifest import LEVEL_HEADS, ModelEntry
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.mode import Mode
from atspeed.engine.speculation.latency_model import LatencyModel
from orchestrator.planning.plan_passes import PlanPasses, PlanPlace
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext
from orchestrator.planning.planner import PlanLimits, Planner
from orchestrator.planning.planner_state import ModelLatencies
from tests.catalogues import random_catalogue
from tests.oracles.simulation import MILLISECOND, PROMPT_TOKENS, Heads, Machine, Served, Simulation, curve
from tests.placeholder_bundles import placeholder_bundle

DRAFT = curve(2, 16, 0.05)
CHEAP = Heads(level_ms=0.2, node_ms=0.01)
FOUR_LEVELS = (8, 6, 5, 5)


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    """A draft with heads, as a manifest describes it."""
    folder = tmp_path_factory.mktemp("bundle")
    draft = placeholder_bundle(folder, random_catalogue(20, (4, 4, 4), seed=0)).manifest.draft
    assert draft is not None
    return draft.model_copy(update={"draft_kind": LEVEL_HEADS, "heads": ("draft/head1.onnx", "draft/head2.onnx")})


def planner_of(simulation: Simulation, draft: ModelEntry | None) -> Planner:
    planner = Planner(simulation.catalogue.trie, PlanLimits(), draft)
    planner.set_curves(simulation.machine.target, simulation.machine.draft)
    return planner


def test_passes_follow_the_kind_of_the_draft(entry: ModelEntry) -> None:
    kinds = [None, entry.model_copy(update={"draft_kind": "other"}), entry]
    assert [PlanPasses.of(draft).count(3) for draft in kinds] == [3, 3, 1]


def test_call_before_the_first_one_is_a_pass_over_the_prompt() -> None:
    """A plan at the root and one below beams take the same pass, whatever their nodes and levels."""
    nodes = np.array([1, 50, 200])
    root = PlanPasses(one=True).expected_ns(LatencyModel(DRAFT), PlanPlace(0, 1, 3), nodes, 100, computed_share=0.5)
    assert root.tolist() == [float(DRAFT.predict(50, 50))] * 3
    below = PlanPasses(one=True).expected_ns(LatencyModel(DRAFT), PlanPlace(2, 40, 1), nodes, 100, computed_share=0.5)
    assert below.tolist() == [float(DRAFT.predict(8, 92))] * 3


@pytest.mark.parametrize("error", [0.5, 1.0, 3.0])
def test_calls_are_learned_by_level_and_by_node(error: float) -> None:
    """Plans of one to three levels, of all sizes, on a machine that is faster or slower than its curve."""
    rng, latency, passes = np.random.default_rng(0), LatencyModel(DRAFT), PlanPasses(one=True)

    def call_ns(levels: int, nodes: int) -> tuple[int, int]:
        """The time in the model, and of the whole call."""
        forward = int(error * float(DRAFT.predict(30, 70)))
        return forward, forward + int(MILLISECOND * (0.3 + 0.4 * levels + 0.02 * nodes))

    for _ in range(400):
        place, nodes = PlanPlace(0, 1, int(rng.integers(1, 4))), int(rng.integers(1, 200))
        forward, wait = call_ns(place.levels, nodes)
        stats = PassStats(forward_ns=forward, new_tokens=30, cached_tokens_by_tier={"memory": 70})
        latency.observe(passes.made(place, nodes, 100, stats), stats, wait)
    for levels in (1, 2, 3):
        expected = passes.expected_ns(latency, PlanPlace(0, 1, levels), np.array([5, 60, 180]), 100, computed_share=0.3)
        assert expected == pytest.approx([call_ns(levels, nodes)[1] for nodes in (5, 60, 180)], rel=0.02)


class FixedPlanner:
    """A planner whose plans have random sizes, with estimates that the test can read."""

    def __init__(self, simulation: Simulation, passes: PlanPasses) -> None:
        machine = simulation.machine
        self._trie = simulation.catalogue.trie
        self._rng = np.random.default_rng(0)
        self.latencies = ModelLatencies(machine.target, machine.draft, passes)

    def sizer(self, mode: Mode, context: PlanContext) -> FixedPlanSizer:
        """A sizer of a random size."""
        return FixedPlanSizer(self._trie, context, int(self._rng.integers(10, 120)), self.latencies)

    def expected_ns(self, nodes: int) -> float:
        """The time of a call for a plan of all levels at the root."""
        place, latencies = PlanPlace(0, 1, self._trie.levels - 1), self.latencies
        share = latencies.draft_computed_share.value
        return float(latencies.plan_passes.expected_ns(latencies.draft, place, np.array(nodes), PROMPT_TOKENS, share))


def test_predictions_of_served_plans_come_true() -> None:
    """The pass is right from the first plan on, the whole call once the time of the heads is known."""
    machine = Machine(curve(20, 64, 0.3), DRAFT, heads=Heads(0.7, 0.03))
    simulation = Simulation(machine, noise=0.2, items=2000, codes=(32, 32, 8, 4))
    planner = FixedPlanner(simulation, PlanPasses(one=True))
    errors: list[float] = []
    for turn in range(120):
        served = simulation.serve(planner, turn % 10)  # type: ignore[arg-type]
        assert served.draft.passes == len(served.draft.costs)
        assert served.report.draft_predicted_ns == pytest.approx(served.draft.cost.forward_ns, rel=1e-6)
        if turn >= 80 and len(served.draft.waits) == 1:  # the plan at the root held all that was needed
            errors.append(planner.expected_ns(served.report.nodes_asked) / served.draft.wait_ns - 1)
    assert len(errors) >= 10
    assert abs(float(np.mean(errors))) < 0.03
    assert float(np.mean(np.abs(errors))) < 0.06


def asked(served: list[Served]) -> list[int]:
    return [one.report.nodes_asked for one in served]


def test_planner_asks_for_plans_of_one_pass_that_would_not_pay_with_a_pass_per_level(entry: ModelEntry) -> None:
    """A pass of the draft takes 22 ms, and the target alone four passes of 20 ms."""
    machine = Machine(curve(20, 1000, 0.0), curve(22, 1000, 0.0), heads=CHEAP)
    with_heads = Simulation(machine, noise=0.3, codes=FOUR_LEVELS)
    planner = planner_of(with_heads, entry)
    served = [with_heads.serve(planner, user) for user in range(30)]
    assert all(asked(served))
    alone = [with_heads.serve(None, user) for user in range(30)]
    assert [one.list for one in served] == [one.list for one in alone]
    assert np.mean([one.milliseconds for one in served[10:]]) < 0.6 * np.mean([one.milliseconds for one in alone[10:]])
    language_model = Simulation(replace(machine, heads=None), noise=0.3, codes=FOUR_LEVELS)
    planner = planner_of(language_model, None)
    assert sum(nodes > 0 for nodes in asked([language_model.serve(planner, user) for user in range(30)])) < 6


def test_planner_with_dear_heads_asks_for_less(entry: ModelEntry) -> None:
    """Nodes cost the target nothing, so only the heads limit a plan. At first all plans are large, and show no cost of a node."""
    means = []
    for node_ms in (0.0, 0.1):
        machine = Machine(curve(12, 1000, 0.0), DRAFT, heads=Heads(0.2, node_ms))
        simulation = Simulation(machine, noise=0.1, items=2000, codes=(32, 32, 8, 4))
        planner = planner_of(simulation, entry)
        served = [simulation.serve(planner, turn % 10) for turn in range(60)]
        means.append(np.mean(asked(served[30:])))
    assert means[1] < 0.7 * means[0]


def test_planner_for_another_catalogue_keeps_the_kind_of_draft(entry: ModelEntry) -> None:
    """A planner that knows no curves yet gets them later."""
    machine = Machine(curve(20, 1000, 0.0), curve(18, 1000, 0.0), heads=CHEAP)
    simulation = Simulation(machine, noise=0.3, codes=FOUR_LEVELS)
    planner = Planner(random_catalogue(30, FOUR_LEVELS, seed=3).trie, PlanLimits(), entry)
    planner = planner.for_catalogue(simulation.catalogue.trie)
    planner.set_curves(machine.target, machine.draft)
    context = PlanContext(BeamWidths.of(10), PROMPT_TOKENS, PROMPT_TOKENS)
    assert type(planner.sizer(Mode.STRICT, context)) is not FixedPlanSizer
    assert all(asked([simulation.serve(planner, user) for user in range(5)]))
