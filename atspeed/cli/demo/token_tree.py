"""The token tree of one request, drawn in the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.trie import ROOT
from atspeed.training.data import Movie
from orchestrator.recommendation import Recommendation

_STYLES = {
    "drafted, used": ("●", "green"),
    "drafted, wasted": ("○", "dim"),
    "prefetched, used": ("◆", "cyan"),
    "prefetched, wasted": ("◇", "dim cyan"),
    "missed": ("▲", "yellow"),
    "forced": ("·", ""),
}
"""Sign and style of each kind of node. Missed: a beam that no plan held, which cost a pass."""


@dataclass(frozen=True)
class TokenTree:
    """The nodes that the target evaluated for one list.

    Attributes:
        found: the list with its search.
        catalogue: the catalogue.
        movies: titles by item id.
    """

    found: Recommendation
    catalogue: Catalogue
    movies: Mapping[str, Movie]

    def kind(self, node: int) -> str:
        """Return the kind of an evaluated node."""
        memo = self.found.diagnostics.memo
        used = "used" if node in memo.used else "wasted"
        if node in memo.recovered:
            return "missed"
        if node in memo.drafted:
            return f"drafted, {used}"
        if node in memo.prefetched:
            return f"prefetched, {used}"
        return "forced"

    def drawn(self) -> Tree:
        """Draw the tree: codes of the evaluated nodes, and the titles of the list."""
        trie, listed = self.catalogue.trie, self._listed()
        drawn = {ROOT: Tree("prompt")}
        for node in self._nodes():
            sign, style = _STYLES[self.kind(node)]
            label = Text(f"{sign} {trie.code[node]}", style=style)
            if titles := listed.get(node):
                label.append("  " + "; ".join(titles), style="default")
            drawn[node] = drawn[int(trie.parent[node])].add(label)
        return drawn[ROOT]

    def counts(self) -> Table:
        """Count the nodes of each kind by level."""
        shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
        shown.add_column("level", justify="right")
        for name, (sign, style) in _STYLES.items():
            first, _, second = name.partition(", ")
            shown.add_column(f"{sign} {first}\n{second}", justify="right", style=style)
        nodes = self._nodes()
        levels = self.catalogue.trie.depth(np.asarray(nodes, dtype=np.int64)).tolist()
        kinds = Counter(zip(levels, map(self.kind, nodes), strict=True))
        for level in range(1, self.catalogue.trie.levels):
            shown.add_row(str(level), *(str(kinds[level, name]) for name in _STYLES))
        return shown

    def _nodes(self) -> list[int]:
        """Return the evaluated nodes but the root; a parent comes before its children."""
        return [node for node in sorted(self.found.diagnostics.memo.evaluated) if node != ROOT]

    def _listed(self) -> dict[int, list[str]]:
        """Return the places and titles of the list, by the last node above each item."""
        trie, listed = self.catalogue.trie, dict[int, list[str]]()
        leaves = self.catalogue.leaf_of(self.catalogue.find(item.item_id for item in self.found.items))
        for place, (item, leaf) in enumerate(zip(self.found.items, leaves.tolist(), strict=True), start=1):
            title = self.movies[item.item_id].title if item.item_id in self.movies else item.item_id
            listed.setdefault(int(trie.parent[leaf]), []).append(f"{place}. {title}")
        return listed
