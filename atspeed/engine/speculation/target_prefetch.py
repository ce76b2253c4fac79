"""What a pass of the target may hold beyond what its search asks for now, because it is likely to ask for it next.

A search that the target goes on with by itself would make a pass for every level. What the continuation table foresees of the
levels below can be in the same pass; then that level needs none. How much of it is decided like the size of a plan (method,
section 7): by what a pass costs, and by how much of such plans earlier searches turned out to need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from atspeed.engine.search.beams import Beams, Float64
from atspeed.engine.search.scoring import Children, ScoringRule
from atspeed.engine.search.trie import Int64, Pruning, Trie
from atspeed.engine.speculation.acceptance_model import AcceptanceModel, ProposedPlan, WorkloadKey
from atspeed.engine.speculation.latency_estimate import (
    BaselinePasses,
    ExpectedLatency,
    ObservedPass,
    PlanCoverage,
    RemainingWorkRatio,
)
from atspeed.engine.speculation.latency_model import LatencyModel, Pass
from atspeed.engine.speculation.prefix_prior import PrefixPrior

_ROOM = 4
"""Most nodes foreseen for each beam."""
_MODE = "lookahead"


class TargetPrefetcher:
    """What searches teach, for those to come. One for a model and a catalogue; not safe for several threads at a time.

    costs: of the model's passes; kept by whoever makes them.
    """

    def __init__(self, trie: Trie, rule: ScoringRule, costs: LatencyModel, max_nodes: int) -> None:
        self.trie, self.costs, self.max_nodes = trie, costs, max_nodes
        self.table, self.coverage, self.shares = (
            PrefixPrior(trie, rule),
            AcceptanceModel(trie.levels, max_nodes),
            RemainingWorkRatio(),
        )

    def of_search(self, width: int, pruning: Pruning, prompt_tokens: int, *, foresees: bool) -> SearchPrefetcher:
        """For one search of so many beams on a prompt of so many tokens; one that foresees nothing teaches all the same.

        Nor does any foresee something while passes wait for longer than they take: then their work counts, and what is foreseen
        in vain is more of it.
        """
        full = self.costs.full(Pass(width, prompt_tokens, width))
        return SearchPrefetcher(self, width, pruning, prompt_tokens, foresees=foresees and not full)


class SearchPrefetcher:
    """One search's view of it."""

    def __init__(
        self, lookahead: TargetPrefetcher, width: int, pruning: Pruning, prompt_tokens: int, *, foresees: bool
    ) -> None:
        self._all, self._width, self._pruning, self._prompt_tokens = lookahead, width, pruning, prompt_tokens
        self._foresees, self._kind = foresees, WorkloadKey.of(_MODE, width)
        self._planned: list[ProposedPlan] = []
        self._passes: list[ObservedPass] = []

    def nodes(self, beams: Beams, missing: Int64, evaluated: Mapping[int, Children]) -> Int64:
        """The nodes of the pass that `missing` beams of a level need, ascending: these, and what is foreseen below.

        beams: of the level, all that are evaluated or missing.
        """
        if not self._foresees:
            return missing
        level = int(self._all.trie.depth(missing[:1])[0])
        nodes = np.sort(np.append(missing, self._ahead(level, beams, missing, evaluated)))
        if level:
            took = float(self._pass_ns(np.array(len(nodes)))) / self._all.costs.together
            self._passes.append(ObservedPass(level, len(missing), took))
        return nodes

    def learn(self, used: Sequence[Int64], evaluated: Mapping[int, Children]) -> None:
        """From a search that has ended. used: by level, the nodes that it went through and had to have evaluated, ascending."""
        self._all.table.learn(evaluated, self._pruning)
        for planned in self._planned:
            self._all.coverage.learn(self._kind, planned.start, planned.required(used))
        self._all.shares.learn(self._kind, self._passes, self._plain)

    def _ahead(self, level: int, beams: Beams, missing: Int64, evaluated: Mapping[int, Children]) -> Int64:
        every, levels = self._all, self._all.trie.levels - 1 - level
        most = min(_ROOM * self._width, every.max_nodes - len(missing))
        if level == 0 or levels <= 0 or most <= 0 or not every.table.knows(beams):
            return np.empty(0, dtype=np.int64)
        plan = every.table.plan(beams, evaluated, self._width, most, self._pruning)
        planned = ProposedPlan(level, plan, most, levels, frozenset(evaluated))
        self._planned.append(planned)
        cuts = planned.cuts()
        missed = every.coverage.missed(self._kind, level, cuts.depth)
        cover = PlanCoverage.of_cuts(every.trie.depth(plan.node[cuts.order]) - level, missed)
        best = int(np.argmin(self._outlook(level, len(missing)).expected(cover)))
        return plan.node[cuts.order[:best]]

    def _outlook(self, level: int, missing: int) -> ExpectedLatency:
        return ExpectedLatency.below(
            level, missing, self._plain, self._all.shares, self._kind, lambda nodes: self._pass_ns(missing + nodes)
        )

    @cached_property
    def _plain(self) -> BaselinePasses:
        """Each at one request's share of it: where several share a pass, all of them wait for what is foreseen for one, while the
        pass that is saved would have served them all.
        """
        return BaselinePasses.of(
            self._all.trie, self._width, lambda beams: self._pass_ns(beams) / self._all.costs.together
        )

    def _pass_ns(self, tokens: Int64) -> Float64:
        """Without the queue: what all wait for are each other's passes, and longer ones would be no cure."""
        costs = self._all.costs
        return np.asarray(costs.forward(tokens, self._prompt_tokens) + costs.besides(tokens))
