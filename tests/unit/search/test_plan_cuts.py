"""Which part of a plan the target gets: the one that costs least by definition, and never at the price of another list."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.scoring import Perturbation, ScoringRule
from atspeed.engine.search.trie import Pruning
from atspeed.engine.speculation.acceptance_model import PlanPrefixes, Requirement, WorkloadKey
from atspeed.engine.speculation.latency_model import LatencyModel
from orchestrator.planning.adaptive_sizer import AdaptivePlanSizer
from orchestrator.planning.model_costs import ModelCosts
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext
from orchestrator.planning.planner_state import PlannerState
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
from tests.oracles.worlds import ScriptedDraft, TableTarget, World, naive_tries, nothing

NOISE = Perturbation(seed=5, temperature=0.8)
USELESS = 30.0


class AnyPlanning(FixedPlanSizer):
    """Decides at random: whether to draft, how much, and which cut the target gets."""

    def __init__(self, world: World, width: int, seed: int) -> None:
        super().__init__(world.trie, PlanContext(width, PROMPT_TOKENS, PROMPT_TOKENS), 1, None)
        self._rng = np.random.default_rng(seed)

    def size(self, below: Beams) -> PlanSize | None:
        return self._sized(int(self._rng.integers(1, 30))) if self._rng.random() < 0.8 else None

    def _keep(self, below: Beams, asked: PlanSize, plan: Plan, cost: PassStats) -> Plan:
        count = self._rng.integers(0, len(plan.node) + 1)
        return plan.take(np.sort(PlanPrefixes.of(plan, complete=True).order[:count]))


@settings(max_examples=100)
@given(
    naive_tries(levels=(2, 3, 4), max_items=30),
    st.sampled_from(ScoringRule),
    st.integers(1, 6),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_no_decision_changes_a_list(naive, rule, width: int, seed: int, sampled: bool) -> None:  # type: ignore[no-untyped-def]
    """Any catalogue, any target, a draft that has nothing to do with it, and any decision at every miss."""
    truth, guess = World.random(naive, rule, seed), World.random(naive, rule, seed + 1)
    policy: Policy = ExactSampling(width, NOISE) if sampled else Strict(width)
    noise = policy.noise if policy.perturbed else None

    def search(draft) -> list[tuple[int, float]]:  # type: ignore[no-untyped-def]
        target = TableTarget(truth, Pruning.none(), policy.max_children, noise)
        leaves = asyncio.run(beam_search(truth.trie, truth.rule, policy, target, draft)).leaves
        return list(zip(leaves.node.tolist(), leaves.score.tolist(), strict=True))

    drafting = SimulatedDraft(guess, FLAT, policy.proposal, policy.noise, lambda plan: plan)
    planned = search(SizedDraft(drafting, AnyPlanning(truth, width, seed), TableTarget(truth, Pruning.none(), None)))
    assert planned == search(ScriptedDraft(truth.trie, nothing))


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 20), st.floats(0.0, 2.0))
def test_the_cut_is_the_cheapest_of_all(seed: int, width: int, ms_per_token: float) -> None:
    """Against every cut one by one, of the first levels alone and of all, each costed from the definition: the pass, and for each
    level, to miss it first.
    """
    rng, simulation = np.random.default_rng(seed), SIMULATION
    experience, kind = _experience(rng, curve(10, 8, ms_per_token), width)
    task = PlanContext(width, PROMPT_TOKENS, PROMPT_TOKENS)
    drafting = simulation.draft(int(rng.integers(100)), Proposal.TOP)
    asked = PlanSize(width, int(rng.integers(1, 100)), 100)
    plan = asyncio.run(drafting.plan(Beams.root(), asked))
    planning = AdaptivePlanSizer(simulation.catalogue.trie, task, 40, 240, kind, experience)
    kept = planning.cut(Beams.root(), asked, plan, drafting.usage.costs[-1])
    kept.check(simulation.catalogue.trie, limit=len(plan.node))
    depth, costs, of_kept = simulation.catalogue.trie.depth(plan.node), [], []
    for levels in range(1, simulation.catalogue.trie.levels):
        part = plan.take(np.flatnonzero(depth <= levels))
        order = np.argsort(-part.margin, kind="stable")
        for n in range(len(order) + 1):
            cut = part.take(np.sort(order[:n]))
            costs.append(_cost(experience, kind, task, cut, part, levels, complete=len(plan.node) < asked.max_nodes))
            if cut.node.tolist() == kept.node.tolist():
                of_kept.append(costs[-1])
    assert min(of_kept) == pytest.approx(min(costs), rel=1e-9)


SIMULATION = Simulation(STEEP, noise=0.7)


def _experience(rng: np.random.Generator, target: object, width: int) -> tuple[PlannerState, WorkloadKey]:
    trie = SIMULATION.catalogue.trie
    costs = ModelCosts(LatencyModel(target), LatencyModel(STEEP.draft))  # type: ignore[arg-type]
    experience, kind = PlannerState(costs, trie.levels, 240, 0.01, 4.0), WorkloadKey.of(Mode.STRICT, width)
    for _ in range(50):
        seen = [
            Requirement(float(rng.exponential()), censored=bool(rng.random() < 0.3)) for _ in range(trie.levels - 1)
        ]
        experience.coverage.learn(kind, 0, seen)
    for level in range(1, trie.levels):
        for whole in (False, True):
            experience.further.add(kind, level, float(rng.uniform(0.2, 1.2)), whole=whole)
    return experience, kind


def _cost(
    experience: PlannerState,
    kind: WorkloadKey,
    task: PlanContext,
    kept: Plan,
    plan: Plan,
    levels: int,
    *,
    complete: bool,
) -> float:
    """Nanoseconds expected of the target with a part of a plan of so many levels. complete: the draft had room for more."""
    trie, target = SIMULATION.catalogue.trie, experience.costs.target
    sizes = [min(task.beam_width, int(np.diff(trie.level_start)[level])) for level in range(trie.levels)]
    without = [
        sum(float(target.call(size, PROMPT_TOKENS, size)) for size in sizes[level:]) for level in range(trie.levels)
    ]

    def share(level: int, *, whole: bool) -> float:
        further, levels = experience.further, range(level, level + 1)
        return float((further.wholly if whole else further.partly)(kind, levels)[0]) * without[level]

    total = float(target.forward(PROMPT_TOKENS + len(kept.node), 0))
    whole_margins = {
        margin
        for margin in kept.margin.tolist()
        if (kept.margin == margin).sum() == (plan.margin == margin).sum() and (margin != plan.margin.min() or complete)
    }
    depth = -min(whole_margins) if whole_margins else -np.inf
    missed = experience.coverage.missed(kind, 0, np.array([max(depth, -1e6) if whole_margins else -np.inf]))[:, 0]
    above, planned = 0.0, trie.depth(kept.node)
    for level, probability in enumerate(missed.tolist()[:levels], start=1):
        few = 2 * int((planned == level).sum()) < sizes[level]
        total += (probability - above) * share(level, whole=few)
        above = probability
    return total + ((1.0 - above) * share(levels + 1, whole=True) if levels + 1 < trie.levels else 0.0)
