"""Expected latency of the rest of a search, as a function of the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.ewma import Ewma
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.trie import Trie
from atspeed.engine.speculation.acceptance_model import PlanPrefixes, WorkloadKey

MAX_COST_RATIO = 0.97
"""Largest expected latency, relative to that without more nodes, for which nodes are drafted or prefetched.

Predictions are off by about 3 %, and the least of many estimates is too low on average.
"""


@dataclass(frozen=True)
class ObservedPass:
    """Pass of a search after its first one.

    Attributes:
        level: level of the beams that needed it.
        missing: number of these beams.
        duration_ns: its time, the draft's call for it included.
    """

    level: int
    missing: int
    duration_ns: float


@dataclass(frozen=True)
class BaselinePasses:
    """Passes of plain beam search: one for each level 1, 2, ... L-1.

    Attributes:
        widths: int64 [L-1], number of beams.
        remaining_ns: float64 [L-1], time of the passes from each level on.
    """

    widths: Int64
    remaining_ns: Float64

    @classmethod
    def of(cls, trie: Trie, beam_widths: BeamWidths, pass_ns: Callable[[Int64], Float64]) -> BaselinePasses:
        """Return the passes of a search. pass_ns: time of passes over so many beams."""
        widths = np.minimum(np.diff(trie.level_start)[1 : trie.levels], beam_widths.inner(trie))
        return cls(widths, np.cumsum(pass_ns(widths)[::-1])[::-1])

    def is_mostly_missed(self, level: int, missing: int) -> bool:
        """Return true if so many beams are more than half of a level's. At the root that is always so."""
        return level == 0 or 2 * missing > int(self.widths[level - 1])


class RemainingWorkRatio:
    """Time of searches from a level on, over that of plain beam search; decayed means.

    Levels that missed most of their beams have one mean, and levels that missed some have another. Until the second has a value,
    the first stands in for it; both are 1 at first.
    """

    def __init__(self) -> None:
        self._mostly_missed: dict[tuple[WorkloadKey, int], Ewma] = {}
        self._partly_missed: dict[tuple[WorkloadKey, int], Ewma] = {}

    def learn(self, workload: WorkloadKey, passes: Sequence[ObservedPass], baseline: BaselinePasses) -> None:
        """Learn from the passes of one search."""
        remaining_ns = 0.0
        for one in reversed(passes):
            remaining_ns += one.duration_ns
            ratio = remaining_ns / float(baseline.remaining_ns[one.level - 1])
            self.add(workload, one.level, ratio, mostly=baseline.is_mostly_missed(one.level, one.missing))

    def add(self, workload: WorkloadKey, level: int, ratio: float, *, mostly: bool) -> None:
        """Add a ratio of a level that missed most of its beams, or some."""
        ratios = self._mostly_missed if mostly else self._partly_missed
        ratios.setdefault((workload, level), Ewma(1.0)).add(ratio)

    def mostly_missed(self, workload: WorkloadKey, levels: range) -> Float64:
        """Return the ratios of levels that missed most of their beams: float64 [l]."""
        return np.array([self._ratio(workload, level, self._mostly_missed) for level in levels])

    def partly_missed(self, workload: WorkloadKey, levels: range) -> Float64:
        """Return the ratios of levels that missed some of their beams: float64 [l]."""
        return np.array([self._ratio(workload, level, self._partly_missed, self._mostly_missed) for level in levels])

    def _ratio(self, workload: WorkloadKey, level: int, *ratios: dict[tuple[WorkloadKey, int], Ewma]) -> float:
        """Return the first of these means that has a value; 1 if none has."""
        return next((known[workload, level].value for known in ratios if (workload, level) in known), 1.0)


