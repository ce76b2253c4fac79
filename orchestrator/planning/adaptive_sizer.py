"""Plan sizer that minimises the expected latency of a list (docs/planner.md).

A worked example: K = 10 on a catalogue of four levels, and a warm prompt of which 5 tokens must be computed. The target's cost
curve is T(n) = 8 + 0.31 n ms. Overhead and queues are left out, and all ratios of remaining work are 1. Plain beam search takes
T(10) = 11.1 ms for each of levels 1 to 3. From these levels on it takes R = 33.3, 22.2 and 11.1 ms. The draft has returned 120
nodes. Each prefix of the plan holds the nodes down to a margin. The acceptance model gives S_l, the probability that a prefix
misses level l or one above it:

    margin   nodes    S_1    S_2    S_3    first pass   after it   expected latency
      +inf       0   1.00   1.00   1.00       9.55 ms    33.3 ms    42.9 ms (the target alone)
       1.0      10   0.60   0.80   0.90      12.65 ms    25.5 ms    38.2 ms
       0.0      30   0.10   0.35   0.50      18.85 ms    10.5 ms    29.4 ms (the choice)
      -0.8      60   0.03   0.12   0.25      28.15 ms     4.4 ms    32.6 ms
      -2.0     120   0.01   0.03   0.06      46.75 ms     1.1 ms    47.9 ms

For 30 nodes: T(5 + 30) = 18.85 ms, then 0.10 * 33.3 + 0.25 * 22.2 + 0.15 * 11.1 = 10.5 ms. After drafting, the plan is cut to
these 30 nodes. Before drafting, the same numbers come from earlier plans. With 7 ms for the draft the best size takes 36.4 ms,
less than 97 % of 42.9 ms. So the draft is asked, for 1.5 * 30 = 45 nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize
from atspeed.engine.search.trie import Trie
from atspeed.engine.speculation.acceptance_model import EMPTY_DEPTH, PlanPrefixes, WorkloadKey
from atspeed.engine.speculation.latency_estimate import (
    MAX_COST_RATIO,
    BaselinePasses,
    ExpectedLatency,
    ObservedPass,
    PlanCoverage,
)
from atspeed.engine.speculation.latency_model import OPENS_STREAM, Pass
from orchestrator.planning.plan_passes import PlanPlace
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext, has_cached_tokens
from orchestrator.planning.planner_state import PlannerState, SkipBackoff
from orchestrator.planning.usage import Usage
from orchestrator.search.memo import Memo

# Nodes asked for, relative to the best size on average: requests differ, and deeper nodes are learned from. Chosen, not measured.
_OVERPROVISION = 1.5
# Plans of a workload until observations decide. Until then each is asked for as if the draft were right. Chosen, not measured.
_MIN_OBSERVATIONS = 16
# Shortest wait for a plan, 100 ms. On a crowded machine a draft call takes 16 to 20 ms (docs/log.md); this is five times that.
_MIN_PATIENCE_NS = 100e6
# Largest draft time of an exploration plan, relative to a plan of the usual size; and sizes that are tried. Chosen, not measured.
_MAX_EXPLORATION_RATIO = 2.0
_EXPLORATION_SIZES = 8


@dataclass(frozen=True)
class _SizeChoice:
    """Size to ask the draft for.

    Attributes:
        nodes: most nodes.
        levels: most levels.
        total_ns: expected time of draft and target.
    """

    nodes: int
    levels: int
    total_ns: float


@dataclass(frozen=True)
class _Cut:
    """Part of a plan.

    Attributes:
        plan: its nodes.
        passes: target passes expected with it.
        total_ns: their expected time.
    """

    plan: Plan
    passes: float
    total_ns: float


class AdaptivePlanSizer(FixedPlanSizer):
    """Plan sizer that asks for the size, and keeps the part, with the least expected latency."""

    def __init__(
        self,
        trie: Trie,
        context: PlanContext,
        nodes: int,
        max_nodes: int,
        workload: WorkloadKey,
        state: PlannerState,
    ) -> None:
        """Size plans of at most `max_nodes` nodes. nodes: size of a plan while nothing is known."""
        super().__init__(trie, context, nodes, state.latencies)
        self._max_nodes = max_nodes
        self._workload = workload
        self._state = state

    def size(self, below: Beams) -> PlanSize | None:
        """Return the size with the least expected latency; None if that is without a plan."""
        start, beams, state = self._start(below), len(below), self._state
        self._known.update(below.node.tolist())
        backoff = state.backoff(self._workload, start, beams, self._context.prompt_tokens)
        observations = state.acceptance.observations(self._workload, start)
        if not backoff.consume(observations) or state.has_budget(start):
            return self._evaluate_sizes(start, beams, backoff, observations)
        state.save_budget(start, backoff.target_only_ns)
        self._report_expected(start, backoff.passes, backoff.target_only_ns)
        return None

    def learn(self, memo: Memo, target: Usage, draft: Usage) -> None:
        """Learn required depths, remaining work after misses, and latencies."""
        if self._records:
            used = self._used(memo)
            for record in self._records:
                self._state.learn(self._workload, record.proposed.start, record.proposed.required(used))
        if target.clean:
            self._learn_remaining_work(memo, target)
        super().learn(memo, target, draft)

    def _evaluate_sizes(self, start: int, beams: int, backoff: SkipBackoff, observations: int) -> PlanSize | None:
        """Return the best size by the expected latency of each; None if no plan pays and none is due for exploration."""
        state = self._state
        estimate = self._estimate(start, beams, None)
        target_only_ns, passes = self._without_plan(estimate, start)
        self.patience_seconds = max(_MIN_PATIENCE_NS, state.patience * target_only_ns) / 1e9
        if self._is_target_saturated():
            self._report_expected(start, passes, target_only_ns)
            return None
        best = self._best_size(estimate, start, beams)
        if best.total_ns < MAX_COST_RATIO * target_only_ns:
            backoff.reset()
            return self._best_or_all_levels(start, beams, best, target_only_ns)
        backoff.extend(observations, passes, target_only_ns)
        exploration = self._exploration(start, beams, target_only_ns, instead_of=None)
        if exploration is None:
            self._report_expected(start, passes, target_only_ns)
        return exploration

    def _best_or_all_levels(self, start: int, beams: int, best: _SizeChoice, target_only_ns: float) -> PlanSize:
        """Return the best size. If it has fewer levels than it could, exploration now and then asks for all of them."""
        if best.levels < self._trie.levels - 1 - start:
            exploration = self._exploration(start, beams, target_only_ns, instead_of=best)
            return exploration or self._asked(best.nodes, best.levels)
        return self._asked(best.nodes)

    def _exploration(
        self, start: int, beams: int, target_only_ns: float, instead_of: _SizeChoice | None
    ) -> PlanSize | None:
        """Save to the exploration budget, and return a size of all levels if the budget allows it.

        instead_of: size that is asked for otherwise; only the additional time of the draft is spent.
        """
        state = self._state
        state.save_budget(start, target_only_ns)
        if not state.has_budget(start):
            return None
        nodes = self._exploration_size(start, beams)
        draft_ns = self._draft_call_ns(start, beams, nodes, self._trie.levels - 1 - start)
        if instead_of is not None:
            draft_ns -= self._draft_call_ns(start, beams, instead_of.nodes, instead_of.levels)
        return self._asked(nodes) if state.spend_budget(start, draft_ns) else None

    def _best_size(self, estimate: ExpectedLatency, start: int, beams: int) -> _SizeChoice:
        """Return the size with the least expected time of draft and target."""
        if self._state.acceptance.observations(self._workload, start) < _MIN_OBSERVATIONS:
            return self._optimistic_size(estimate, start, beams)
        sizes = [self._best_size_of(levels, estimate, start, beams) for levels in self._depths(start, estimate.levels)]
        return min(sizes, key=lambda size: size.total_ns)

    def _optimistic_size(self, estimate: ExpectedLatency, start: int, beams: int) -> _SizeChoice:
        """Return the exploration size, expected to cover all beams, so that the draft is tried wherever it could pay."""
        nodes, levels = self._exploration_size(start, beams), estimate.levels
        used = np.array([min(nodes, self._context.beam_width * levels)])
        perfect = PlanCoverage(used, by_level=np.full((levels, 1), np.inf), missed=np.zeros((levels, 1)))
        target_ns = float(estimate.total_ns(perfect)[0])
        return _SizeChoice(nodes, levels, self._draft_call_ns(start, beams, nodes, levels) + target_ns)

    def _best_size_of(self, levels: int, estimate: ExpectedLatency, start: int, beams: int) -> _SizeChoice:
        """Return the best size of plans of so many levels, by the mean coverage of earlier plans."""
        max_nodes = self._max_plan_nodes(start, beams)
        # Sizes [s] that earlier plans were cut to in the estimate, and the sizes to ask for to get these.
        sizes, missed = self._state.acceptance.profile(self._workload, start, levels)
        asked = np.minimum(np.ceil(_OVERPROVISION * sizes), max_nodes).astype(np.int64)
        draft_ns = self._draft_ns(self._state.latencies, PlanPlace(start, beams, levels), asked)
        target_ns = estimate.total_ns(PlanCoverage.spread_evenly(np.minimum(sizes, max_nodes), missed))
        total_ns = draft_ns + target_ns
        best = int(np.argmin(total_ns))
        return _SizeChoice(int(asked[best]), levels, float(total_ns[best]))

    def _depths(self, start: int, levels: int) -> Sequence[int]:
        """Return the numbers of levels that a plan may have. Below the root a plan may leave the last ones to the prefetch."""
        return range(1, levels + 1) if start == 0 else (levels,)

    def _is_target_saturated(self) -> bool:
        """Return true while throughput depends on the target's work. A plan adds work, so even exploration stops."""
        width = self._context.beam_width
        return self._state.latencies.target.is_saturated(Pass(width, self._context.prompt_tokens, width))

    def _keep(self, below: Beams, asked: PlanSize, plan: Plan, cost: PassStats) -> Plan:
        """Return the cut with the least expected latency, over all numbers of levels."""
        start, complete = self._start(below), len(plan.node) < asked.max_nodes
        estimate = self._estimate(start, len(below), has_cached_tokens(cost) if start == 0 else None)
        max_levels, level = self._planned_levels(below, asked), self._trie.depth(plan.node) - start
        cuts = []
        for levels in self._depths(start, max_levels):
            part = plan if levels == max_levels else plan.take(np.flatnonzero(level <= levels))
            cuts.append(self._cheapest_cut(estimate, part, levels, complete=complete))
        best = min(cuts, key=lambda cut: cut.total_ns)
        self._report_expected(start, best.passes, best.total_ns)
        return best.plan

    def _cheapest_cut(self, estimate: ExpectedLatency, plan: Plan, levels: int, *, complete: bool) -> _Cut:
        """Return the prefix of a plan of so many levels with the least expected latency of the target."""
        acceptance, start = self._state.acceptance, self._trie.levels - 1 - estimate.levels
        prefixes = PlanPrefixes.of(plan, complete=complete)
        missed = acceptance.missed(self._workload, start, prefixes.depth)[:levels]
        acceptance.record_plan(self._workload, start, missed, complete=complete)
        coverage = PlanCoverage.of_prefixes(prefixes, self._trie.depth(plan.node) - start, missed)
        total_ns = estimate.total_ns(coverage)
        best = int(np.argmin(total_ns))
        kept = plan.take(np.sort(prefixes.order[:best]))
        return _Cut(kept, estimate.passes(coverage, best), float(total_ns[best]))

    def _without_plan(self, estimate: ExpectedLatency, start: int) -> tuple[float, float]:
        """Return the nanoseconds and passes expected without a plan."""
        missed = self._state.acceptance.missed(self._workload, start, np.array([EMPTY_DEPTH]))
        coverage = PlanCoverage(np.zeros(1, dtype=np.int64), by_level=np.zeros(missed.shape), missed=missed)
        return float(estimate.total_ns(coverage)[0]), estimate.passes(coverage, 0)

    def _report_expected(self, start: int, passes: float, total_ns: float) -> None:
        """Report what is expected of the target; only the first plan of a request, at the root, is reported."""
        if start == 0:
            self.report.expected_passes = passes
            self.report.expected_ns = total_ns

    def _draft_call_ns(self, start: int, beams: int, nodes: int, levels: int) -> float:
        return float(self._draft_ns(self._state.latencies, PlanPlace(start, beams, levels), np.array(nodes)))

    def _exploration_size(self, start: int, beams: int) -> int:
        """Return a size to learn from: the largest that takes the draft at most twice as long as the usual size."""
        max_nodes = self._max_plan_nodes(start, beams)
        largest = max(self._nodes, max_nodes)
        sizes = np.minimum(np.geomspace(self._nodes, largest, _EXPLORATION_SIZES).astype(np.int64), max_nodes)
        place = PlanPlace(start, beams, self._trie.levels - 1 - start)
        times = self._draft_ns(self._state.latencies, place, sizes)
        return int(sizes[np.flatnonzero(times <= _MAX_EXPLORATION_RATIO * times[0])[-1]])

    def _max_plan_nodes(self, start: int, beams: int) -> int:
        """Return the most nodes of a plan. After a miss it is the share of the missing beams and the levels that are left."""
        if start == 0:
            return self._max_nodes
        share = beams / self._context.beam_widths.at(start) * (self._trie.levels - 1 - start) / (self._trie.levels - 1)
        return max(1, min(self._max_nodes - 1, round(self._max_nodes * share)))

    def _estimate(self, start: int, beams: int, draft_was_cached: bool | None) -> ExpectedLatency:
        """Return the estimate for a search at these beams.

        draft_was_cached: true if the draft found part of its prompt cached; None before it has answered.
        """
        latencies, prompt = self._state.latencies, self._context.prompt_tokens
        if start == 0:
            computed = max(1.0, latencies.target_computed_share[draft_was_cached].value * prompt)
            cached = prompt - computed
            evaluated = 0
        else:
            computed = 0.0
            cached = float(prompt + len(self._known))
            evaluated = beams

        def first_pass_ns(nodes: Int64) -> Float64:
            new = computed + evaluated + nodes
            call = OPENS_STREAM if computed > 0 else 0
            return latencies.target.call_ns(new, cached, evaluated + nodes, call=call)

        remaining_work = self._state.remaining_work
        return ExpectedLatency.below(start, beams, self._baseline, remaining_work, self._workload, first_pass_ns)

    @cached_property
    def _baseline(self) -> BaselinePasses:
        """Return the passes of plain beam search."""
        target, prompt = self._state.latencies.target, self._context.prompt_tokens
        return BaselinePasses.of(
            self._trie, self._context.beam_widths, lambda beams: target.call_ns(beams, prompt, beams)
        )

    def _used(self, memo: Memo) -> list[Int64]:
        """Return, for each level, the beams of the search that had to be evaluated, ascending."""
        used = np.sort(np.fromiter(memo.used, dtype=np.int64, count=len(memo.used)))
        used = used[~memo.certain(used)]
        return np.split(used, np.searchsorted(used, self._trie.level_start[1 : self._trie.levels]))

    def _learn_remaining_work(self, memo: Memo, target: Usage) -> None:
        """Learn from each pass after the first: the time of it and of all later ones, draft calls included."""
        if len(memo.pass_levels) != len(target.costs) or len(memo.pass_levels) < 2:
            return
        missing = np.bincount(self._trie.depth(np.array(sorted(memo.recovered))), minlength=self._trie.levels)
        drafts = {record.proposed.start: record for record in self._records}
        passes = []
        for level, one in zip(memo.pass_levels[1:], self._target_passes(target.costs)[1:], strict=True):
            duration_ns = float(self._state.latencies.target.call_ns(one.new, one.cached, one.nodes))
            if (record := drafts.get(level)) is not None:
                proposed = record.proposed
                duration_ns += self._draft_call_ns(level, record.beams, proposed.max_nodes, proposed.levels)
            passes.append(ObservedPass(level, int(missing[level]), duration_ns))
        self._state.remaining_work.learn(self._workload, passes, self._baseline)
