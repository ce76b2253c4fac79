"""Plan sizer of one request, with plans of a fixed size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize
from atspeed.engine.search.trie import Trie
from atspeed.engine.speculation.acceptance_model import ProposedPlan
from atspeed.engine.speculation.latency_model import Pass
from orchestrator.planning.planner_state import ModelLatencies
from orchestrator.planning.usage import Usage
from orchestrator.search.memo import Memo

# Prompt tokens that a second plan computes again: half of a block of 16 tokens, since only full blocks are cached. Smaller
# blocks make it fewer; a few tokens hardly change the time of a pass.
_PARTIAL_BLOCK_TOKENS = 8


@dataclass(frozen=True)
class PlanContext:
    """Request that plans are made for.

    Attributes:
        beam_widths: K of each level.
        prompt_tokens: length of the target's prompt.
        draft_prompt_tokens: length of the draft's prompt; 0 without a draft.
    """

    beam_widths: BeamWidths
    prompt_tokens: int
    draft_prompt_tokens: int = 0

    @property
    def beam_width(self) -> int:
        """Return the largest beam width."""
        return self.beam_widths.largest


@dataclass(frozen=True)
class PlanRecord:
    """Plan that the draft returned.

    Attributes:
        proposed: the plan before it was cut.
        beams: number of beams that it hangs below.
        stats: the draft's stats.
    """

    proposed: ProposedPlan
    beams: int
    stats: PassStats

    def passes(self, prompt_tokens: int) -> list[Pass]:
        """Return the draft's passes: the first reads the rest of the prompt and the beams, each other one a level."""
        levels = self.proposed.levels
        total = self.stats.new_tokens
        cached = self.stats.cached_tokens
        first = min(total, max(0, prompt_tokens - cached) + self.beams * self.proposed.start)
        later = (total - first) // max(1, levels - 1)
        nodes = len(self.proposed.plan.node)
        return [Pass(first, cached, nodes), *(Pass(later, cached + first, 0) for _ in range(levels - 1))]


@dataclass
class PlanningReport:
    """Decisions and predictions for one request.

    Attributes:
        nodes_asked: nodes asked for, all plans together.
        nodes_proposed: nodes that the draft returned.
        expected_passes: target passes expected at the decision on the first plan; None without one.
        expected_ns: their expected time; None without a decision.
        target_predicted_ns: predicted time in the target of the passes that were made; None without a cost curve.
        draft_predicted_ns: the same for the draft.
    """

    nodes_asked: int = 0
    nodes_proposed: int = 0
    expected_passes: float | None = None
    expected_ns: float | None = None
    target_predicted_ns: float | None = None
    draft_predicted_ns: float | None = None


