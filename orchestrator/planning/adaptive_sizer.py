"""Planning by what is expected to cost least: from no plan at all to all that the draft can think of (method, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beams import Beams, Float64
from atspeed.engine.search.plan import Plan, PlanSize
from atspeed.engine.search.trie import Int64, Trie
from atspeed.engine.speculation.acceptance_model import NOTHING, PlanPrefixes, WorkloadKey
from atspeed.engine.speculation.latency_estimate import BaselinePasses, ExpectedLatency, ObservedPass, PlanCoverage
from atspeed.engine.speculation.latency_model import Pass
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext, found_cached
from orchestrator.planning.planner_state import PlannerState, SkipBackoff
from orchestrator.planning.usage import Usage
from orchestrator.search.memo import Memo

_ROOM = 1.5
"""Nodes asked for, over those that would do on average: requests differ, and what lies deeper is learnt from."""
_OBSERVATIONS = 16
"""Plans of a kind until they are decided by what was learnt from them."""
_WORTH = 0.97
"""A plan is asked for if all is expected to take so much of the time without it: less is within what guesses are off."""
_LEAST_PATIENCE_NS = 100e6
"""For a plan, whatever the target alone would take: between two processes of a machine that is busy a moment is lost soon."""


@dataclass(frozen=True)
class _Size:
    """What may be asked of the draft: most nodes, of so many levels. total_ns: what all is then expected to take."""

    nodes: int
    levels: int
    total_ns: float


@dataclass(frozen=True)
class _Cut:
    """A part of a plan. passes, total_ns: what is then expected of the target."""

    plan: Plan
    passes: float
    total_ns: float


class AdaptivePlanSizer(FixedPlanSizer):
    """The planning of one request whose plans are of the size, and are cut to the part, that is expected to cost least.

    nodes: of a plan while there is no experience with such.
    """

    def __init__(
        self, trie: Trie, task: PlanContext, nodes: int, max_nodes: int, kind: WorkloadKey, experience: PlannerState
    ) -> None:
        super().__init__(trie, task, nodes, experience.costs)
        self._experience, self._kind, self._max_nodes = experience, kind, max_nodes

    def size(self, below: Beams) -> PlanSize | None:
        """The size at which draft and target together are expected to be done first; None if that is without a plan."""
        start, beams, experience = self._level(below), len(below), self._experience
        self._known.update(below.node.tolist())
        lull = experience.lull(self._kind, start, beams, self._task.prompt_tokens)
        learnt = experience.coverage.observations(self._kind, start)
        if not lull.covers(learnt) or experience.has_saved(start):
            return self._weighed(start, beams, lull, learnt)
        experience.save(start, lull.alone_ns)
        self._note(start, lull.passes, lull.alone_ns)
        return None

    def learn(self, memo: Memo, target: Usage, draft: Usage) -> None:
        """Learn what was required, what misses led to, and what calls cost."""
        if self._records:
            used = self._used(memo)
            for record in self._records:
                self._experience.learn(self._kind, record.planned.start, record.planned.required(used))
        if target.clean:
            self._learn_further(memo, target)
        super().learn(memo, target, draft)

    def _weighed(self, start: int, beams: int, lull: SkipBackoff, learnt: int) -> PlanSize | None:
        """The same, by what every size is expected to cost."""
        experience = self._experience
        outlook = self._outlook(start, beams, None)
        alone, passes = self._alone(outlook, start)
        self.patience_seconds = max(_LEAST_PATIENCE_NS, experience.patience * alone) / 1e9
        if self._target_is_full():
            self._note(start, passes, alone)
            return None
        best = self._best_size(outlook, start, beams)
        if best.total_ns < _WORTH * alone:
            lull.ends()
            return self._asked_of_draft(start, beams, best, alone)
        lull.goes_on(learnt, passes, alone)
        experience.save(start, alone)
        if experience.has_saved(start):
            telling = self._telling(start, beams)
            if experience.explores(start, self._draft_takes(start, beams, telling, outlook.levels)):
                return self._sized(telling)
        self._note(start, passes, alone)
        return None

    def _asked_of_draft(self, start: int, beams: int, best: _Size, alone: float) -> PlanSize:
        """The best size, or now and then all levels though fewer pay more: or nobody would notice when these do not any more."""
        most, experience = self._trie.levels - 1 - start, self._experience
        if best.levels == most:
            return self._sized(best.nodes)
        experience.save(start, alone)
        if experience.has_saved(start):
            telling = self._telling(start, beams)
            more = self._draft_takes(start, beams, telling, most)
            if experience.explores(start, more - self._draft_takes(start, beams, best.nodes, best.levels)):
                return self._sized(telling)
        return self._sized(best.nodes, best.levels)

    def _best_size(self, outlook: ExpectedLatency, start: int, beams: int) -> _Size:
        """That with which all is expected to be done first."""
        most, coverage = self._most(start, beams), self._experience.coverage
        if coverage.observations(self._kind, start) < _OBSERVATIONS:
            # As if the draft were right, so that it gets its chance wherever it could pay at all.
            nodes, levels = self._telling(start, beams), outlook.levels
            used = np.array([min(nodes, self._task.beam_width * levels)])
            target = float(outlook.expected(PlanCoverage(used, np.full((levels, 1), np.inf), np.zeros((levels, 1))))[0])
            return _Size(nodes, levels, self._draft_takes(start, beams, nodes, levels) + target)
        sizes = []
        for levels in self._depths(start, outlook.levels):
            nodes_that_do, missed = coverage.profile(self._kind, start, levels)
            asked = np.minimum(np.ceil(_ROOM * nodes_that_do), most).astype(np.int64)
            total = self._draft_ns(self._experience.costs, start, beams, asked, levels)
            total = total + outlook.expected(PlanCoverage.evenly(np.minimum(nodes_that_do, most), missed))
            best = int(np.argmin(total))
            sizes.append(_Size(int(asked[best]), levels, float(total[best])))
        return min(sizes, key=lambda size: size.total_ns)

    def _depths(self, start: int, levels: int) -> Sequence[int]:
        """Levels that a plan may have. Of the root's, the first may be all that pays: the target itself foresees deep ones."""
        return range(1, levels + 1) if start == 0 else (levels,)

    def _target_is_full(self) -> bool:
        """Whether what counts is the target's work, of which a draft's plan is more, and not how long this request takes.

        Then nothing is drafted, not even for the experience.
        """
        width = self._task.beam_width
        return self._experience.costs.target.full(Pass(width, self._task.prompt_tokens, width))

    def _keep(self, below: Beams, asked: PlanSize, plan: Plan, cost: PassStats) -> Plan:
        start, complete = self._level(below), len(plan.node) < asked.max_nodes
        outlook = self._outlook(start, len(below), found_cached(cost) if start == 0 else None)
        most, level = self._levels(below, asked), self._trie.depth(plan.node) - start
        cuts = []
        for levels in self._depths(start, most):
            part = plan if levels == most else plan.take(np.flatnonzero(level <= levels))
            cuts.append(self._cheapest(outlook, part, levels, complete=complete))
        best = min(cuts, key=lambda cut: cut.total_ns)
        self._note(start, best.passes, best.total_ns)
        return best.plan

    def _cheapest(self, outlook: ExpectedLatency, plan: Plan, levels: int, *, complete: bool) -> _Cut:
        """The cut of a plan of so many levels with which least is expected of the target."""
        coverage, start = self._experience.coverage, self._trie.levels - 1 - outlook.levels
        cuts = PlanPrefixes.of(plan, complete=complete)
        missed = coverage.missed(self._kind, start, cuts.depth)[:levels]
        coverage.note(self._kind, start, missed, complete=complete)
        cover = PlanCoverage.of_cuts(self._trie.depth(plan.node[cuts.order]) - start, missed)
        expected = outlook.expected(cover)
        best = int(np.argmin(expected))
        return _Cut(plan.take(np.sort(cuts.order[:best])), outlook.passes(cover, best), float(expected[best]))

    def _alone(self, outlook: ExpectedLatency, start: int) -> tuple[float, float]:
        """Nanoseconds and passes that are expected where nothing is planned."""
        missed = self._experience.coverage.missed(self._kind, start, np.array([NOTHING]))
        cover = PlanCoverage(np.zeros(1, dtype=np.int64), np.zeros(missed.shape), missed)
        return float(outlook.expected(cover)[0]), outlook.passes(cover, 0)

    def _note(self, start: int, passes: float, nanoseconds: float) -> None:
        if start == 0:
            self.report.expected_passes, self.report.expected_ns = passes, nanoseconds

    def _draft_takes(self, start: int, beams: int, nodes: int, levels: int) -> float:
        return float(self._draft_ns(self._experience.costs, start, beams, np.array(nodes), levels))

    def _telling(self, start: int, beams: int) -> int:
        """A size to learn from: of those that cost the draft at most twice as much as a plan of the usual size, the largest."""
        most = self._most(start, beams)
        sizes = np.minimum(np.geomspace(self._nodes, max(self._nodes, most), 8).astype(np.int64), most)
        times = self._draft_ns(self._experience.costs, start, beams, sizes, self._trie.levels - 1 - start)
        return int(sizes[np.flatnonzero(times <= 2.0 * times[0])[-1]])

    def _most(self, start: int, beams: int) -> int:
        """Most nodes of a plan. A further one has its beams' and its levels' share of the first."""
        if start == 0:
            return self._max_nodes
        share = beams / self._task.beam_width * (self._trie.levels - 1 - start) / (self._trie.levels - 1)
        return max(1, min(self._max_nodes - 1, round(self._max_nodes * share)))

    def _outlook(self, start: int, beams: int, draft_cached: bool | None) -> ExpectedLatency:
        """draft_cached: whether the draft had some of the prompt cached, once it has answered."""
        costs, prompt = self._experience.costs, self._task.prompt_tokens
        computed = max(1.0, costs.share[draft_cached].value * prompt) if start == 0 else 0.0
        cached = prompt - computed if start == 0 else prompt + len(self._known)
        target, evaluated = costs.target, beams if start else 0

        def first(nodes: Int64) -> Float64:
            return target.call(computed + evaluated + nodes, cached, evaluated + nodes, opens=computed > 0)

        return ExpectedLatency.below(start, beams, self._plain, self._experience.further, self._kind, first)

    @cached_property
    def _plain(self) -> BaselinePasses:
        target, prompt = self._experience.costs.target, self._task.prompt_tokens
        return BaselinePasses.of(self._trie, self._task.beam_width, lambda beams: target.call(beams, prompt, beams))

    def _used(self, memo: Memo) -> list[Int64]:
        """By level, the beams of the search that had to be evaluated."""
        used = np.sort(np.fromiter(memo.used, dtype=np.int64, count=len(memo.used)))
        used = used[~memo.certain(used)]
        return np.split(used, np.searchsorted(used, self._trie.level_start[1 : self._trie.levels]))

    def _learn_further(self, memo: Memo, target: Usage) -> None:
        """From each pass but the first: what it and all after it cost."""
        if len(memo.pass_levels) != len(target.costs) or len(memo.pass_levels) < 2:
            return
        missing = np.bincount(self._trie.depth(np.array(sorted(memo.recovered))), minlength=self._trie.levels)
        drafts = {record.planned.start: record for record in self._records}
        made = []
        for level, one in zip(memo.pass_levels[1:], self._target_passes(target.costs)[1:], strict=True):
            took = float(self._experience.costs.target.call(one.new, one.cached, one.nodes))
            if (record := drafts.get(level)) is not None:
                took += self._draft_takes(level, record.beams, record.planned.most, record.planned.levels)
            made.append(ObservedPass(level, int(missing[level]), took))
        self._experience.further.learn(self._kind, made, self._plain)
