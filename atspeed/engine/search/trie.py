"""The catalogue's trie of code paths as flat arrays, and what a request prunes from it.

Nodes are numbered breadth-first and, within a level, by code path. That one choice gives all the rest:
the children of a node are a contiguous range sorted by code, a parent's id is below its children's, and of two
nodes of a level the lower id is the lexicographically smaller path, which is the declared tie order of every list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Int32, Int64, UInt64
from atspeed.engine.search.sampling import mix64

ROOT = 0


@dataclass(frozen=True)
class Trie:
    """A catalogue's distinct code paths. Node 0 is the root; nodes of depth `L` are whole paths ("leaves").

    level_start: int64 [L + 2]; nodes of depth d are level_start[d] .. level_start[d + 1] - 1.
    parent:      int32 [n]; the root's is -1.
    code:        int32 [n]; the code on the edge from the parent, 0-based within its level; the root's is -1.
    child_start: int64 [n + 1]; the children of node i are the nodes child_start[i] .. child_start[i + 1] - 1.
    codebook_sizes: codes per level; column of a code = codebook_offset[level] + code.
    """

    level_start: Int64
    parent: Int32
    code: Int32
    child_start: Int64
    codebook_sizes: tuple[int, ...]

    @classmethod
    def from_paths(cls, paths: npt.NDArray[np.integer], codebook_sizes: tuple[int, ...]) -> Trie:
        """Build from distinct paths [p, L] in lexicographic order. Raises ValueError when they are not."""
        count, levels = paths.shape
        if count == 0:
            raise ValueError("paths: a trie needs at least one path")
        if levels != len(codebook_sizes):
            raise ValueError(f"paths: {levels} codes per path, but {len(codebook_sizes)} codebooks")
        if (paths < 0).any() or (paths >= np.asarray(codebook_sizes)).any():
            raise ValueError("paths: a code is outside its codebook")
        # first_change[i]: the first level at which path i differs from path i - 1.
        changed = np.ones((count, levels), dtype=bool)
        changed[1:] = np.logical_or.accumulate(paths[1:] != paths[:-1], axis=1)
        if not changed[:, -1].all() or _descends(paths, changed):
            raise ValueError("paths: must be distinct and in lexicographic order")

        level_start = np.zeros(levels + 2, dtype=np.int64)
        level_start[1:] = np.cumsum([1, *changed.sum(axis=0)])
        nodes = int(level_start[-1])
        parent = np.full(nodes, -1, dtype=np.int32)
        code = np.full(nodes, -1, dtype=np.int32)
        above = np.zeros(count, dtype=np.int64)  # each path's node one level up
        for level in range(levels):
            node_of_path = level_start[level + 1] + np.cumsum(changed[:, level]) - 1
            first = changed[:, level]
            parent[node_of_path[first]] = above[first]
            code[node_of_path[first]] = paths[first, level]
            above = node_of_path
        child_start = np.ones(nodes + 1, dtype=np.int64)
        child_start[1:] += np.cumsum(np.bincount(parent[1:], minlength=nodes))
        return cls(level_start, parent, code, child_start, tuple(int(size) for size in codebook_sizes))

    @property
    def levels(self) -> int:
        """`L`: codes per item."""
        return len(self.codebook_sizes)

    @property
    def nodes(self) -> int:
        """All nodes, the root and the leaves included."""
        return len(self.parent)

    @property
    def columns(self) -> int:
        """`C`: code columns of all levels together."""
        return sum(self.codebook_sizes)

    @cached_property
    def codebook_offset(self) -> Int64:
        """int64 [L]: the first code column of each level."""
        return np.concatenate([[0], np.cumsum(self.codebook_sizes[:-1])]).astype(np.int64)

    @cached_property
    def child_count(self) -> Int32:
        """int32 [n]: children of each node in the whole catalogue."""
        return np.diff(self.child_start).astype(np.int32)

    def level(self, depth: int) -> slice:
        """The nodes of a depth, as a slice of node ids."""
        return slice(int(self.level_start[depth]), int(self.level_start[depth + 1]))

    def depth(self, nodes: npt.NDArray[np.integer]) -> Int64:
        """Depth of each node, [n]; the root's is 0."""
        return np.searchsorted(self.level_start, nodes, side="right").astype(np.int64) - 1

    def column(self, nodes: npt.NDArray[np.integer]) -> Int64:
        """Code column of each node's own code, [n]. The root has none."""
        column: Int64 = self.codebook_offset[self.depth(nodes) - 1] + self.code[nodes]
        return column

    def path_hash(self, nodes: npt.NDArray[np.integer]) -> UInt64:
        """A hash of each node's code path, [n]: the same in every process and every catalogue that holds the path."""
        inner = np.asarray(nodes) != ROOT
        if not inner.any():
            return np.full(len(nodes), 0x9E3779B97F4A7C15, dtype=np.uint64)
        parent, row = np.unique(self.parent[nodes].clip(min=ROOT), return_inverse=True)
        above = self.path_hash(parent)[row]
        return np.where(inner, mix64(above ^ mix64((self.code[nodes] + 1).astype(np.uint64))), above)

    def children(self, node: int) -> Int64:
        """Ids of one node's children, in code order."""
        return np.arange(self.child_start[node], self.child_start[node + 1])

    def children_of(self, nodes: npt.NDArray[np.integer]) -> tuple[Int64, Int64]:
        """All children of `nodes` [n]: (row [m], child [m]); `row` indexes `nodes`, children in order within a row."""
        start, count = self.child_start[nodes], self.child_count[nodes].astype(np.int64)
        row = np.repeat(np.arange(len(nodes)), count)
        return row, np.arange(len(row)) + (start - (np.cumsum(count) - count))[row]

    def path(self, node: int) -> tuple[int, ...]:
        """The codes from the root to a node."""
        codes: list[int] = []
        while node != ROOT:
            codes.append(int(self.code[node]))
            node = int(self.parent[node])
        return tuple(reversed(codes))

    def find(self, path: Iterable[int]) -> int | None:
        """The node of a (partial) code path, or None."""
        node = ROOT
        for code in path:
            children = self.children(node)
            position = int(np.searchsorted(self.code[children], code))
            if position == len(children) or self.code[children[position]] != code:
                return None
            node = int(children[position])
        return node

    def with_ancestors(self, nodes: Sequence[int] | npt.NDArray[np.integer]) -> Int32:
        """The nodes and all their ancestors but the root, sorted: the smallest tree that can be evaluated in one pass."""
        frontier = np.unique(np.asarray(nodes, dtype=np.int64))
        closed = [frontier]
        while len(frontier):
            frontier = np.unique(self.parent[frontier[frontier > ROOT]])
            closed.append(frontier)
        everything = np.unique(np.concatenate(closed))
        return everything[everything > ROOT].astype(np.int32)

    def check_integrity(self) -> None:
        """Raise ValueError when the arrays do not form a trie. O(n); for tests."""
        starts, count = self.level_start, np.diff(self.child_start)
        if starts[:2].tolist() != [0, 1] or starts[-1] != self.nodes or (np.diff(starts) < 1).any():
            raise ValueError("level_start: not a partition of the nodes into levels")
        if self.child_start[0] != 1 or self.child_start[-1] != self.nodes or (count < 0).any():
            raise ValueError("child_start: not a partition of the nodes into siblings")
        if not np.array_equal(self.parent, np.append(-1, np.repeat(np.arange(self.nodes), count))):
            raise ValueError("parent: not the nodes that child_start says, breadth-first")
        depth = self.depth(np.arange(self.nodes))
        if not (count[: starts[self.levels]] > 0).all() or (depth[self.parent[1:]] != depth[1:] - 1).any():
            raise ValueError("child_start: an inner node has no child, or one of another depth")
        code = self.code[1:]
        if self.code[ROOT] != -1 or (code < 0).any() or (code >= np.asarray(self.codebook_sizes)[depth[1:] - 1]).any():
            raise ValueError("code: outside its codebook")
        if not (np.diff(code)[self.parent[2:] == self.parent[1:-1]] > 0).all():
            raise ValueError("code: siblings not in ascending order")