class FixedPlanSizer:
    """Plan sizer that always asks for the same number of nodes and gives the target all of them.

    Attributes:
        patience_seconds: longest wait for a plan of the latest size.
        report: decisions and predictions so far.
    """

    def __init__(self, trie: Trie, context: PlanContext, nodes: int, latencies: ModelLatencies | None) -> None:
        """Size plans of `nodes` nodes. Without `latencies`, while the cost curves are unknown, nothing is learned."""
        self.patience_seconds = math.inf
        self.report = PlanningReport()
        self._trie = trie
        self._context = context
        self._nodes = nodes
        self._latencies = latencies
        self._records: list[PlanRecord] = []
        self._known: set[int] = set()

    def size(self, below: Beams) -> PlanSize | None:  # noqa: ARG002
        """Return the size to ask the draft for below these beams; None to skip the draft."""
        return self._asked(self._nodes)

    def cut(self, below: Beams, asked: PlanSize, plan: Plan, cost: PassStats) -> Plan:
        """Return the part of a plan that the target gets."""
        kept = self._keep(below, asked, plan, cost)
        levels, known = self._planned_levels(below, asked), frozenset(self._known)
        proposed = ProposedPlan(self._start(below), plan, asked.max_nodes, levels, known)
        self._records.append(PlanRecord(proposed, len(below), cost))
        self._known.update(kept.node.tolist())
        self.report.nodes_proposed += len(plan.node)
        return kept

    def failed(self, below: Beams, asked: PlanSize, waited_ns: int) -> None:
        """Learn from a plan that did not come within so long."""
        if self._latencies is None:
            return
        start, levels = self._start(below), self._planned_levels(below, asked)
        expected = float(self._draft_ns(self._latencies, start, len(below), np.array(asked.max_nodes), levels))
        self._latencies.draft.observe_timeout(levels, expected, waited_ns)

    def learn(self, memo: Memo, target: Usage, draft: Usage) -> None:  # noqa: ARG002
        """Learn from a finished request."""
        if self._latencies is None:
            return
        if target.clean:
            self._learn_target(self._latencies, target)
        if draft.clean:
            self._learn_draft(self._latencies, draft)

    def _asked(self, nodes: int, levels: int | None = None) -> PlanSize:
        """Return a size and count it as asked for."""
        self.report.nodes_asked += nodes
        return PlanSize(beam_widths=self._context.beam_widths, width=nodes, max_nodes=nodes, levels=levels)

    def _keep(self, below: Beams, asked: PlanSize, plan: Plan, cost: PassStats) -> Plan:  # noqa: ARG002
        return plan

    def _start(self, below: Beams) -> int:
        """Return the level of the beams."""
        return self._trie.depth_of(int(below.node[0]))

    def _planned_levels(self, below: Beams, asked: PlanSize) -> int:
        """Return the number of levels below the beams that a plan of this size has."""
        start = self._start(below)
        return asked.last_depth(self._trie, start) - start

    def _draft_ns(self, latencies: ModelLatencies, start: int, beams: int, nodes: Int64, levels: int) -> Float64:
        """Return the draft's time for plans of so many nodes [c] on so many levels: one pass for each level."""
        draft, prompt = latencies.draft, self._context.draft_prompt_tokens
        if start == 0:
            first_tokens = max(1.0, latencies.draft_computed_share.value * prompt)
        else:
            first_tokens = _PARTIAL_BLOCK_TOKENS + beams * start
        first = draft.forward_ns(first_tokens, max(0.0, prompt - first_tokens))
        later = (levels - 1) * draft.forward_ns(nodes / levels, prompt) + levels * draft.queue_ns
        return np.asarray(first + later + draft.overhead_ns(nodes))

    def _learn_target(self, latencies: ModelLatencies, target: Usage) -> None:
        predicted = 0.0
        for one, stats, wait in zip(self._target_passes(target.costs), target.costs, target.waits, strict=True):
            predicted += latencies.target.observe([one], stats, wait)
        self.report.target_predicted_ns = predicted
        if target.costs:
            self._learn_computed_share(latencies, target.costs[0])

    def _learn_draft(self, latencies: ModelLatencies, draft: Usage) -> None:
        if not draft.waits:
            latencies.draft.decay_queue()
        predicted, prompt = 0.0, self._context.draft_prompt_tokens
        for record, wait in zip(self._records, draft.waits, strict=True):
            predicted += latencies.draft.observe(record.passes(prompt), record.stats, wait)
            if record.proposed.start == 0:
                latencies.draft_computed_share.add(_computed_share(prompt, record.stats))
        self.report.draft_predicted_ns = predicted

    def _learn_computed_share(self, latencies: ModelLatencies, first: PassStats) -> None:
        share = _computed_share(self._context.prompt_tokens, first)
        latencies.target_computed_share[None].add(share)
        if self._records and self._records[0].proposed.start == 0:
            latencies.target_computed_share[has_cached_tokens(self._records[0].stats)].add(share)

    def _target_passes(self, replies: Sequence[PassStats]) -> list[Pass]:
        """Return the passes of the target's stream. Each finds the tokens cached that earlier ones computed."""
        passes: list[Pass] = []
        cached, prompt = 0, self._context.prompt_tokens
        for stats in replies:
            cached += stats.cached_tokens
            nodes = stats.new_tokens - max(0, prompt - cached)
            passes.append(Pass(stats.new_tokens, cached, nodes, opens_stream=not passes))
            cached += stats.new_tokens
        return passes


def has_cached_tokens(stats: PassStats) -> bool:
    """Return true if a model found keys and values of the prompt."""
    return stats.cached_tokens > 0


def _computed_share(prompt_tokens: int, stats: PassStats) -> float:
    return min(1.0, max(0.0, 1.0 - stats.cached_tokens / max(1, prompt_tokens)))
