"""Estimate of how large a plan must be to cover the beams of each level.

The margins of a plan order its nodes. Every smaller plan is a prefix: all nodes down to a depth, where depth = -margin. A search
that has ended shows the *required depth* of each level, the depth of the smallest prefix that holds all its beams. If the plan
lacks one of them, the observation is censored: the required depth only has a lower bound. The share of requests that require
more than a depth is the estimate of Kaplan and Meier (1958).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atspeed.engine.arrays import Float64, Int64
from atspeed.engine.ewma import MEMORY
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.trie import among

EMPTY_DEPTH = -np.inf
"""Depth of the empty prefix; required depth of a level that needs no planned node."""
# Depth of nodes whose margin is +inf. Any number below the grid's other depths would do.
_CERTAIN_DEPTH = -1e6
# Depths from 1/64 to 64 units of margin, 8 for each power of two: rounding moves a depth by at most 9 % (2^(1/8)). In nats, 1/64
# changes a probability by 1.6 %, and a node that is e^64 times less likely than the last beam is never a beam.
_POSITIVE_DEPTHS = np.geomspace(2.0**-6, 2.0**6, 97)
# float64 [197], ascending: the grid of depths.
DEPTHS = np.concatenate([[EMPTY_DEPTH, _CERTAIN_DEPTH], -_POSITIVE_DEPTHS[::-1], [0.0], _POSITIVE_DEPTHS])
# Share of requests that require more than the draft's own beams, in the prior. Chosen, not measured: the whole prior has the
# weight of one request, so a few observations outweigh it.
_PRIOR_BEYOND_OWN = 0.8
# float64 [197]: the prior's requests at each depth, one in all. A fifth requires the draft's own beams (depth 0), and every
# further unit of margin holds 1 - 1/e of the rest.
_PRIOR_SURVIVAL = np.where(DEPTHS < 0, 1.0, _PRIOR_BEYOND_OWN * np.exp(-np.maximum(DEPTHS, 0.0)))
PRIOR = -np.diff(_PRIOR_SURVIVAL, prepend=1.0)
# Plans that a size profile remembers. Fewer than `MEMORY`, since each holds probabilities by the estimates of its time.
_PROFILE_MEMORY = 20
# Plan sizes of a profile: from 1 to 240 nodes each is 27 % above the one before.
_PROFILE_SIZES = 24


@dataclass(frozen=True)
class RequiredDepth:
    """Required depth of a level.

    Attributes:
        depth: the required depth; if censored, a lower bound of it.
        censored: true if the plan lacked one of the beams.
    """

    depth: float
    censored: bool = False

    def deeper(self, other: RequiredDepth) -> RequiredDepth:
        """Return the required depth of two levels together. A censored one outweighs a known one."""
        return max(self, other, key=lambda one: (one.censored, one.depth))


@dataclass(frozen=True)
class PlanPrefixes:
    """Prefixes of a plan: its first 0, 1, ... n nodes by margin.

    Attributes:
        order: int64 [n], rows of the plan by descending margin.
        depth: float64 [n + 1], ascending; depth down to which each prefix is complete.
    """

    order: Int64
    depth: Float64

    @classmethod
    def of(cls, plan: Plan, *, complete: bool) -> PlanPrefixes:
        """Return the prefixes of a plan. complete: true if the draft had room for more nodes."""
        order = np.argsort(-plan.margin, kind="stable")  # ties by node, so that parents come before their children
        depth = np.maximum(-plan.margin[order], _CERTAIN_DEPTH)
        # A prefix is complete down to a depth once it holds the last node of that depth. The draft may have left out nodes of
        # the plan's last depth if it had no room for more.
        last_of_its_depth = np.append(depth[1:] > depth[:-1], complete)[: len(depth)]
        complete_depth = np.append(EMPTY_DEPTH, np.where(last_of_its_depth, depth, EMPTY_DEPTH))
        return cls(order, np.maximum.accumulate(complete_depth))

    def required(self, plan: Plan, needed: Int64) -> RequiredDepth:
        """Return the required depth of a level that needs these nodes, ascending [m]."""
        if not len(needed):
            return RequiredDepth(EMPTY_DEPTH)
        rows = np.searchsorted(plan.node, needed)
        if (rows >= len(plan.node)).any() or (plan.node[rows] != needed).any():
            return RequiredDepth(float(self.depth[-1]), censored=True)
        return RequiredDepth(float(np.maximum(-plan.margin[rows], _CERTAIN_DEPTH).max()))


@dataclass(frozen=True)
class ProposedPlan:
    """Plan before it was cut.

    Attributes:
        start: level of the beams that it hangs below.
        plan: the nodes.
        max_nodes: nodes that it could have at most.
        levels: levels below the beams that it could have at most.
        known: nodes that were evaluated, or about to be, when it was made.
    """

    start: int
    plan: Plan
    max_nodes: int
    levels: int
    known: frozenset[int]

    def prefixes(self) -> PlanPrefixes:
        """Return all prefixes of the plan."""
        return PlanPrefixes.of(self.plan, complete=len(self.plan.node) < self.max_nodes)

    def required(self, used: Sequence[Int64]) -> list[RequiredDepth]:
        """Return the required depth of each level of the plan.

        used: for each level of the trie, the nodes that the search used and had to have evaluated, ascending. Nodes that were
        known before are not required.
        """
        prefixes = self.prefixes()
        known = np.array(sorted(self.known), dtype=np.int64)
        below = used[self.start + 1 :][: self.levels]
        return [prefixes.required(self.plan, level[~among(known, level)]) for level in below]


class SurvivalCurve:
    """P(required depth > d) from partly censored observations that fade (Kaplan and Meier, 1958).

    Depths are rounded to the grid, required ones up and censored ones down, so a prefix never looks better than it is. The prior
    continues the curve beyond all observations.
    """

    def __init__(self) -> None:
        # float64 [197]: weight of the observations at each depth.
        self._events = np.zeros(len(DEPTHS))
        self._censored = np.zeros(len(DEPTHS))
        self._survived: Float64 | None = None

    def add(self, required: RequiredDepth, age: float = 1.0) -> None:
        """Add an observation. Those before it fade by `age` requests."""
        self._survived = None
        for counts in (self._events, self._censored):
            counts *= (1.0 - 1.0 / MEMORY) ** age
        if not required.censored and required.depth <= DEPTHS[-1]:
            self._events[np.searchsorted(DEPTHS, required.depth)] += 1.0
        else:
            self._censored[_grid_index(np.asarray(required.depth))] += 1.0

    @property
    def survived(self) -> Float64:
        """Return P(required depth > d) for every depth d of the grid: float64 [197]."""
        if self._survived is None:
            events = self._events + PRIOR
            # At risk at d: all observations that end at d or deeper. Of these, the share 1 - events / at_risk survives.
            at_risk = np.cumsum((events + self._censored)[::-1])[::-1]
            self._survived = np.asarray(np.cumprod(1.0 - events / at_risk), dtype=np.float64)
        return self._survived


def _grid_index(depth: Float64) -> Int64:
    """Return the index of the deepest grid depth that is not deeper than `depth`."""
    return np.searchsorted(DEPTHS, depth, side="right") - 1


@dataclass(frozen=True)
class WorkloadKey:
    """Key of requests that share their estimates.

    Attributes:
        mode: the request's mode.
        width: exponent of the power of two up to which the largest beam width is rounded.
        per_level: true if the levels differ in width.
    """

    mode: str
    width: int
    per_level: bool = False

    @classmethod
    def of(cls, mode: str, beam_widths: BeamWidths) -> WorkloadKey:
        """Return the key of a request."""
        return cls(mode, (beam_widths.largest - 1).bit_length(), bool(beam_widths.per_level))


class _SizeProfile:
    """Mean miss probabilities by plan size: an `Ewma` for each size, over arrays.

    Attributes:
        missed: float64 [l, s], by level and size.
        plans: float64 [s], number of plans of each size, up to the memory.
    """

    def __init__(self, levels: int, sizes: int) -> None:
        self.missed = np.ones((levels, sizes))
        self.plans = np.zeros(sizes)

    def add(self, missed: Float64) -> None:
        """Add a plan's probabilities [l, f] for the first f sizes."""
        known = missed.shape[1]
        self.plans[:known] = np.minimum(_PROFILE_MEMORY, self.plans[:known] + 1)
        self.missed[:, :known] += (missed - self.missed[:, :known]) / self.plans[:known]


