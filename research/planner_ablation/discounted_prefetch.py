"""Target prefetch whose size is chosen by discounted mean times of searches.

In an autonomous search the target makes one pass for every level. If a pass also holds the nodes that the prior over prefixes
expects on the levels below, those levels may need no pass. The nodes have margins, like a draft's. Only the margin decides which
of them join the pass: a search that is certain gets few nodes. The best limit of the margin is learned for each beam width and
level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.scoring import Children, ScoringRule
from atspeed.engine.search.trie import Pruning, Trie
from atspeed.engine.speculation.latency_model import Pass
from atspeed.engine.speculation.prefix_prior import PrefixPrior
from research.planner_ablation.discounted_choice import DiscountedChoice
from research.planner_ablation.saturation import Saturation

# Least margins that are compared: no node, the K best of each level, and those that are up to e^0.5, e^1 or e^2 times less likely
# than the K-th best. Chosen, not measured.
_LEAST_MARGINS = (np.inf, 0.0, -0.5, -1.0, -2.0)
# Most prefetched nodes for each beam. On Amazon Beauty, so many nodes hold all beams of the last level for more than nine
# requests in ten, and all beams of the level before it for three in four at K = 5 and 10 (docs/log.md).
_MAX_NODES_PER_BEAM = 4
# Share of the time of searches that exploration may add.
_EXPLORED_SHARE = 0.01


class DiscountedPrefetcher:
    """Estimates from past searches of one model and catalogue. Not thread-safe.

    Attributes:
        prior: the prior over prefixes.
        saturation: whether the target is saturated; its owner keeps it up to date.
    """

    def __init__(self, trie: Trie, rule: ScoringRule, max_nodes: int, clock: Callable[[], int]) -> None:
        """Prefetch so that a pass has at most `max_nodes` nodes. clock: nanoseconds."""
        self.trie = trie
        self.max_nodes = max_nodes
        self.clock = clock
        self.prior = PrefixPrior(trie, rule)
        self.saturation = Saturation()
        self._choices: dict[tuple[int, int], DiscountedChoice] = {}

    def for_search(self, widths: BeamWidths, prompt_tokens: int) -> SearchPrefetcher:  # noqa: ARG002
        """Return the prefetcher of one search. While the target is saturated it only learns."""
        return SearchPrefetcher(self, widths, enabled=not self.saturation(widths.largest.bit_length()))

    def observe(
        self,
        widths: BeamWidths,
        made: Sequence[Pass],
        costs: Sequence[PassStats],
        waits: Sequence[int],  # noqa: ARG002
    ) -> None:
        """Learn from the passes of a search whether the target is saturated."""
        later = zip(made[1:], costs[1:], strict=True)
        plain = [cost for one, cost in later if one.nodes <= widths.largest]
        self.saturation.learn(widths.largest.bit_length(), costs, plain)

    def choice(self, width: int, level: int) -> DiscountedChoice:
        """Return the choice of the least margin for searches of this width, at a level."""
        key = width.bit_length(), level
        return self._choices.setdefault(key, DiscountedChoice(len(_LEAST_MARGINS), _EXPLORED_SHARE))


class SearchPrefetcher:
    """Prefetcher of one search."""

    def __init__(self, shared: DiscountedPrefetcher, widths: BeamWidths, *, enabled: bool) -> None:
        self._shared = shared
        self._width = widths.largest
        self._widths = widths
        self._enabled = enabled
        # Each choice of the search: its level, the option, and the time.
        self._decisions: list[tuple[DiscountedChoice, int, int]] = []

    def nodes(self, beams: Beams, missing: Int64, evaluated: Mapping[int, Children]) -> Int64:
        """Return the ascending nodes of the next pass: the missing beams of a level, and prefetched nodes below.

        beams: all beams of the level that are evaluated or missing.
        """
        shared, level = self._shared, int(self._shared.trie.depth(missing[:1])[0])
        max_nodes = min(_MAX_NODES_PER_BEAM * self._width, shared.max_nodes - len(missing))
        possible = 0 < level < shared.trie.levels - 1 and max_nodes > 0
        if not self._enabled or not possible or not shared.prior.knows_most(beams):
            return missing
        choice = shared.choice(self._width, level)
        option = choice.choose()
        self._decisions.append((choice, option, shared.clock()))
        if not option:
            return missing
        plan = shared.prior.plan(beams, evaluated, self._widths, max_nodes, Pruning.none())
        return np.sort(np.append(missing, plan.node[plan.margin >= _LEAST_MARGINS[option]]))

    def learn(self, used: Sequence[Int64], evaluated: Mapping[int, Children]) -> None:  # noqa: ARG002
        """Learn from a search that has ended."""
        self._shared.prior.learn(evaluated, Pruning.none())
        ended_ns, later_ns = self._shared.clock(), 0.0
        for choice, option, begun_ns in reversed(self._decisions):
            choice.learn(option, ended_ns - begun_ns + later_ns)
            # An earlier choice is charged for the best continuation, not for what was explored after it.
            ended_ns, later_ns = begun_ns, choice.least_mean