@dataclass(frozen=True)
class PlanCoverage:
    """Coverage by plans [c] of the first d levels below their beams.

    Attributes:
        nodes: int64 [c], size of each plan.
        by_level: float64 [d, c], nodes on each level.
        missed: float64 [d, c], probability to miss a level or one above it.
    """

    nodes: Int64
    by_level: Float64
    missed: Float64

    @classmethod
    def of_prefixes(cls, prefixes: PlanPrefixes, level: Int64, missed: Float64) -> PlanCoverage:
        """Return the coverage of all prefixes of a plan.

        level: int64 [n], level of each of its nodes; 1 is the first below the beams. missed: float64 [d, n + 1].
        """
        # [d, n]: the node in place j of the order is on level i + 1; its running sum is the count on each level.
        is_on_level = level[prefixes.order] == np.arange(1, len(missed) + 1)[:, None]
        counts = np.pad(np.cumsum(is_on_level, axis=1), ((0, 0), (1, 0)))  # the empty prefix comes first
        return cls(np.arange(len(level) + 1), counts, missed)

    @classmethod
    def spread_evenly(cls, nodes: Int64, missed: Float64) -> PlanCoverage:
        """Return the coverage of plans with the same number of nodes on each level: an approximation before drafting."""
        return cls(nodes, np.broadcast_to(nodes / len(missed), missed.shape), missed)


@dataclass(frozen=True)
class ExpectedLatency:
    """Expected time of the rest of a search, by its plan; l is the number of levels below the beams.

    It is first pass + sum_i (S_i - S_{i-1}) * rho_i * R_i (docs/planner.md). S_i is the probability to miss level i or one above
    it. R_i is the time of plain beam search from level i on, and rho_i the ratio of remaining work.

    Attributes:
        first_pass_ns: time of the next pass with so many planned nodes [c] in it.
        widths: int64 [l], beams of the levels.
        baseline_ns: float64 [l], R.
        partly_missed: float64 [l], rho of levels that miss some of their beams.
        mostly_missed: float64 [l], rho of levels that miss most of their beams.
        first_plan: true if no earlier plan covers these levels, so that this plan alone decides how many beams they miss. After
            a miss the earlier plan holds most of them.
    """

    first_pass_ns: Callable[[Int64], Float64]
    widths: Int64
    baseline_ns: Float64
    partly_missed: Float64
    mostly_missed: Float64
    first_plan: bool

    @classmethod
    def below(
        cls,
        start: int,
        missing: int,
        baseline: BaselinePasses,
        ratios: RemainingWorkRatio,
        workload: WorkloadKey,
        first_pass_ns: Callable[[Int64], Float64],
    ) -> ExpectedLatency:
        """Return the estimate for a search at level `start` that misses so many beams there."""
        levels = range(start + 1, len(baseline.widths) + 1)
        return cls(
            first_pass_ns=first_pass_ns,
            widths=baseline.widths[start:],
            baseline_ns=baseline.remaining_ns[start:],
            partly_missed=ratios.partly_missed(workload, levels),
            mostly_missed=ratios.mostly_missed(workload, levels),
            first_plan=baseline.is_mostly_missed(start, missing),
        )

    @property
    def levels(self) -> int:
        """Return the number of levels below the beams that can be planned."""
        return len(self.baseline_ns)

    def total_ns(self, coverage: PlanCoverage) -> Float64:
        """Return the expected time with each plan: float64 [c]."""
        return np.asarray(self.first_pass_ns(coverage.nodes) + self._after_first_pass(self.baseline_ns, coverage))

    def passes(self, coverage: PlanCoverage, plan: int) -> float:
        """Return the expected number of passes with one of the plans, the next one included."""
        one = PlanCoverage(coverage.nodes[[plan]], coverage.by_level[:, [plan]], coverage.missed[:, [plan]])
        passes_from_level = np.arange(self.levels, 0, -1, dtype=np.float64)
        return 1.0 + float(self._after_first_pass(passes_from_level, one)[0])

    def _after_first_pass(self, baseline: Float64, coverage: PlanCoverage) -> Float64:
        """Return the expected cost after the next pass [c]. baseline: float64 [l], cost of plain beam search by level."""
        planned = len(coverage.missed)
        # [d, c]: a plan with fewer nodes on a level than half its beams will miss most of them.
        misses_most = np.zeros(coverage.missed.shape, dtype=bool)
        if self.first_plan:
            misses_most = coverage.by_level < self.widths[:planned, None] / 2
        ratio = np.where(misses_most, self.mostly_missed[:planned, None], self.partly_missed[:planned, None])
        # [d, c]: probability that a level is the first one missed.
        first_missed = np.diff(coverage.missed, axis=0, prepend=0.0)
        after = (first_missed * ratio * baseline[:planned, None]).sum(axis=0)
        if planned < self.levels:  # the first level below the plan is missed as a whole
            after = after + (1.0 - coverage.missed[-1]) * baseline[planned] * self.mostly_missed[planned]
        return np.asarray(after)
