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
from atspeed.engine.speculation.latency_model import OPENS_STREAM, Pass
from orchestrator.planning.plan_passes import PlanPlace
from orchestrator.planning.planner_state import ModelLatencies
from orchestrator.planning.usage import Usage
from orchestrator.search.memo import Memo


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

    @property
    def place(self) -> PlanPlace:
        """Return where the plan hangs."""
        return PlanPlace(self.proposed.start, self.beams, self.proposed.levels)


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
        place = PlanPlace(self._start(below), len(below), self._planned_levels(below, asked))
        expected = float(self._draft_ns(self._latencies, place, np.array(asked.max_nodes)))
        self._latencies.draft.observe_timeout(self._latencies.plan_passes.count(place.levels), expected, waited_ns)

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

    def _draft_ns(self, latencies: ModelLatencies, place: PlanPlace, nodes: Int64) -> Float64:
        """Return the draft's time for plans of so many nodes [c]."""
        prompt, share = self._context.draft_prompt_tokens, latencies.draft_computed_share.value
        return latencies.plan_passes.expected_ns(latencies.draft, place, nodes, prompt, share)

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
            made = latencies.plan_passes.made(record.place, len(record.proposed.plan.node), prompt, record.stats)
            predicted += latencies.draft.observe(made, record.stats, wait)
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
            passes.append(Pass(stats.new_tokens, cached, nodes, call=0 if passes else OPENS_STREAM))
            cached += stats.new_tokens
        return passes


def has_cached_tokens(stats: PassStats) -> bool:
    """Return true if a model found keys and values of the prompt."""
    return stats.cached_tokens > 0


def _computed_share(prompt_tokens: int, stats: PassStats) -> float:
    return min(1.0, max(0.0, 1.0 - stats.cached_tokens / max(1, prompt_tokens)))
