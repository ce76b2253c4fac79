"""The scales that a draft's plans are cut by (method, section 7), chosen by what counts: requests done in one target pass.

A plan is cut through all levels at one margin, in units of each level's scale. Measuring how far the draft errs at a level is not
enough, since a level of few nodes is covered cheaply. So the scales are tried out, on users that neither model learned from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from atspeed.engine.arrays import Bools, Int64
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import PlanSize, Shortlist, free_nodes
from atspeed.engine.search.trie import Trie
from atspeed.training.evaluate import Question, Recommender, SearchedLevel

_FACTORS = (0.7, 1.0, 1.4)  # from level to level; the scale of level 1 is the unit


@dataclass(frozen=True)
class Calibration:
    """What the scales are for. sizes: the plans that are tried, equally often. width: how long the draft's lists are."""

    sizes: tuple[PlanSize, ...]
    width: int

    @classmethod
    def usual(cls) -> Calibration:
        """Lists of 10 and 20, with as many planned nodes as such requests get, and half as many."""
        sizes = (PlanSize(beam_width=k, width=most, max_nodes=most) for k, most in product((10, 20), (120, 240)))
        return cls(tuple(sizes), width=160)

    def scales(self, target: Recommender, draft: Recommender, asked: Sequence[Question]) -> tuple[float, ...]:
        """The best scales of levels 1 to L - 1; all 1 where no others are better."""
        levels = draft.catalogue.trie.levels - 1
        if not levels:
            return ()
        free = free_nodes(draft.catalogue.trie, draft.rule)
        lists = draft.search(asked, beams=self.width)[:levels]
        wanted = {size.beam_width: target.beams(asked, beams=size.beam_width)[:levels] for size in self.sizes}
        best = (1.0,) * levels
        most = self._whole(draft, lists, wanted, best, free)
        for factors in product(_FACTORS, repeat=levels - 1):
            tried = tuple(float(scale) for scale in np.cumprod((1.0, *factors)))
            found = self._whole(draft, lists, wanted, tried, free)
            if found > most:
                best, most = tried, found
        return best

    def _whole(
        self,
        draft: Recommender,
        lists: Sequence[SearchedLevel],
        wanted: dict[int, list[Int64]],
        scales: tuple[float, ...],
        free: Bools,
    ) -> int:
        """How many requests need one pass: all beams of all levels are planned."""
        whole = 0
        for size in self.sizes:
            plans = (_plan(draft.catalogue.trie, lists, row, size, scales, free) for row in range(len(lists[0].node)))
            for row, planned in enumerate(plans):
                beams = np.concatenate([level[row] for level in wanted[size.beam_width]])
                whole += bool(np.isin(beams[beams >= 0], planned).all())
        return whole


def _plan(
    trie: Trie, lists: Sequence[SearchedLevel], row: int, size: PlanSize, scales: tuple[float, ...], free: Bools
) -> Int64:
    """The nodes that the draft service would plan, as far as the draft's lists go, and all that are free."""
    listed = Shortlist.of(Beams.root())
    for depth, (children, scale) in enumerate(zip(_levels(lists, row), scales, strict=True)):
        expanded = listed.level(trie, depth).node
        reached = children.take(np.flatnonzero(np.isin(trie.parent[children.node], expanded)))
        listed = listed.grown(trie, reached, size, scale, free).cut(trie, size.max_nodes + 1)
    return np.append(listed.beams.node[1:], np.flatnonzero(free))


def _levels(lists: Sequence[SearchedLevel], row: int) -> Iterator[Beams]:
    """A prompt's list of each level as beams."""
    for level in lists:
        real = level.node[row] >= 0
        node, score = level.node[row][real], level.score[row][real]
        yield Beams(node, score, score, score)
