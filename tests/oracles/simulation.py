"""Simulated requests: tables in place of models, and curves in place of a clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from operator import add
from types import SimpleNamespace

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_session import Found, PassProgram, Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.scoring import Evaluation, Perturbation, ScoringRule
from atspeed.engine.search.trie import Pruning
from draft_service.drafter import DraftRequest
from draft_service.language_model_drafter import LanguageModelDrafter
from orchestrator.degraded_reason import DegradedReason
from orchestrator.planning.plan_sizer import PlanContext, PlanningReport
from orchestrator.planning.planner import Planner
from orchestrator.planning.sized_draft import SizedDraft
from orchestrator.planning.usage import Usage
from orchestrator.search.beam_loop import Draft, beam_search
from orchestrator.search.policies import ExactSampling, Policy, Strict, Tolerance
from tests.catalogues import random_catalogue
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import ScriptedDraft, TableTarget, World, nothing, run_now, run_steps

MILLISECOND = 1_000_000
PROMPT_TOKENS = 8
Distort = Callable[[Plan], Plan]


def curve(floor_ms: float, flat_tokens: int, ms_per_token: float) -> CostCurve:
    """Return the curve of passes that take `floor_ms` up to `flat_tokens` tokens, and `ms_per_token` for each further one."""
    sizes = [1, 4, 16, 64, 128, 256]
    cost = [floor_ms + ms_per_token * max(0, size - flat_tokens) for size in sizes]
    return CostCurve.smoothed(sizes, [0], np.array(cost)[:, None] * MILLISECOND)


@dataclass(frozen=True)
class Heads:
    """Time of a draft's heads after its pass over the prompt.

    Attributes:
        level_ms: of each level that is evaluated below the root.
        node_ms: of each node that is.
    """

    level_ms: float
    node_ms: float


@dataclass(frozen=True)
class Machine:
    """Machine with known times.

    Attributes:
        target: the target's published cost curve.
        draft: the draft's published cost curve.
        target_error: ratio of the target's times to its curve.
        call_ms: overhead of a call.
        draft_fails: true if no plan arrives.
        batch_occupancy: requests of the same size that share every pass.
        target_queue_ms: wait of each target pass.
        draft_queue_ms: wait of each draft pass.
        heads: times of a draft of one pass; None for a language model.
    """

    target: CostCurve
    draft: CostCurve
    target_error: float = 1.0
    call_ms: float = 0.3
    draft_fails: bool = False
    batch_occupancy: int = 1
    target_queue_ms: float = 0.0
    draft_queue_ms: float = 0.0
    heads: Heads | None = None

    def cost(self, of: CostCurve, new: int, error: float = 1.0) -> PassStats:
        """Return the stats of a pass in which a request has so many tokens."""
        tokens = self.batch_occupancy * new
        forward = int(float(of.predict(tokens)) * error)
        return PassStats(forward_ns=forward, new_tokens=new, batch_requests=self.batch_occupancy, batch_tokens=tokens)


# FLAT: all passes take the same time. STEEP: passes pay by the token. DEAR: the draft takes as long as the target.
FLAT = Machine(curve(20, 1000, 0.0), curve(0.5, 1000, 0.0))
STEEP = Machine(curve(10, 8, 1.0), curve(1, 8, 0.1))
DEAR = Machine(curve(10, 8, 1.0), curve(10, 8, 1.0))


@dataclass(frozen=True)
class Served:
    """Served request.

    Attributes:
        list: its list as (leaf, score).
        target: use of the target.
        draft: use of the draft.
        report: the planner's report.
    """

    list: list[tuple[int, float]]
    target: Usage
    draft: Usage
    report: PlanningReport

    @property
    def milliseconds(self) -> float:
        """Return the time of waiting for the models, which is all that a plan can change."""
        return (self.target.wait_ns + self.draft.wait_ns) / MILLISECOND


class SimulatedDraft:
    """Drafter over a table, with the interface of a draft session."""

    def __init__(
        self,
        world: World,
        machine: Machine,
        proposal: Proposal,
        noise: Perturbation | None,
        distort: Distort = lambda plan: plan,
        pruning: Pruning | None = None,
    ) -> None:
        self.usage = Usage()
        self.prompt_tokens = PROMPT_TOKENS
        self.degraded_reason: DegradedReason | None = None
        self.trie = world.trie
        self.rule = world.rule
        self.entry = SimpleNamespace(plan_scale=None)
        self._world = world
        self._machine = machine
        self._proposal = proposal
        self._noise = noise
        self._distort = distort
        self._pruning = pruning or Pruning.none()
        self._heads_ms = 0.0

    async def plan(self, below: Beams, size: PlanSize, seconds: float = math.inf) -> Plan:
        """Return a plan, and record the call."""
        prompt, order = np.array([1], dtype=np.int64), np.argsort(below.node)
        asked = DraftRequest(prompt, below.take(order), size, self._proposal, self._pruning, self._noise)
        drafted = await LanguageModelDrafter(self).plan(asked)  # type: ignore[arg-type]
        passes = min(1, drafted.passes) if self._machine.heads else drafted.passes
        cost = replace(drafted.cost, queue_ns=int(passes * self._machine.draft_queue_ms * MILLISECOND))
        call_ms, self._heads_ms = self._machine.call_ms + self._heads_ms, 0.0
        self.usage.waits.append(cost.forward_ns + cost.queue_ns + int(call_ms * MILLISECOND))
        self.usage.passes += passes
        if self._machine.draft_fails:
            return Plan.empty(below)
        self.usage.costs.append(cost)
        plan = self._distort(drafted.plan)
        plan.check(self.trie, limit=size.max_nodes)
        return plan

    async def open(self, prompt: Int64, *, tenant: str = "", user_key: str = "") -> None:
        """Open nothing; part of the interface of a TreeEvaluator."""

    def end(self, tree: None) -> None:
        """End nothing; part of the interface of a TreeEvaluator."""

    async def run_steps(self, tree: None, steps: PassProgram[Found], selection: Selection) -> tuple[Found, PassStats]:
        """Run pass after pass, like a TreeEvaluator."""
        costs = [PassStats()]

        def evaluate(nodes: Int64) -> Evaluation:
            first, heads = nodes[0] == 0, self._machine.heads
            if heads and len(below := nodes[nodes != 0]):
                levels = len(np.unique(self.trie.depth(below)))
                self._heads_ms += heads.level_ms * levels + heads.node_ms * len(below)
            if first or not heads:
                read = 1 if heads else len(nodes)  # the root has no token: the prompt's last one gives its scores
                costs.append(self._machine.cost(self._machine.draft, read + (PROMPT_TOKENS - 1 if first else 0)))
            return self._world.evaluate(nodes, selection.pruning, selection.limit, selection.perturbation)

        return run_steps(steps, evaluate), reduce(add, costs)


@dataclass
class SimulatedTarget:
    """TableTarget that records the time of its passes."""

    table: TableTarget
    machine: Machine
    usage: Usage = field(default_factory=Usage)

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Evaluate nodes in one pass; the first one reads the prompt."""
        new = len(nodes) + (PROMPT_TOKENS - 1 if nodes[0] == 0 else 0)
        cost = self.machine.cost(self.machine.target, new, self.machine.target_error)
        cost = replace(cost, queue_ns=int(self.machine.target_queue_ms * MILLISECOND))
        self.usage.costs.append(cost)
        self.usage.waits.append(cost.forward_ns + cost.queue_ns + int(self.machine.call_ms * MILLISECOND))
        return await self.table.evaluate(nodes)


