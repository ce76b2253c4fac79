"""Chooses the plan scales of a draft by the share of requests done in one pass.

A plan is cut through all levels at one margin, in units of each level's scale. The error of the draft at a level is no
measure for its scale, since a level of few nodes is covered cheaply. So several scales are tried on validation users,
from whom neither model has learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from atspeed.engine.arrays import Bools, Int64
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import PlanSize, Shortlist, free_nodes
from atspeed.engine.search.trie import Trie
from atspeed.training.evaluate import EvalExample, ModelRecommender, SearchedLevel

# Ratios that are tried between one level's scale and the next, a factor of about sqrt(2) apart. Level 1 has scale 1.
_FACTORS = (0.7, 1.0, 1.4)
_BEAM_WIDTHS = (10, 20)  # usual requests
_PLAN_SIZES = (120, 240)  # half and all of the nodes that such requests usually get
_LIST_LENGTH = 160  # nodes of the draft per level; two levels fill the larger plan


@dataclass(frozen=True)
class Calibration:
    """The requests for which the scales are chosen.

    Attributes:
        sizes: the plan sizes that are tried, with equal weight.
        width: the length of the draft's lists.
    """

    sizes: tuple[PlanSize, ...]
    width: int

    @classmethod
    def usual(cls) -> Calibration:
        """Return lists of 10 and 20 items, with the usual number of planned nodes and with half as many."""
        sizes = (
            PlanSize(beam_widths=BeamWidths.of(k), width=n, max_nodes=n) for k, n in product(_BEAM_WIDTHS, _PLAN_SIZES)
        )
        return cls(tuple(sizes), width=_LIST_LENGTH)

    def scales(
        self, target: ModelRecommender, draft: ModelRecommender, examples: Sequence[EvalExample]
    ) -> tuple[float, ...]:
        """Return the best scales of levels 1 to L - 1; 1 on all levels if no others are better."""
        levels = draft.catalogue.trie.levels - 1
        if not levels:
            return ()
        free = free_nodes(draft.catalogue.trie, draft.rule)
        lists = draft.search(examples, beams=self.width)[:levels]
        wanted = {
            size.beam_widths.largest: target.beams(examples, beams=size.beam_widths.largest)[:levels]
            for size in self.sizes
        }
        # Try every combination of ratios; the first best one stays.
        best = (1.0,) * levels
        most = self._single_pass_requests(draft, lists, wanted, best, free)
        for factors in product(_FACTORS, repeat=levels - 1):
            tried = tuple(float(scale) for scale in np.cumprod((1.0, *factors)))
            found = self._single_pass_requests(draft, lists, wanted, tried, free)
            if found > most:
                best, most = tried, found
        return best

    def _single_pass_requests(
        self,
        draft: ModelRecommender,
        lists: Sequence[SearchedLevel],
        wanted: dict[int, list[Int64]],
        scales: tuple[float, ...],
        free: Bools,
    ) -> int:
        """Count the requests that need one pass: their plan holds all beams of all levels."""
        whole = 0
        for size in self.sizes:
            plans = (_plan(draft.catalogue.trie, lists, row, size, scales, free) for row in range(len(lists[0].node)))
            for row, planned in enumerate(plans):
                beams = np.concatenate([level[row] for level in wanted[size.beam_widths.largest]])
                beams = beams[beams >= 0]
                whole += bool((free[beams] | np.isin(beams, planned)).all())
        return whole


def _plan(
    trie: Trie, lists: Sequence[SearchedLevel], row: int, size: PlanSize, scales: tuple[float, ...], free: Bools
) -> Int64:
    """Return the nodes that the draft service would plan, within the draft's lists. Free nodes need no plan."""
    listed = Shortlist.of(Beams.root())
    # Grow the plan level by level, as the draft service does: children of the planned nodes only, then the cut.
    for depth, (children, scale) in enumerate(zip(_levels(lists, row), scales, strict=True)):
        expanded = listed.level(trie, depth).node
        reached = children.take(np.flatnonzero(np.isin(trie.parent[children.node], expanded)))
        listed = listed.grown(trie, reached, size, scale, free).cut(trie, size.max_nodes + 1)
    # The first entry is the root, which needs no plan.
    return listed.beams.node[1:]


def _levels(lists: Sequence[SearchedLevel], row: int) -> Iterator[Beams]:
    """Yield a prompt's list of each level as beams."""
    for level in lists:
        real = level.node[row] >= 0
        node, score = level.node[row][real], level.score[row][real]
        yield Beams(node, score, score, score)