class AcceptanceModel:
    """Probability that a plan misses a level, by workload and by the level of the beams that it hangs below.

    A level counts as missed if a level above it is missed: after the first miss the search asks for another plan.
    """

    def __init__(self, levels: int, max_nodes: int) -> None:
        self._levels = levels
        self._sizes = np.unique(np.geomspace(1, max_nodes, _PROFILE_SIZES).round()).astype(np.int64)
        self._required: dict[tuple[WorkloadKey, int], list[SurvivalCurve]] = {}
        self._profiles: dict[tuple[WorkloadKey, int, int], _SizeProfile] = {}
        self._observations: Counter[tuple[WorkloadKey, int]] = Counter()

    def observations(self, workload: WorkloadKey, start: int) -> int:
        """Return the number of plans learned from."""
        return self._observations[workload, start]

    def missed(self, workload: WorkloadKey, start: int, depth: Float64) -> Float64:
        """Return the probability that prefixes of depths [c] miss each of the l levels below the beams: float64 [l, c]."""
        places = _grid_index(depth)
        levels = [curve.survived[places] for curve in self._curves(workload, start)]
        return np.maximum.accumulate(np.asarray(levels), axis=0)

    def learn(self, workload: WorkloadKey, start: int, required: Sequence[RequiredDepth], age: float = 1.0) -> None:
        """Learn from the required depths of the levels that one plan was to cover.

        age: requests since the last plan that was learned from, this one included.
        """
        self._observations[workload, start] += 1
        deepest = RequiredDepth(EMPTY_DEPTH)
        for curve, one in zip(self._curves(workload, start), required, strict=False):
            deepest = deepest.deeper(one)
            curve.add(deepest, age)

    def record_plan(self, workload: WorkloadKey, start: int, missed: Float64, *, complete: bool) -> None:
        """Record one plan's miss probabilities.

        missed: float64 [levels, n + 1]; column c is the plan cut to its first c nodes. complete: true if the draft had room for
        more nodes; a larger plan would then be no better.
        """
        nodes = missed.shape[1] - 1
        known = len(self._sizes) if complete else int(np.searchsorted(self._sizes, nodes, side="right"))
        profile = self._profiles.setdefault((workload, start, len(missed)), _SizeProfile(len(missed), len(self._sizes)))
        profile.add(missed[:, np.minimum(self._sizes[:known], nodes)])

    def profile(self, workload: WorkloadKey, start: int, levels: int) -> tuple[Int64, Float64]:
        """Return sizes of plans of so many levels [s], and their mean miss probabilities [levels, s].

        Sizes that no plan has had are left out.
        """
        if (profile := self._profiles.get((workload, start, levels))) is None:
            return self._sizes[:0], np.empty((levels, 0))
        known = np.count_nonzero(profile.plans)
        return self._sizes[:known], profile.missed[:, :known]

    def _curves(self, workload: WorkloadKey, start: int) -> list[SurvivalCurve]:
        """Return the curves of the levels below the beams."""
        below = self._levels - 1 - start
        return self._required.setdefault((workload, start), [SurvivalCurve() for _ in range(below)])