def _descends(paths: npt.NDArray[np.integer], changed: npt.NDArray[np.bool_]) -> bool:
    """Whether some path is lexicographically below the one before it."""
    first = changed[1:].argmax(axis=1)
    rows = np.arange(len(first))
    return bool((paths[1:][rows, first] < paths[:-1][rows, first]).any())


@dataclass(frozen=True)
class Pruning:
    """What a request takes out of the trie. Never changes a score, only removes candidates.

    Said by what is gone or, where a request names all that it may get, by what is left: either way it is about as long as the
    request, however large the catalogue.

    cut:  int32 [c], ascending; the roots of the dead subtrees, so a search that never enters them never sees what lies below.
    kept: int32 [k], ascending; where it is not None, the nodes that are left, ancestors and the root included, and no other.
    """

    cut: Int32
    kept: Int32 | None = None

    @classmethod
    def none(cls) -> Pruning:
        """Nothing pruned."""
        return cls(np.empty(0, dtype=np.int32))

    @classmethod
    def of_dead_leaves(cls, trie: Trie, dead: npt.NDArray[np.integer]) -> Pruning:
        """Prune these leaves and every inner node that is left without a live child. O(dead x L)."""
        cut: list[Int64] = []
        frontier = np.unique(dead).astype(np.int64)
        while len(frontier) and frontier[0] != ROOT:
            parents, dead_children = np.unique(trie.parent[frontier], return_counts=True)
            emptied = parents[dead_children == trie.child_count[parents]]
            cut.append(frontier[~np.isin(trie.parent[frontier], emptied)])
            frontier = emptied.astype(np.int64)
        cut.append(frontier)
        return cls(np.sort(np.concatenate(cut)).astype(np.int32))

    @classmethod
    def to_leaves(cls, trie: Trie, live: npt.NDArray[np.integer]) -> Pruning:
        """Prune all but these leaves and what is above them. O(live x L)."""
        root = [ROOT] if len(live) else []
        return cls(cls.none().cut, np.concatenate([root, trie.with_ancestors(live)]).astype(np.int32))

    @property
    def is_none(self) -> bool:
        """Whether nothing is pruned."""
        return self.kept is None and not len(self.cut)

    @property
    def empties_catalogue(self) -> bool:
        """Whether no item is left."""
        if self.kept is not None:
            return not len(self.kept)
        return len(self.cut) == 1 and int(self.cut[0]) == ROOT

    def live(self, nodes: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Which of these nodes are left, [n]. Their parents are taken to be."""
        if self.kept is not None:
            return among(self.kept, nodes)
        return ~among(self.cut, nodes)


def among(some: npt.NDArray[np.integer], nodes: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Which of these nodes [n] are among some, which ascend."""
    if not len(some):
        return np.zeros(len(nodes), dtype=bool)
    position = np.minimum(np.searchsorted(some, nodes), len(some) - 1)
    return np.asarray(some[position] == nodes)
