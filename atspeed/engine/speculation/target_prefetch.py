"""Target prefetch: nodes that are evaluated before the search asks for them.

In an autonomous search the target makes one pass for every level. If a pass also holds the nodes that the prior over prefixes
expects on the levels below, those levels may need no pass. The number of nodes is chosen like the size of a plan
(docs/planner.md). It depends on the cost of a pass and on the nodes that earlier searches needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.scoring import Children, ScoringRule
from atspeed.engine.search.trie import Pruning, Trie
from atspeed.engine.speculation.acceptance_model import AcceptanceModel, ProposedPlan, WorkloadKey
from atspeed.engine.speculation.latency_estimate import (
    MAX_COST_RATIO,
    BaselinePasses,
    ExpectedLatency,
    ObservedPass,
    PlanCoverage,
    RemainingWorkRatio,
)
from atspeed.engine.speculation.latency_model import LatencyModel, Pass
from atspeed.engine.speculation.prefix_prior import PrefixPrior

# Most prefetched nodes for each beam. On Amazon Beauty, so many nodes hold all beams of the last level for more than nine
# requests in ten, and all beams of the level before it for three in four at K = 5 and 10 (docs/log.md).
_MAX_NODES_PER_BEAM = 4
# Mode of the workload keys; the target's estimates have only one.
_MODE = "prefetch"


class TargetPrefetcher:
    """Estimates from past searches of one model and catalogue. Not thread-safe.

    Attributes:
        latency: the model's latency; its owner keeps it up to date.
        prior: the prior over prefixes.
        acceptance: how likely prefetched nodes cover each level.
        remaining_work: how long searches go on after a miss.
    """

    def __init__(self, trie: Trie, rule: ScoringRule, latency: LatencyModel, max_nodes: int) -> None:
        self.trie = trie
        self.latency = latency
        self.max_nodes = max_nodes
        self.prior = PrefixPrior(trie, rule)
        self.acceptance = AcceptanceModel(trie.levels, max_nodes)
        self.remaining_work = RemainingWorkRatio()

    def for_search(
        self, widths: BeamWidths, pruning: Pruning, prompt_tokens: int, *, enabled: bool
    ) -> SearchPrefetcher:
        """Return the prefetcher of one search with these beam widths.

        If not `enabled` it only learns. The same holds while the target is saturated. Throughput then depends on the work of each
        request, and an unused node adds work.
        """
        saturated = self.latency.is_saturated(Pass(widths.largest, prompt_tokens, widths.largest))
        return SearchPrefetcher(self, widths, pruning, prompt_tokens, enabled=enabled and not saturated)


class SearchPrefetcher:
    """Prefetcher of one search."""

    def __init__(
        self, shared: TargetPrefetcher, widths: BeamWidths, pruning: Pruning, prompt_tokens: int, *, enabled: bool
    ) -> None:
        self._shared = shared
        self._widths = widths
        self._pruning = pruning
        self._prompt_tokens = prompt_tokens
        self._enabled = enabled
        self._workload = WorkloadKey.of(_MODE, widths)
        self._plans: list[ProposedPlan] = []
        self._passes: list[ObservedPass] = []

    def nodes(self, beams: Beams, missing: Int64, evaluated: Mapping[int, Children]) -> Int64:
        """Return the ascending nodes of the next pass: the `missing` beams of a level, and prefetched nodes below.

        beams: all beams of the level that are evaluated or missing.
        """
        if not self._enabled:
            return missing
        level = self._shared.trie.depth_of(int(missing[0]))
        nodes = np.sort(np.append(missing, self._prefetched(level, beams, missing, evaluated)))
        if level:
            duration_ns = float(self._pass_ns(np.array(len(nodes)))) / self._shared.latency.batch_occupancy
            self._passes.append(ObservedPass(level, len(missing), duration_ns))
        return nodes

    def learn(self, used: Sequence[Int64], evaluated: Mapping[int, Children]) -> None:
        """Learn from a search that has ended.

        used: for each level, the nodes that the search used and had to have evaluated, ascending.
        """
        self._shared.prior.learn(evaluated, self._pruning)
        for plan in self._plans:
            self._shared.acceptance.learn(self._workload, plan.start, plan.required(used))
        self._shared.remaining_work.learn(self._workload, self._passes, self._baseline)

    def _prefetched(self, level: int, beams: Beams, missing: Int64, evaluated: Mapping[int, Children]) -> Int64:
        """Return the prefix of the prior's plan with the least expected latency, or nothing if it saves too little."""
        shared = self._shared
        levels = shared.trie.levels - 1 - level
        max_nodes = min(_MAX_NODES_PER_BEAM * self._widths.largest, shared.max_nodes - len(missing))
        if level == 0 or levels <= 0 or max_nodes <= 0 or not shared.prior.knows_most(beams):
            return np.empty(0, dtype=np.int64)
        plan = shared.prior.plan(beams, evaluated, self._widths, max_nodes, self._pruning)
        proposed = ProposedPlan(level, plan, max_nodes, levels, frozenset(evaluated))
        self._plans.append(proposed)
        prefixes = proposed.prefixes()
        missed = shared.acceptance.missed(self._workload, level, prefixes.depth)
        coverage = PlanCoverage.of_prefixes(prefixes, shared.trie.depth(plan.node) - level, missed)
        expected = self._expected_latency(level, len(missing)).total_ns(coverage)
        best = int(np.argmin(expected))
        if expected[best] >= MAX_COST_RATIO * expected[0]:
            best = 0
        return plan.node[prefixes.order[:best]]

    def _expected_latency(self, level: int, missing: int) -> ExpectedLatency:
        return ExpectedLatency.below(
            level,
            missing,
            self._baseline,
            self._shared.remaining_work,
            self._workload,
            lambda nodes: self._pass_ns(missing + nodes),
        )

    @cached_property
    def _baseline(self) -> BaselinePasses:
        """Return the passes of plain beam search, each divided by the requests that share it.

        All co-batched requests wait for the nodes prefetched for one of them, while the pass that is saved would have served
        them all.
        """
        occupancy = self._shared.latency.batch_occupancy
        return BaselinePasses.of(self._shared.trie, self._widths, lambda beams: self._pass_ns(beams) / occupancy)

    def _pass_ns(self, tokens: Int64) -> Float64:
        """Return the time of passes without the queue: it consists of other requests' passes, and longer passes lengthen it."""
        latency = self._shared.latency
        return np.asarray(latency.forward_ns(tokens, self._prompt_tokens) + latency.overhead_ns(tokens))
