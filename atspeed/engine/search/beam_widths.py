"""Beam widths: the number of beams that a search keeps on each level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.search.trie import Trie


@dataclass(frozen=True)
class BeamWidths:
    """Beam widths of a search, made by `of`. Two are equal if every level has the same width in both.

    Attributes:
        listed: the widths of levels 1, 2, ...; the last one holds for all further levels.
    """

    listed: tuple[int, ...]

    @classmethod
    def of(cls, *widths: int) -> BeamWidths:
        """Return the widths of levels 1, 2, ...; the last one holds for all further levels."""
        listed = list(widths)
        while len(listed) > 1 and listed[-1] == listed[-2]:
            listed.pop()
        return cls(tuple(listed))

    def at(self, level: int) -> int:
        """Return the width of a level; 1 is the level of the first code."""
        return self.listed[min(level, len(self.listed)) - 1]

    def below(self, trie: Trie, nodes: Int64) -> int:
        """Return the width of the level below nodes of one depth. Without nodes there is nothing to choose."""
        return self.at((trie.depth_of(int(nodes[0])) if len(nodes) else 0) + 1)

    def inner(self, trie: Trie) -> Int64:
        """Return the widths of levels 1 to L-1: int64 [L-1]."""
        return np.array([self.at(level) for level in range(1, trie.levels)], dtype=np.int64)

    @property
    def largest(self) -> int:
        """Return the largest width."""
        return max(self.listed)

    @property
    def per_level(self) -> tuple[int, ...]:
        """Return the listed widths if levels differ; empty if one width holds for all."""
        return self.listed if len(self.listed) > 1 else ()

    def narrowed(self, most: int) -> BeamWidths:
        """Return the widths with at most `most` beams on every level."""
        return BeamWidths.of(*(min(width, most) for width in self.listed))
