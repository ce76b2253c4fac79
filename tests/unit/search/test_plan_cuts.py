"""Cuts of a plan: the least expected latency by definition, and the same list."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.scoring import Perturbation, ScoringRule
from atspeed.engine.search.trie import Pruning
from atspeed.engine.speculation.acceptance_model import PlanPrefixes, RequiredDepth, WorkloadKey
from orchestrator.planning.adaptive_sizer import AdaptivePlanSizer
from orchestrator.planning.plan_passes import PlanPasses
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext
from orchestrator.planning.planner_state import ModelLatencies, PlannerState
from orchestrator.planning.sized_draft import SizedDraft
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.policies import ExactSampling, Policy, Strict
from tests.oracles.simulation import (
    FLAT,
    PROMPT_TOKENS,
    STEEP,
    SimulatedDraft,
    Simulation,
    curve,
)
from tests.oracles.worlds import ScriptedDraft, TableTarget, World, beam_widths, naive_tries, nothing, run_now
from tests.profiles import either

NOISE = Perturbation(seed=5, temperature=0.8)
USELESS = 30.0


class RandomSizer(FixedPlanSizer):
    """Plan sizer that decides at random: to draft or not, how much, and which cut the target gets."""

    def __init__(self, world: World, widths: BeamWidths, seed: int) -> None:
        super().__init__(world.trie, PlanContext(widths, PROMPT_TOKENS, PROMPT_TOKENS), 1, None)
        self._rng = np.random.default_rng(seed)

    def size(self, below: Beams) -> PlanSize | None:
        return self._asked(int(self._rng.integers(1, 30))) if self._rng.random() < 0.8 else None

    def _keep(self, below: Beams, asked: PlanSize, plan: Plan, cost: PassStats) -> Plan:
        count = self._rng.integers(0, len(plan.node) + 1)
        return plan.take(np.sort(PlanPrefixes.of(plan, complete=True).order[:count]))


@settings(max_examples=either(25, 100))
@given(
    naive_tries(levels=(2, 3, 4), max_items=30),
    st.sampled_from(ScoringRule),
    beam_widths,
    st.integers(0, 2**32),
    st.booleans(),
)
def test_plan_cut_by_any_decision_keeps_the_list(naive, rule, widths: BeamWidths, seed: int, sampled: bool) -> None:  # type: ignore[no-untyped-def]
    """The draft is unrelated to the target, and every decision is random."""
    truth, guess = World.random(naive, rule, seed), World.random(naive, rule, seed + 1)
    policy: Policy = ExactSampling(widths, NOISE) if sampled else Strict(widths)
    noise = policy.noise if policy.perturbed else None

    def search(draft) -> list[tuple[int, float]]:  # type: ignore[no-untyped-def]
        target = TableTarget(truth, Pruning.none(), policy.max_children, noise)
        leaves = run_now(beam_search(truth.trie, truth.rule, policy, target, draft)).leaves
        return list(zip(leaves.node.tolist(), leaves.score.tolist(), strict=True))

    drafting = SimulatedDraft(guess, FLAT, policy.proposal, policy.noise, lambda plan: plan)
    alone = TableTarget(truth, Pruning.none(), None)
    planned = search(SizedDraft(drafting, RandomSizer(truth, widths, seed), alone))
    assert planned == search(ScriptedDraft(truth.trie, nothing))


@settings(max_examples=either(15, 30))
@given(st.integers(0, 2**32), st.lists(st.integers(1, 20), min_size=1, max_size=3), st.floats(0.0, 2.0))
def test_cut_has_the_least_expected_latency_of_all_cuts(seed: int, listed: list[int], ms_per_token: float) -> None:
    """Every cut, of the first levels and of all levels, is evaluated from the definition: the pass, and each first miss."""
    rng, simulation, widths = np.random.default_rng(seed), SIMULATION, BeamWidths.of(*listed)
    state, workload = _state(rng, curve(10, 8, ms_per_token), widths)
    context = PlanContext(widths, PROMPT_TOKENS, PROMPT_TOKENS)
    drafting = simulation.draft(int(rng.integers(100)), Proposal.TOP)
    asked = PlanSize(widths, int(rng.integers(1, 100)), 100)
    plan = run_now(drafting.plan(Beams.root(), asked))
    sizer = AdaptivePlanSizer(simulation.catalogue.trie, context, 40, 240, workload, state)
    kept = sizer.cut(Beams.root(), asked, plan, drafting.usage.costs[-1])
    kept.check(simulation.catalogue.trie, limit=len(plan.node))
    depth, costs, of_kept = simulation.catalogue.trie.depth(plan.node), [], []
    for levels in range(1, simulation.catalogue.trie.levels):
        part = plan.take(np.flatnonzero(depth <= levels))
        order = np.argsort(-part.margin, kind="stable")
        for n in range(len(order) + 1):
            cut = part.take(np.sort(order[:n]))
            costs.append(
                _expected_ns(state, workload, context, cut, part, levels, complete=len(plan.node) < asked.max_nodes)
            )
            if cut.node.tolist() == kept.node.tolist():
                of_kept.append(costs[-1])
    assert min(of_kept) == pytest.approx(min(costs), rel=1e-9)


SIMULATION = Simulation(STEEP, noise=0.7)


def _state(rng: np.random.Generator, target: object, widths: BeamWidths) -> tuple[PlannerState, WorkloadKey]:
    trie = SIMULATION.catalogue.trie
    latencies = ModelLatencies(target, STEEP.draft, PlanPasses())  # type: ignore[arg-type]
    state, workload = PlannerState(latencies, trie.levels, 240, 0.01, 4.0), WorkloadKey.of(Mode.STRICT, widths)
    for _ in range(50):
        seen = [
            RequiredDepth(float(rng.exponential()), censored=bool(rng.random() < 0.3)) for _ in range(trie.levels - 1)
        ]
        state.acceptance.learn(workload, 0, seen)
    for level in range(1, trie.levels):
        for mostly in (False, True):
            state.remaining_work.add(workload, level, float(rng.uniform(0.2, 1.2)), mostly=mostly)
    return state, workload


def _expected_ns(
    state: PlannerState,
    workload: WorkloadKey,
    context: PlanContext,
    kept: Plan,
    plan: Plan,
    levels: int,
    *,
    complete: bool,
) -> float:
    """Return the expected time of the target with a part of a plan. complete: true if the draft had room for more nodes."""
    trie, target = SIMULATION.catalogue.trie, state.latencies.target
    beams = [1, *(context.beam_widths.at(level) for level in range(1, trie.levels))]
    sizes = np.minimum(beams, np.diff(trie.level_start)[: trie.levels]).tolist()
    without = [
        sum(float(target.call_ns(size, PROMPT_TOKENS, size)) for size in sizes[level:]) for level in range(trie.levels)
    ]

    def remaining_ns(level: int, *, mostly: bool) -> float:
        ratios, levels = state.remaining_work, range(level, level + 1)
        ratio = (ratios.mostly_missed if mostly else ratios.partly_missed)(workload, levels)
        return float(ratio[0]) * without[level]

    total = float(target.forward_ns(PROMPT_TOKENS + len(kept.node), 0))
    whole_margins = {
        margin
        for margin in kept.margin.tolist()
        if (kept.margin == margin).sum() == (plan.margin == margin).sum() and (margin != plan.margin.min() or complete)
    }
    depth = -min(whole_margins) if whole_margins else -np.inf
    missed = state.acceptance.missed(workload, 0, np.array([max(depth, -1e6) if whole_margins else -np.inf]))[:, 0]
    above, planned = 0.0, trie.depth(kept.node)
    for level, probability in enumerate(missed.tolist()[:levels], start=1):
        few = 2 * int((planned == level).sum()) < sizes[level]
        total += (probability - above) * remaining_ns(level, mostly=few)
        above = probability
    return total + ((1.0 - above) * remaining_ns(levels + 1, mostly=True) if levels + 1 < trie.levels else 0.0)
