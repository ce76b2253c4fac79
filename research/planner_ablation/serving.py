"""Simulated services: the product's code on a simulated machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Protocol

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_session import PassProgram, Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.scoring import Children, Evaluation, ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning, among
from atspeed.engine.speculation.autonomous_search import AutonomousSearch
from atspeed.engine.speculation.latency_model import LatencyModel, Pass
from atspeed.engine.speculation.target_prefetch import TargetPrefetcher
from draft_service.drafter import DraftRequest
from draft_service.language_model_drafter import LanguageModelDrafter
from orchestrator.degraded_reason import DegradedReason
from orchestrator.planning.adaptive_sizer import AdaptivePlanSizer
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext
from orchestrator.planning.planner import PlanLimits
from orchestrator.planning.sized_draft import NoDraft, SizedDraft
from orchestrator.planning.usage import Usage
from orchestrator.search.beam_loop import Draft, beam_search
from orchestrator.search.policies import Strict
from research.planner_ablation.clock import Clock, Server
from research.planner_ablation.costs import Costs
from research.planner_ablation.users import Model, User

RULE = ScoringRule.VOCAB
MAX_NODES = PlanLimits().max_nodes
# Standard deviation of a pass's time, relative to its curve. Chosen: costs of one size varied by 18 % on real services, in part
# with the length of the prompts, which is equal here.
_TIME_NOISE = 0.1
# Time in which today's planner evaluates the sizes of a level (docs/log.md). Requests that it skips take none.
_EVALUATION_NS = 500_000


class Planner(Protocol):
    """Maker of plan sizers, such as the product's `Planner`."""

    def sizer(self, mode: Mode, context: PlanContext) -> FixedPlanSizer:
        """Return the plan sizer of a request."""


@dataclass
class Machine:
    """Machine on which a candidate serves.

    Attributes:
        costs: its times.
        clock: the clock.
        is_warm: true if only the newest item of a prompt is not cached.
        target, draft: the model processes, each with cores of its own.
    """

    costs: Costs
    clock: Clock
    is_warm: bool
    target: Server = field(init=False)
    draft: Server = field(init=False)

    def __post_init__(self) -> None:
        self.target, self.draft = Server(self.clock), Server(self.clock)

    @property
    def cached_tokens(self) -> int:
        """Return the number of tokens of a prompt that are cached."""
        return self.costs.prompt_tokens - self.costs.new_tokens if self.is_warm else 0


class Passes:
    """Passes of one request on one model.

    Attributes:
        costs: stats of each pass so far.
    """

    def __init__(self, machine: Machine, server: Server, curve: CostCurve, rank: int, seed: int) -> None:
        self.costs: list[PassStats] = []
        self._machine, self._server, self._curve, self._rank = machine, server, curve, rank
        self._rng = np.random.default_rng(seed)

    async def make(self, nodes: Int64, selection_ns: int = 0) -> PassStats:
        """Make a pass over nodes; with the root it also reads the prompt."""
        opens, costs = int(nodes[0]) == ROOT, self._machine.costs
        cached = self._machine.cached_tokens if opens and not self.costs else 0
        new = len(nodes) + (costs.prompt_tokens - cached - 1 if opens and not self.costs else 0)
        noise = float(np.exp(_TIME_NOISE * self._rng.normal()))
        forward_ns = int(float(self._curve.predict(new)) * noise)
        queue_ns = await self._server.run(forward_ns, self._rank)
        if selection_ns:
            await self._machine.clock.sleep(selection_ns)
        tiers = {"memory": cached} if cached else {}
        self.costs.append(PassStats(queue_ns, forward_ns, selection_ns, new, tiers, 1, new))
        return self.costs[-1]


@dataclass(frozen=True)
class DraftedPlan:
    """Plan, and the nodes of the draft's passes."""

    plan: Plan
    passes: list[Int64]


Plans = dict[tuple[bytes, PlanSize], DraftedPlan]
"""Plans of one user by the beams above them and their size: they do not depend on the time, so candidates share them."""


