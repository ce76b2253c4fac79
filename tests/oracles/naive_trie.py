"""A catalogue as a dictionary of dictionaries; every question is answered by looking at every item."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

Path = tuple[int, ...]
Tree = dict[int, "Tree"]


class NaiveTrie:
    """The trie over some items' code paths, padded with -1.

    `nodes` lists all paths by length, then lexicographically: the node ids.
    """

    def __init__(self, items: Mapping[str, Path], codebook_sizes: Sequence[int]) -> None:
        self.items, self.codebook_sizes = dict(items), tuple(codebook_sizes)
        self.levels = len(self.codebook_sizes)
        self.root: Tree = {}
        for path in items.values():
            below = self.root
            for code in path:
                below = below.setdefault(code, {})
        self.nodes = sorted(_paths_of(self.root, ()), key=lambda path: (len(path), path))
        self.id_of = {path: node for node, path in enumerate(self.nodes)}

    def children(self, path: Path) -> list[int]:
        """The codes that may follow, ascending."""
        below = self.root
        for code in path:
            below = below[code]
        return sorted(below)

    def has_ended(self, path: Path) -> bool:
        """Return whether no code follows a path that has places left."""
        return self.children(path) == [-1]

    def inner(self) -> list[int]:
        """Ids of all nodes that a model can evaluate: neither whole paths nor places after the end of a path."""
        return [node for node, path in enumerate(self.nodes) if len(path) < self.levels and path[-1:] != (-1,)]

    def items_of(self, path: Path) -> list[str]:
        """The items of a whole path, in the order of their UTF-8 bytes."""
        return sorted((item for item, own in self.items.items() if own == path), key=str.encode)

    def alive(self, path: Path, excluded: Collection[str] = (), allowed: Collection[str] | None = None) -> bool:
        """Return whether an item below a path is left."""
        return any(
            own[: len(path)] == path and item not in excluded and (allowed is None or item in allowed)
            for item, own in self.items.items()
        )


def _paths_of(tree: Tree, above: Path) -> Iterator[Path]:
    yield above
    for code, below in tree.items():
        yield from _paths_of(below, (*above, code))
