"""How large a plan has to be: learnt from every request, as each tells what would have sufficed.

The margins of a plan order its nodes, so that every smaller plan is a cut: all nodes down to some depth, depth = -margin. Once a
search has ended it is known which nodes it used, hence the *required depth* of each level: the smallest cut that would
have held all of its beams there. Where a beam was not in the plan, all that is known is that it lies deeper than the plan:
the observation is censored, and the share of requests that require more than a depth is Kaplan and Meier's estimate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atspeed.engine.search.beams import Float64
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.trie import Int64, among

NOTHING = -np.inf
"""The depth of the empty cut, and what is required where no planned node is."""

MEMORY = 100.0
PROFILE_MEMORY = 20  # plans: short, as what they were worth by older beliefs says nothing
_SURE = -1e6  # the depth of nodes that nothing speaks against, margin +inf
_STEPS = np.geomspace(2.0**-6, 2.0**6, 97)
DEPTHS = np.concatenate([[NOTHING, _SURE], -_STEPS[::-1], [0.0], _STEPS])
# The weight of one request: a fifth of it requires the draft's own beams, the rest exponentially more, a unit on average.
PRIOR = -np.diff(np.where(DEPTHS < 0, 1.0, 0.8 * np.exp(-np.maximum(DEPTHS, 0.0))), prepend=1.0)


@dataclass(frozen=True)
class PlanPrefixes:
    """All cuts of a plan: the first 0, 1, ... n of its nodes by margin.

    order: int64 [n], rows of the plan. depth: float64 [n + 1], down to which each cut is complete; ascending.
    """

    order: Int64
    depth: Float64

    @classmethod
    def of(cls, plan: Plan, *, complete: bool) -> PlanPrefixes:
        """Of a plan. complete: whether the draft had room for more, so that nothing is left of the plan's last depth."""
        order = np.argsort(-plan.margin, kind="stable")  # in a tie by node, so that parents come before their children
        depth = np.maximum(-plan.margin[order], _SURE)
        last_of_its_depth = np.append(depth[1:] > depth[:-1], complete)[: len(depth)]
        down_to = np.maximum.accumulate(np.append(NOTHING, np.where(last_of_its_depth, depth, NOTHING)))
        return cls(order, down_to)

    def required(self, plan: Plan, needed: Int64) -> Requirement:
        """What a level with these nodes to be evaluated would have required."""
        if not len(needed):
            return Requirement(NOTHING)
        rows = np.searchsorted(plan.node, needed)
        if (rows >= len(plan.node)).any() or (plan.node[rows] != needed).any():
            return Requirement(float(self.depth[-1]), censored=True)
        return Requirement(float(np.maximum(-plan.margin[rows], _SURE).max()))


@dataclass(frozen=True)
class ProposedPlan:
    """A plan before it was cut. start: the level of the beams that it hangs below. most, levels: nodes, and levels below these
    beams, that it could have at most. known: the nodes that were evaluated or about to be when it was made.
    """

    start: int
    plan: Plan
    most: int
    levels: int
    known: frozenset[int]

    def cuts(self) -> PlanPrefixes:
        """All its cuts."""
        return PlanPrefixes.of(self.plan, complete=len(self.plan.node) < self.most)

    def required(self, used: Sequence[Int64]) -> list[Requirement]:
        """What each of its levels would have required, by the nodes that the search went through and had to have evaluated: by
        level, each ascending. What was known before is not required.
        """
        cuts, known = self.cuts(), np.array(sorted(self.known), dtype=np.int64)
        below = used[self.start + 1 :][: self.levels]
        return [cuts.required(self.plan, level[~among(known, level)]) for level in below]


@dataclass(frozen=True)
class Requirement:
    """The required depth of a level; if censored, what it exceeds."""

    depth: float
    censored: bool = False

    def __or__(self, deeper: Requirement) -> Requirement:
        """Of two levels together."""
        if self.censored or deeper.censored:
            return max((one for one in (self, deeper) if one.censored), key=lambda one: one.depth)
        return max(self, deeper, key=lambda one: one.depth)