class SimulatedDraft:
    """Draft service for one request, with the interface of a draft session. The drafter is the product's."""

    def __init__(self, machine: Machine, model: Model, passes: Passes, plans: Plans) -> None:
        self.usage = Usage()
        self.prompt_tokens = machine.costs.prompt_tokens
        self.degraded_reason: DegradedReason | None = None
        self._machine, self._model, self._passes, self._plans = machine, model, passes, plans

    async def plan(self, below: Beams, size: PlanSize, seconds: float) -> Plan:  # noqa: ARG002
        """Return a plan of this size. Its passes are one job, each of them a pass of the draft's process."""
        key = below.node.tobytes(), size
        if key not in self._plans:
            self._plans[key] = drafted(self._model, below, size)
        begun, made = self._machine.clock.now_ns, len(self._passes.costs)
        await self._machine.clock.sleep(self._machine.costs.draft_call_ns)
        for nodes in self._plans[key].passes:
            await self._passes.make(nodes)
        self.usage.costs.append(sum(self._passes.costs[made:], PassStats()))
        self.usage.waits.append(self._machine.clock.now_ns - begun)
        return self._plans[key].plan


def drafted(model: Model, below: Beams, size: PlanSize) -> DraftedPlan:
    """Return the plan of the product's drafter."""
    passes: list[Int64] = []

    async def open_tree(prompt: Int64, *, tenant: str = "", user_key: bytes = b"") -> None:
        """Open nothing."""

    async def run_steps(tree: None, steps: PassProgram[Plan], selection: Selection) -> tuple[Plan, PassStats]:  # noqa: ARG001
        try:
            nodes = next(steps)
            while True:
                passes.append(nodes)
                nodes = steps.send(model.evaluate(nodes, selection.limit))
        except StopIteration as end:
            return end.value, PassStats()

    evaluator = SimpleNamespace(
        trie=model.trie,
        rule=RULE,
        entry=SimpleNamespace(plan_scale=None),
        open=open_tree,
        end=lambda _: None,
        run_steps=run_steps,
    )
    order = below.by_node()
    request = DraftRequest(np.array([1]), order, size, Proposal.TOP, Pruning.none())
    coroutine = LanguageModelDrafter(evaluator).plan(request)  # type: ignore[arg-type]  # what a drafter uses of an evaluator
    try:
        coroutine.send(None)
    except StopIteration as end:
        return DraftedPlan(end.value.plan, passes)
    raise AssertionError("the drafter waits for nothing here")


class SearchPrefetcher(Protocol):
    """Prefetcher of one search; see `target_prefetch.SearchPrefetcher`."""

    def nodes(self, beams: Beams, missing: Int64, evaluated: Mapping[int, Children]) -> Int64:
        """Return the nodes of the next pass."""

    def learn(self, used: Sequence[Int64], evaluated: Mapping[int, Children]) -> None:
        """Learn from a search that has ended."""


class Prefetch(Protocol):
    """Rule of target prefetch, for all searches of a target."""

    def for_search(self, widths: BeamWidths, prompt_tokens: int) -> SearchPrefetcher | None:
        """Return the prefetcher of one search; None for none."""

    def observe(self, widths: BeamWidths, made: list[Pass], costs: list[PassStats], waits: list[int]) -> None:
        """Learn from the passes of a search."""


class NoPrefetch:
    """Plain passes only."""

    def for_search(self, widths: BeamWidths, prompt_tokens: int) -> SearchPrefetcher | None:  # noqa: ARG002
        """Return None."""
        return None

    def observe(self, widths: BeamWidths, made: list[Pass], costs: list[PassStats], waits: list[int]) -> None:
        """Learn nothing."""


class AdaptivePrefetch:
    """Target prefetch of the product."""

    def __init__(self, model: Model, curve: CostCurve) -> None:
        self._latency = LatencyModel(curve)
        self._prefetcher = TargetPrefetcher(model.trie, RULE, self._latency, MAX_NODES)

    def for_search(self, widths: BeamWidths, prompt_tokens: int) -> SearchPrefetcher | None:
        """Return the prefetcher of one search."""
        return self._prefetcher.for_search(widths, Pruning.none(), prompt_tokens, enabled=True)

    def observe(self, widths: BeamWidths, made: list[Pass], costs: list[PassStats], waits: list[int]) -> None:  # noqa: ARG002
        """Learn the latency of passes."""
        for one, cost, wait in zip(made, costs, waits, strict=True):
            self._latency.observe([one], cost, wait)


