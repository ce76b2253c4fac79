"""The planning of one request: how much is drafted, what of it is kept, and what there is to learn from how it went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beams import Beams, Float64
from atspeed.engine.search.plan import Plan, PlanSize
from atspeed.engine.search.trie import Int64, Trie
from atspeed.engine.speculation.acceptance_model import ProposedPlan
from atspeed.engine.speculation.latency_model import Pass
from orchestrator.planning.model_costs import ModelCosts
from orchestrator.planning.usage import Usage
from orchestrator.search.memo import Memo

_PROMPT_REST = 8  # prompt tokens that a second plan computes again: half a block, as only whole ones are cached


@dataclass(frozen=True)
class PlanContext:
    """What is planned for. prompt_tokens, draft_prompt_tokens: lengths of the two models' prompts."""

    beam_width: int
    prompt_tokens: int
    draft_prompt_tokens: int = 0


@dataclass(frozen=True)
class PlanRecord:
    """A plan of the draft. beams: how many it hangs below. cost: the draft's."""

    planned: ProposedPlan
    beams: int
    cost: PassStats

    def passes(self, prompt_tokens: int) -> list[Pass]:
        """The draft's passes: the first reads what is left of the prompt and the beams, the others a level each."""
        expanded, total = self.planned.levels, self.cost.new_tokens
        cached = self.cost.memory_cached_tokens + self.cost.redis_cached_tokens
        first = min(total, max(0, prompt_tokens - cached) + self.beams * self.planned.start)
        later = (total - first) // max(1, expanded - 1)
        nodes = len(self.planned.plan.node)
        return [Pass(first, cached, nodes), *(Pass(later, cached + first, 0) for _ in range(expanded - 1))]


@dataclass
class PlanningReport:
    """What planning did. expected_*: what was expected of the target when the first plan was decided; 0 where nothing was.

    nodes_asked, nodes_proposed: of all plans. target_predicted_ns, draft_predicted_ns: in the models, for the passes that were
    made, by what was known before each; 0 while nothing is.
    """

    nodes_asked: int = 0
    nodes_proposed: int = 0
    expected_passes: float = 0.0
    expected_ns: float = 0.0
    target_predicted_ns: float = 0.0
    draft_predicted_ns: float = 0.0


class FixedPlanSizer:
    """The planning of one request: plans of a fixed size, of which the target gets everything.

    costs: None while the models' curves are not known, and then nothing is learnt. patience_seconds: how long the plan of the
    newest size may take.
    """

    def __init__(self, trie: Trie, task: PlanContext, nodes: int, costs: ModelCosts | None) -> None:
        self._trie, self._task, self._nodes, self._costs = trie, task, nodes, costs
        self._records: list[PlanRecord] = []
        self._known: set[int] = set()
        self.patience_seconds = math.inf
        self.report = PlanningReport()

    def size(self, below: Beams) -> PlanSize | None:  # noqa: ARG002
        """How much to ask of the draft below these beams; None: do not ask."""
        return self._sized(self._nodes)

    def cut(self, below: Beams, asked: PlanSize, plan: Plan, cost: PassStats) -> Plan:
        """What the target gets of a plan that came below these beams."""
        kept = self._keep(below, asked, plan, cost)
        levels, known = self._levels(below, asked), frozenset(self._known)
        planned = ProposedPlan(self._level(below), plan, asked.max_nodes, levels, known)
        self._records.append(PlanRecord(planned, len(below), cost))
        self._known.update(kept.node.tolist())
        self.report.nodes_proposed += len(plan.node)
        return kept

    def failed(self, below: Beams, asked: PlanSize, waited_ns: int) -> None:
        """No plan came below these beams; so long was waited for it."""
        if self._costs is None:
            return
        start, levels = self._level(below), self._levels(below, asked)
        expected = float(self._draft_ns(self._costs, start, len(below), np.array(asked.max_nodes), levels))
        self._costs.draft.late(levels, expected, waited_ns)

    def learn(self, memo: Memo, target: Usage, draft: Usage) -> None:  # noqa: ARG002
        """Learn from a request that is done."""
        if self._costs is None:
            return
        if target.clean:
            self._learn_target(self._costs, target)
        if draft.clean:
            self._learn_draft(self._costs, draft)

    def _sized(self, nodes: int, levels: int | None = None) -> PlanSize:
        self.report.nodes_asked += nodes
        return PlanSize(beam_width=self._task.beam_width, width=nodes, max_nodes=nodes, levels=levels)

    def _keep(self, below: Beams, asked: PlanSize, plan: Plan, cost: PassStats) -> Plan:  # noqa: ARG002
        return plan

    def _level(self, below: Beams) -> int:
        return int(self._trie.depth(below.node[:1])[0])

    def _levels(self, below: Beams, asked: PlanSize) -> int:
        """Levels below these beams that a plan of this size covers."""
        start = self._level(below)
        return asked.last_depth(self._trie, start) - start

    def _draft_ns(self, costs: ModelCosts, start: int, beams: int, nodes: Int64, levels: int) -> Float64:
        """The draft's time for plans of so many nodes [c] of so many levels."""
        prompt = self._task.draft_prompt_tokens
        first = max(1.0, costs.draft_share.value * prompt) if start == 0 else _PROMPT_REST + beams * start
        later = (levels - 1) * costs.draft.forward(nodes / levels, prompt) + levels * costs.draft.queue_ns
        return np.asarray(costs.draft.forward(first, max(0.0, prompt - first)) + later + costs.draft.besides(nodes))

    def _learn_target(self, costs: ModelCosts, target: Usage) -> None:
        target_passes = self._target_passes(target.costs)
        for one, cost, wait in zip(target_passes, target.costs, target.waits, strict=True):
            self.report.target_predicted_ns += costs.target.observe([one], cost, wait)
        if target.costs:
            self._learn_share(costs, target.costs[0])

    def _learn_draft(self, costs: ModelCosts, draft: Usage) -> None:
        if not draft.waits:
            costs.draft.not_asked()
        for record, wait in zip(self._records, draft.waits, strict=True):
            passes = record.passes(self._task.draft_prompt_tokens)
            self.report.draft_predicted_ns += costs.draft.observe(passes, record.cost, wait)
            if record.planned.start == 0:
                costs.draft_share.add(_computed(self._task.draft_prompt_tokens, record.cost))

    def _learn_share(self, costs: ModelCosts, first: PassStats) -> None:
        computed = _computed(self._task.prompt_tokens, first)
        costs.share[None].add(computed)
        if self._records and self._records[0].planned.start == 0:
            costs.share[found_cached(self._records[0].cost)].add(computed)

    def _target_passes(self, costs: Sequence[PassStats]) -> list[Pass]:
        """The passes of the target's stream: every one finds cached what those before it computed."""
        passes: list[Pass] = []
        cached, prompt = 0, self._task.prompt_tokens
        for cost in costs:
            cached += cost.memory_cached_tokens + cost.redis_cached_tokens
            nodes = cost.new_tokens - max(0, prompt - cached)
            passes.append(Pass(cost.new_tokens, cached, nodes, opens=not passes))
            cached += cost.new_tokens
        return passes


def found_cached(cost: PassStats) -> bool:
    """Whether a model found keys and values of the prompt."""
    return cost.memory_cached_tokens + cost.redis_cached_tokens > 0


def _computed(prompt_tokens: int, cost: PassStats) -> float:
    cached = cost.memory_cached_tokens + cost.redis_cached_tokens
    return min(1.0, max(0.0, 1.0 - cached / max(1, prompt_tokens)))