class SurvivalCurve:
    """P(required depth > d), from partly censored observations that are slowly forgotten (Kaplan and Meier, 1958).

    Depths are rounded to a grid: requirements up, cuts down. So a cut never looks better than it is. Of what is deeper than all
    that was seen, a weak prior says how it goes on: every unit of margin holds most of those that are left.
    """

    def __init__(self) -> None:
        self._events, self._censored = np.zeros(len(DEPTHS)), np.zeros(len(DEPTHS))
        self._survived: Float64 | None = None

    def add(self, requirement: Requirement, age: float = 1.0) -> None:
        """One observation more; those before it are so many requests older."""
        self._survived = None
        for counts in (self._events, self._censored):
            counts *= (1.0 - 1.0 / MEMORY) ** age
        if not requirement.censored and requirement.depth <= DEPTHS[-1]:
            self._events[np.searchsorted(DEPTHS, requirement.depth)] += 1.0
        else:
            self._censored[_down(np.asarray(requirement.depth))] += 1.0

    @property
    def survived(self) -> Float64:
        """P(required depth > d) for every depth d of the grid."""
        if self._survived is None:
            events = self._events + PRIOR
            at_risk = np.cumsum((events + self._censored)[::-1])[::-1]
            self._survived = np.asarray(np.cumprod(1.0 - events / at_risk), dtype=np.float64)
        return self._survived

    def beyond(self, depth: Float64) -> Float64:
        """P(required depth > d) for depths d [c]."""
        return np.asarray(self.survived[_down(depth)])


def _down(depth: Float64) -> Int64:
    return np.searchsorted(DEPTHS, depth, side="right") - 1


@dataclass(frozen=True)
class WorkloadKey:
    """Requests that are alike. mode: what the search asks of its beams. width: beam widths up to the next power of two."""

    mode: str
    width: int

    @classmethod
    def of(cls, mode: str, beam_width: int) -> WorkloadKey:
        """The kind of a request."""
        return cls(mode, (beam_width - 1).bit_length())


class _SizeProfile:
    """Means over plans that forget, for each level and size of a plan: float64 [l, s]. plans: of each size, up to the memory."""

    def __init__(self, levels: int, sizes: int) -> None:
        self.missed, self.plans = np.ones((levels, sizes)), np.zeros(sizes)

    def add(self, missed: Float64) -> None:
        """One plan more, of the first sizes alone [l, f]."""
        known = missed.shape[1]
        self.plans[:known] = np.minimum(PROFILE_MEMORY, self.plans[:known] + 1)
        self.missed[:, :known] += (missed - self.missed[:, :known]) / self.plans[:known]


class AcceptanceModel:
    """The probability that a plan misses a level, by the kind of the request and the level of the beams that it hangs below.

    A level counts as missed with every level above it that is: what follows the first miss is another plan's affair.
    """

    def __init__(self, levels: int, max_nodes: int) -> None:
        self._levels = levels
        self._sizes = np.unique(np.geomspace(1, max_nodes, 24).round()).astype(np.int64)
        self._required: dict[tuple[WorkloadKey, int], list[SurvivalCurve]] = {}
        self._profiles: dict[tuple[WorkloadKey, int, int], _SizeProfile] = {}
        self._observations: Counter[tuple[WorkloadKey, int]] = Counter()

    def observations(self, kind: WorkloadKey, start: int) -> int:
        """Plans that were learnt from."""
        return self._observations[kind, start]

    def missed(self, kind: WorkloadKey, start: int, depth: Float64) -> Float64:
        """[l, c]: for each of the l levels below a plan's beams, the probability that cuts at depths [c] miss it or one above."""
        places = _down(depth)
        levels = [level.survived[places] for level in self._levels_of(kind, start)]
        return np.maximum.accumulate(np.asarray(levels), axis=0)

    def learn(self, kind: WorkloadKey, start: int, requirements: Sequence[Requirement], age: float = 1.0) -> None:
        """What the levels below a plan's beams turned out to require, those that it was to cover. age: requests since the last
        that was learnt from, this included; what was learnt before fades with each of them.
        """
        self._observations[kind, start] += 1
        so_far = Requirement(NOTHING)
        for level, requirement in zip(self._levels_of(kind, start), requirements, strict=False):
            so_far |= requirement
            level.add(so_far, age)

    def note(self, kind: WorkloadKey, start: int, missed: Float64, *, complete: bool) -> None:
        """That of one plan of d levels, cuts of 0, 1, ... n nodes miss these with probabilities [d, n + 1]."""
        nodes = missed.shape[1] - 1
        known = len(self._sizes) if complete else int(np.searchsorted(self._sizes, nodes, side="right"))
        profile = self._profiles.setdefault((kind, start, len(missed)), _SizeProfile(len(missed), len(self._sizes)))
        profile.add(missed[:, np.minimum(self._sizes[:known], nodes)])

    def profile(self, kind: WorkloadKey, start: int, levels: int) -> tuple[Int64, Float64]:
        """Sizes of plans of so many levels [s], as far as there were such, and on average the probability that one misses each of
        these [levels, s].
        """
        if (profile := self._profiles.get((kind, start, levels))) is None:
            return self._sizes[:0], np.empty((levels, 0))
        known = np.count_nonzero(profile.plans)
        return self._sizes[:known], profile.missed[:, :known]

    def _levels_of(self, kind: WorkloadKey, start: int) -> list[SurvivalCurve]:
        below = self._levels - 1 - start
        return self._required.setdefault((kind, start), [SurvivalCurve() for _ in range(below)])
