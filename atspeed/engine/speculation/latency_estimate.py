"""What the target still has to do from a plan on, and what that is expected to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from atspeed.engine.search.beams import Float64
from atspeed.engine.search.trie import Int64, Trie
from atspeed.engine.speculation.acceptance_model import WorkloadKey
from atspeed.engine.speculation.ewma import Ewma


@dataclass(frozen=True)
class ObservedPass:
    """A pass of a search, but its first. level: of the beams that it was made for; missing: how many of these. ns: what it took,
    and what was done for it.
    """

    level: int
    missing: int
    ns: float


@dataclass(frozen=True)
class BaselinePasses:
    """The passes that the target alone makes for a search, one for each level 1, 2, ... L-1. widths: int64 [L-1], beams of the
    levels. left: float64 [L-1], nanoseconds from each level on.
    """

    widths: Int64
    left: Float64

    @classmethod
    def of(cls, trie: Trie, beam_width: int, pass_ns: Callable[[Int64], Float64]) -> BaselinePasses:
        """Of a search. pass_ns: what passes over so many beams take."""
        widths = np.minimum(np.diff(trie.level_start)[1 : trie.levels], beam_width)
        return cls(widths, np.cumsum(pass_ns(widths)[::-1])[::-1])

    def are_most(self, level: int, missing: int) -> bool:
        """Whether so many beams are rather all of a level than a few that a plan has left out."""
        return level == 0 or 2 * missing > int(self.widths[level - 1])


class RemainingWorkRatio:
    """What searches went on to take from a level on, over what the target alone takes: means that forget.

    Apart for levels of which most beams were missing, and some. As long as the second was not seen it is taken for the first.
    """

    def __init__(self) -> None:
        self._wholly: dict[tuple[WorkloadKey, int], Ewma] = {}
        self._partly: dict[tuple[WorkloadKey, int], Ewma] = {}

    def learn(self, kind: WorkloadKey, passes: Sequence[ObservedPass], plain: BaselinePasses) -> None:
        """One search more."""
        to_come = 0.0
        for one in reversed(passes):
            to_come += one.ns
            share = to_come / float(plain.left[one.level - 1])
            self.add(kind, one.level, share, whole=plain.are_most(one.level, one.missing))

    def add(self, kind: WorkloadKey, level: int, share: float, *, whole: bool) -> None:
        """One level more of which most beams were missing, or some."""
        (self._wholly if whole else self._partly).setdefault((kind, level), Ewma(1.0)).add(share)

    def wholly(self, kind: WorkloadKey, levels: range) -> Float64:
        """Of levels of which most beams are missing, [l]."""
        return np.array([self._wholly[kind, level].value if (kind, level) in self._wholly else 1.0 for level in levels])

    def partly(self, kind: WorkloadKey, levels: range) -> Float64:
        """Of levels of which some are, [l]."""
        known = self._partly
        return np.array(
            [
                known[kind, level].value if (kind, level) in known else whole
                for level, whole in zip(levels, self.wholly(kind, levels).tolist(), strict=True)
            ]
        )


@dataclass(frozen=True)
class PlanCoverage:
    """What plans [c] cover of the first d levels below their beams.

    nodes: int64 [c], of all levels. by_level: float64 [d, c], of each. missed: float64 [d, c], the probability to miss a level or
    one above it.
    """

    nodes: Int64
    by_level: Float64
    missed: Float64

    @classmethod
    def of_cuts(cls, level: Int64, missed: Float64) -> PlanCoverage:
        """Of all cuts of a plan. level: of its nodes in their order [n], 1 for the first below the beams. missed: [d, n + 1]."""
        by_level = np.cumsum(level == np.arange(1, len(missed) + 1)[:, None], axis=1)
        return cls(np.arange(len(level) + 1), np.pad(by_level, ((0, 0), (1, 0))), missed)

    @classmethod
    def evenly(cls, nodes: Int64, missed: Float64) -> PlanCoverage:
        """Of plans that have as many nodes on each level, as far as is known."""
        return cls(nodes, np.broadcast_to(nodes / len(missed), missed.shape), missed)


@dataclass(frozen=True)
class ExpectedLatency:
    """All that a search has before it, in nanoseconds, by what is planned. `l`: the levels below the beams.

    first: the next pass, with so many planned nodes [c] in it.
    widths: int64 [l], beams of the levels. plain: float64 [l], the target alone from each level on. partly, wholly: float64 [l],
    the share of it that searches take from a level on of which some beams were missing, and from one of which most were. bare:
    whether which it is depends on this plan alone; where the beams are those that an earlier one left out, that has most.
    """

    first: Callable[[Int64], Float64]
    widths: Int64
    plain: Float64
    partly: Float64
    wholly: Float64
    bare: bool

    @classmethod
    def below(
        cls,
        start: int,
        missing: int,
        plain: BaselinePasses,
        shares: RemainingWorkRatio,
        kind: WorkloadKey,
        first: Callable[[Int64], Float64],
    ) -> ExpectedLatency:
        """Of a search that has come to beams of level `start`, of which so many are missing."""
        levels = range(start + 1, len(plain.widths) + 1)
        return cls(
            first=first,
            widths=plain.widths[start:],
            plain=plain.left[start:],
            partly=shares.partly(kind, levels),
            wholly=shares.wholly(kind, levels),
            bare=plain.are_most(start, missing),
        )

    @property
    def levels(self) -> int:
        """Levels below the beams that can be planned."""
        return len(self.plain)

    def expected(self, cover: PlanCoverage) -> Float64:
        """All of it [c]."""
        return np.asarray(self.first(cover.nodes) + self._after(self.plain, cover))

    def passes(self, cover: PlanCoverage, plan: int) -> float:
        """Passes, the next included, with one of the plans."""
        one = PlanCoverage(cover.nodes[[plan]], cover.by_level[:, [plan]], cover.missed[:, [plan]])
        return 1.0 + float(self._after(np.arange(self.levels, 0, -1, dtype=np.float64), one)[0])

    def _after(self, whole: Float64, cover: PlanCoverage) -> Float64:
        """What comes after the next pass [c], if the target alone takes `whole` [l] from each level on."""
        planned = len(cover.missed)
        few = (
            cover.by_level < self.widths[:planned, None] / 2 if self.bare else np.zeros(cover.missed.shape, dtype=bool)
        )
        share = np.where(few, self.wholly[:planned, None], self.partly[:planned, None])
        first_missed = np.diff(cover.missed, axis=0, prepend=0.0)
        after = (first_missed * share * whole[:planned, None]).sum(axis=0)
        if planned < self.levels:
            after = after + (1.0 - cover.missed[-1]) * whole[planned] * self.wholly[planned]
        return np.asarray(after)
