"""What a pass of the target may hold beyond what its search asks for now, because it is likely to ask for it next.

A search that the target goes on with by itself would make a pass for every level. What the recollection foresees of the levels
below can be in the same pass; then that level needs none. How much of it is decided like the size of a plan (method, section 7):
by what a pass costs, and by how much of such plans earlier searches turned out to need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from engine.beams import Beams, Float64
from engine.foresight.coverage import Coverage, Cuts, Kind, Requirement
from engine.foresight.outlook import Cover, Outlook, Shares
from engine.foresight.recollection import Recollection
from engine.plan import Plan
from engine.scoring import Children, ScoringRule
from engine.trie import Int64, Pruning, Trie

_ROOM = 4
"""Most nodes foreseen for each beam."""
_MODE = "lookahead"

PassNs = Callable[[npt.ArrayLike, float], Float64]
"""Nanoseconds of passes over so many new tokens [c], on so many that are there already."""


class Lookahead:
    """What searches teach, for those to come. One for a model and a catalogue; not safe for several threads at a time.

    pass_ns: of passes in which this search has so many tokens, and all that share them as many. together: how many share one,
    lately. Where several do, each waits for what is foreseen for one, while the pass that is saved would have served them all:
    it counts for one's share.
    """

    def __init__(self, trie: Trie, rule: ScoringRule, pass_ns: PassNs, max_nodes: int) -> None:
        self.trie, self.pass_ns, self.max_nodes = trie, pass_ns, max_nodes
        self.recollection = Recollection(trie, rule)
        self.coverage = Coverage(trie.levels, max_nodes)
        self.shares, self.together = Shares(), 1.0

    def of_search(self, width: int, pruning: Pruning, prompt_tokens: int, *, foresees: bool = True) -> SearchAhead:
        """For one search of so many beams on a prompt of so many tokens; one that foresees nothing teaches all the same."""
        return SearchAhead(self, width, pruning, prompt_tokens, foresees)


@dataclass(frozen=True)
class _Foreseen:
    """A plan before it was cut. level: of the beams that it hangs below. evaluated: how many nodes were, before it."""

    level: int
    plan: Plan
    most: int
    evaluated: frozenset[int]


@dataclass
class SearchAhead:
    """One search's view of it. passes: (level, missing beams, tokens) of each so far."""

    lookahead: Lookahead
    width: int
    pruning: Pruning
    prompt_tokens: int
    foresees: bool
    passes: list[tuple[int, int, int]] = field(default_factory=list)
    _foreseen: list[_Foreseen] = field(default_factory=list)

    def __post_init__(self) -> None:
        trie = self.lookahead.trie
        self._kind = Kind.of(_MODE, self.width)
        self._widths = np.minimum(np.diff(trie.level_start)[1 : trie.levels], self.width)

    def nodes(self, beams: Beams, missing: Int64, evaluated: Mapping[int, Children]) -> Int64:
        """The nodes of the pass that `missing` beams of a level need, ascending: these, and what is foreseen below.

        beams: of the level, all that are evaluated or missing.
        """
        if not self.foresees:
            return missing
        level = int(self.lookahead.trie.depth(missing[:1])[0])
        ahead = self._ahead(level, beams, missing, evaluated)
        nodes = np.sort(np.append(missing, ahead))
        self.passes.append((level, len(missing), len(nodes)))
        return nodes

    def _ahead(self, level: int, beams: Beams, missing: Int64, evaluated: Mapping[int, Children]) -> Int64:
        lookahead, trie = self.lookahead, self.lookahead.trie
        most = min(_ROOM * self.width, lookahead.max_nodes - len(missing))
        if level == 0 or level >= trie.levels - 1 or most <= 0 or not lookahead.recollection.knows(beams):
            return np.empty(0, dtype=np.int64)
        plan = lookahead.recollection.plan(beams, evaluated, self.width, most, self.pruning)
        self._foreseen.append(_Foreseen(level, plan, most, frozenset(evaluated)))
        cuts = Cuts.of(plan, complete=len(plan.node) < most)
        missed = lookahead.coverage.missed(self._kind, level, cuts.depth)
        cover = Cover.of_cuts(trie.depth(plan.node[cuts.order]) - level, missed)
        best = int(np.argmin(self._outlook(level, len(missing)).expected(cover)))
        return plan.node[cuts.order[:best]]

    def _outlook(self, level: int, missing: int) -> Outlook:
        lookahead, below = self.lookahead, range(level + 1, self.lookahead.trie.levels)
        return Outlook(
            first=lambda nodes: self._pass_ns(missing + nodes),
            widths=self._widths[level:],
            plain=self._plain[level:],
            partly=lookahead.shares.partly(self._kind, below),
            wholly=lookahead.shares.wholly(self._kind, below),
            bare=self._is_whole(level, missing),
        )

    @cached_property
    def _plain(self) -> Float64:
        """What it takes, a pass for each level, from level 1, 2, ... L-1 on."""
        return np.cumsum(self._pass_ns(self._widths)[::-1])[::-1] / self.lookahead.together

    def _pass_ns(self, tokens: Int64) -> Float64:
        return self.lookahead.pass_ns(tokens, self.prompt_tokens)

    def _is_whole(self, level: int, missing: int) -> bool:
        return 2 * missing > int(self._widths[level - 1])

    def learn(self, used: Sequence[Int64], evaluated: Mapping[int, Children]) -> None:
        """From a search that has ended. used: by level, the nodes that it went through and had to have evaluated, ascending."""
        self.lookahead.recollection.learn(evaluated, self.pruning)
        if not self.foresees:
            return
        for one in self._foreseen:
            self.lookahead.coverage.learn(self._kind, one.level, self._required(one, used))
        to_come, plain = 0.0, self._plain
        for level, missing, tokens in reversed(self.passes):
            if level:
                to_come += float(self._pass_ns(np.array(tokens))) / self.lookahead.together
                whole = self._is_whole(level, missing)
                self.lookahead.shares.add(self._kind, level, to_come / plain[level - 1], whole=whole)

    def _required(self, foreseen: _Foreseen, used: Sequence[Int64]) -> list[Requirement]:
        cuts = Cuts.of(foreseen.plan, complete=len(foreseen.plan.node) < foreseen.most)
        needed = (
            np.array([node for node in level.tolist() if node not in foreseen.evaluated], dtype=np.int64)
            for level in used[foreseen.level + 1 :]
        )
        return [cuts.required(foreseen.plan, level) for level in needed]