class Simulation:
    """Users with a random target each, and a draft with so much noise on every logit."""

    def __init__(
        self, machine: Machine, *, noise: float, items: int = 300, codes: tuple[int, ...] = (16, 12, 10)
    ) -> None:
        self.machine = machine
        self.noise = noise
        self.catalogue = random_catalogue(items, codes, seed=1)
        paths = {self.catalogue.id_of(n): tuple(self.catalogue.codes[n].tolist()) for n in range(items)}
        self._naive = NaiveTrie(paths, codes)
        # Requests of one user follow each other: with and without a planner, and again.
        self._worlds = lru_cache(maxsize=128)(self._new_worlds)

    def serve(
        self,
        planner: Planner | None,
        user: int,
        *,
        mode: Mode = Mode.STRICT,
        width: int = 10,
        distort: Distort = lambda plan: plan,
    ) -> Served:
        """Serve one request; without a planner, by the target alone."""
        target_world, draft_world = self._worlds(user)
        policy = _policy(mode, width)
        table = TableTarget(target_world, Pruning.none(), policy.max_children, policy.noise)
        target = SimulatedTarget(table, self.machine)
        draft = SimulatedDraft(draft_world, self.machine, policy.proposal, policy.noise, distort)
        alone: Draft = ScriptedDraft(target_world.trie, nothing)
        sizer = (
            planner.sizer(mode, PlanContext(BeamWidths.of(width), PROMPT_TOKENS, PROMPT_TOKENS)) if planner else None
        )
        behind = SizedDraft(draft, sizer, table) if sizer else alone
        result = run_now(beam_search(target_world.trie, ScoringRule.VOCAB, policy, target, behind))
        if sizer:
            sizer.learn(result.memo, target.usage, draft.usage)
        leaves = result.leaves
        found = list(zip(leaves.node.tolist(), leaves.score.tolist(), strict=True))
        return Served(found, target.usage, draft.usage, sizer.report if sizer else PlanningReport())

    def draft(self, user: int, proposal: Proposal) -> SimulatedDraft:
        """Return the draft of a user."""
        return SimulatedDraft(self._worlds(user)[1], self.machine, proposal, None, lambda plan: plan)

    def _new_worlds(self, user: int) -> tuple[World, World]:
        rng, trie = np.random.default_rng(user), self.catalogue.trie
        logits = rng.normal(size=(trie.nodes, trie.columns)) * 1.5
        drafted = logits + self.noise * rng.normal(size=logits.shape)
        return self._world(logits), self._world(drafted)

    def _world(self, logits: np.ndarray) -> World:
        normalizer = np.log(np.exp(logits).sum(axis=1))
        return World(
            self._naive, self.catalogue, ScoringRule.VOCAB, logits.astype(np.float32), normalizer.astype(np.float32)
        )


def _policy(mode: Mode, width: int) -> Policy:
    if mode is Mode.EXACT_SAMPLING:
        return ExactSampling(BeamWidths.of(width), Perturbation(seed=5, temperature=0.8))
    return Tolerance(BeamWidths.of(width), 0.3) if mode is Mode.TOLERANCE else Strict(BeamWidths.of(width))