class SimulatedTarget:
    """Target service for one request: the first call starts an autonomous search, as for strict lists in the product."""

    def __init__(self, machine: Machine, model: Model, widths: BeamWidths, prefetch: Prefetch, passes: Passes) -> None:
        self.usage = Usage()
        self._machine, self._model, self._widths = machine, model, widths
        self._prefetch, self._passes = prefetch, passes
        self._made: list[tuple[Evaluation, PassStats, int]] = []

    @property
    def has_next_pass(self) -> bool:
        """Return whether the next pass is there already."""
        return bool(self._made)

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Make a pass, or return the next one of the autonomous search."""
        if not self._made:
            await self._machine.clock.sleep(self._machine.costs.target_call_ns)
            await self._search(nodes)
        evaluation, cost, wait_ns = self._made.pop(0)
        if not among(evaluation.node, nodes).all():
            raise AssertionError("the autonomous search makes the passes that the loop asks for")
        self.usage.costs.append(cost)
        self.usage.waits.append(wait_ns)
        return evaluation

    async def _search(self, nodes: Int64) -> None:
        costs, clock = self._machine.costs, self._machine.clock
        prefetcher = self._prefetch.for_search(self._widths, costs.prompt_tokens)
        steps = AutonomousSearch(self._model.trie, RULE, self._widths, None, prefetcher).steps(nodes)  # type: ignore[arg-type]
        made, waits, cached, call_ns = list[Pass](), list[int](), 0, costs.target_call_ns
        try:
            nodes = next(steps)
            while True:
                begun = clock.now_ns
                cost = await self._passes.make(nodes, costs.target_selection_ns)
                cached += cost.cached_tokens
                made.append(Pass(cost.new_tokens, cached, len(nodes)))
                waits.append(clock.now_ns - begun)
                cached += cost.new_tokens
                evaluation = self._model.evaluate(nodes, self._widths.largest)
                self._made.append((evaluation, cost, waits[-1] + call_ns))
                call_ns = 0
                nodes = steps.send(evaluation)
        except StopIteration:
            self._prefetch.observe(self._widths, made, self._passes.costs, waits)


@dataclass(frozen=True)
class Candidate:
    """Planner, and the prefetch that belongs to it. planner: None for lists without a draft."""

    planner: Planner | None
    prefetch: Prefetch


@dataclass(frozen=True)
class Served:
    """Served request.

    Attributes:
        latency_ns: from its arrival to its list.
        leaves: the list.
        passes: target passes.
        drafted: nodes that the draft proposed.
    """

    latency_ns: int
    leaves: tuple[int, ...]
    passes: int
    drafted: int


async def serve(
    machine: Machine,
    candidate: Candidate,
    user: User,
    width: int,
    seed: int,
    plans: Plans,
    done: Callable[[Served], None],
) -> None:
    """Serve one strict request. seed: of the times of its passes; also its rank. plans: drafted for this user before."""
    clock, costs, widths = machine.clock, machine.costs, BeamWidths.of(width)
    arrived = clock.now_ns
    passes = Passes(machine, machine.target, costs.target, arrived, seed)
    target = SimulatedTarget(machine, user.target, widths, candidate.prefetch, passes)
    trie, policy = user.target.trie, Strict(widths)
    sizer: FixedPlanSizer | None = None
    usage = Usage()
    behind: Draft = NoDraft()
    if candidate.planner is not None:
        draft = SimulatedDraft(
            machine, user.draft, Passes(machine, machine.draft, costs.draft, arrived, seed + 1), plans
        )
        sizer = candidate.planner.sizer(Mode.STRICT, PlanContext(widths, costs.prompt_tokens, costs.prompt_tokens))
        behind, usage = SizedDraft(draft, sizer, target), draft.usage
    result = await beam_search(trie, RULE, policy, target, behind)
    if sizer is not None:
        if isinstance(sizer, AdaptivePlanSizer) and math.isfinite(sizer.patience_seconds):  # it has compared sizes
            await clock.sleep(_EVALUATION_NS)
        sizer.learn(result.memo, target.usage, usage)
    drafted = sizer.report.nodes_proposed if sizer else 0
    done(Served(clock.now_ns - arrived, tuple(result.leaves.node.tolist()), result.memo.passes, drafted))
