"""The trie of code paths as flat arrays, and its pruning by a request.

Nodes are numbered breadth-first and, within a level, by code path. It follows that the children of a node are a contiguous range
sorted by code, and that a parent's id is below its children's. Of two nodes of a level, the lower id is the lexicographically
smaller path, which is the declared tie order of every list.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Int32, Int64, UInt64
from atspeed.engine.search.sampling import mix64

ROOT = 0
ENDED = -1  # the code of the places after the end of a path
_ROOT_HASH = 0x9E3779B97F4A7C15  # the increment of SplitMix64; any fixed number would do


@dataclass(frozen=True)
class Trie:
    """A catalogue's distinct code paths. Node 0 is the root; nodes of depth `L` are whole paths ("leaves").

    A path of fewer than `L` codes is padded with ended places. An ended place is a node with code -1. It is the only child of its
    parent, it has no token, and it scores 0 under every rule. So beam search keeps an ended path as a beam.

    Attributes:
        level_start: int64 [L + 2]; nodes of depth d are level_start[d] .. level_start[d + 1] - 1.
        parent: int32 [n]; -1 for the root.
        code: int32 [n]; the code on the edge from the parent, 0-based within its level; -1 for the root and ended places.
        child_start: int64 [n + 1]; the children of node i are the nodes child_start[i] .. child_start[i + 1] - 1.
        codebook_sizes: codes per level; the column of a code is codebook_offset[level] + code.
    """

    level_start: Int64
    parent: Int32
    code: Int32
    child_start: Int64
    codebook_sizes: tuple[int, ...]

    @classmethod
    def from_paths(cls, paths: npt.NDArray[np.integer], codebook_sizes: tuple[int, ...]) -> Trie:
        """Build a trie from distinct paths [p, L] in lexicographic order; -1 stands in the places after a path's end.

        Raises ValueError for other paths, and when a path is the beginning of another.
        """
        count, levels = paths.shape
        if count == 0:
            raise ValueError("paths: a trie needs at least one path")
        if levels != len(codebook_sizes):
            raise ValueError(f"paths: {levels} codes per path, but {len(codebook_sizes)} codebooks")
        if (paths < ENDED).any() or (paths[:, 0] == ENDED).any() or (paths >= np.asarray(codebook_sizes)).any():
            raise ValueError("paths: a code is outside its codebook")
        if ((paths[:, :-1] == ENDED) & (paths[:, 1:] != ENDED)).any():
            raise ValueError("paths: a code stands after the end of its path")
        # first_change[i]: the first level at which path i differs from path i - 1.
        changed = np.ones((count, levels), dtype=bool)
        changed[1:] = np.logical_or.accumulate(paths[1:] != paths[:-1], axis=1)
        if not changed[:, -1].all() or _descends(paths, changed):
            raise ValueError("paths: must be distinct and in lexicographic order")

        # A path has a node of its own on every level from its first change on.
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
        # Children are numbered in the order of their parents, from node 1 on.
        child_start = np.ones(nodes + 1, dtype=np.int64)
        child_start[1:] += np.cumsum(np.bincount(parent[1:], minlength=nodes))
        trie = cls(level_start, parent, code, child_start, tuple(int(size) for size in codebook_sizes))
        if (trie.child_count[parent[1:][code[1:] == ENDED]] > 1).any():
            raise ValueError("paths: one is the beginning of another")
        return trie

    @property
    def levels(self) -> int:
        """Return `L`, the codes of the longest path."""
        return len(self.codebook_sizes)

    @property
    def nodes(self) -> int:
        """Return the number of nodes, root and leaves included."""
        return len(self.parent)

    @property
    def columns(self) -> int:
        """Return `C`, the code columns of all levels together."""
        return sum(self.codebook_sizes)

    @cached_property
    def codebook_offset(self) -> Int64:
        """Return the first code column of each level, int64 [L]."""
        return np.concatenate([[0], np.cumsum(self.codebook_sizes[:-1])]).astype(np.int64)

    @cached_property
    def child_count(self) -> Int32:
        """Return the number of children of each node in the whole catalogue, int32 [n]."""
        return np.diff(self.child_start).astype(np.int32)

    @cached_property
    def ends(self) -> npt.NDArray[np.bool_]:
        """Return which nodes have an ended place as their only child, bool [n]. Ended places above a leaf are among them."""
        ends = np.zeros(self.nodes, dtype=bool)
        ends[self.parent[1:][self.code[1:] == ENDED]] = True
        return ends

    def level(self, depth: int) -> slice:
        """Return the nodes of a depth as a slice of node ids."""
        return slice(int(self.level_start[depth]), int(self.level_start[depth + 1]))

    def readable(self) -> Int64:
        """Return the nodes that a pass can hold, ascending: all but leaves and ended places."""
        inner = np.arange(self.level_start[self.levels])
        readable: Int64 = inner[(self.code[inner] != ENDED) | (inner == ROOT)]
        return readable

    def depth(self, nodes: npt.NDArray[np.integer]) -> Int64:
        """Return the depth of each node, [n]; 0 for the root."""
        return np.searchsorted(self.level_start, nodes, side="right").astype(np.int64) - 1

    def depth_of(self, node: int) -> int:
        """Return the depth of one node; 0 for the root."""
        return bisect_right(self._level_starts, node) - 1

    @cached_property
    def _level_starts(self) -> list[int]:
        starts: list[int] = self.level_start.tolist()
        return starts

    def column(self, nodes: npt.NDArray[np.integer]) -> Int64:
        """Return the code column of each node's own code, [n]. The root and ended places have none."""
        column: Int64 = self.codebook_offset[self.depth(nodes) - 1] + self.code[nodes]
        return column

    def path_hash(self, nodes: npt.NDArray[np.integer]) -> UInt64:
        """Return a hash of each node's code path, [n], equal in every process and every catalogue with that path."""
        inner = np.asarray(nodes) != ROOT
        if not inner.any():
            return np.full(len(nodes), _ROOT_HASH, dtype=np.uint64)
        parent, row = np.unique(self.parent[nodes].clip(min=ROOT), return_inverse=True)
        above = self.path_hash(parent)[row]
        return np.where(inner, mix64(above ^ mix64((self.code[nodes] + 1).astype(np.uint64))), above)

    def children(self, node: int) -> Int64:
        """Return the ids of one node's children, in code order."""
        return np.arange(self.child_start[node], self.child_start[node + 1])

    def children_of(self, nodes: npt.NDArray[np.integer]) -> tuple[Int64, Int64]:
        """Return all children of `nodes`, [n], as (row [m], child [m]): `row` indexes `nodes`, children are in order."""
        start, count = self.child_start[nodes], self.child_count[nodes].astype(np.int64)
        row = np.repeat(np.arange(len(nodes)), count)
        return row, np.arange(len(row)) + (start - (np.cumsum(count) - count))[row]

    def path(self, node: int) -> tuple[int, ...]:
        """Return the codes from the root to a node."""
        codes: list[int] = []
        while node != ROOT:
            codes.append(int(self.code[node]))
            node = int(self.parent[node])
        return tuple(reversed(codes))

    def find(self, path: Iterable[int]) -> int | None:
        """Return the node of a (partial) code path, or None."""
        node = ROOT
        for code in path:
            children = self.children(node)
            position = int(np.searchsorted(self.code[children], code))
            if position == len(children) or self.code[children[position]] != code:
                return None
            node = int(children[position])
        return node

    def with_ancestors(self, nodes: Sequence[int] | npt.NDArray[np.integer]) -> Int32:
        """Return the nodes and all their ancestors but the root, sorted: the smallest tree for one pass."""
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
            raise ValueError("parent: not the nodes that child_start implies, breadth-first")
        depth = self.depth(np.arange(self.nodes))
        if not (count[: starts[self.levels]] > 0).all() or (depth[self.parent[1:]] != depth[1:] - 1).any():
            raise ValueError("child_start: an inner node has no child, or one of another depth")
        code = self.code[1:]
        ended = code == ENDED
        if (
            self.code[ROOT] != -1
            or (code < ENDED).any()
            or (code >= np.asarray(self.codebook_sizes)[depth[1:] - 1]).any()
        ):
            raise ValueError("code: outside its codebook")
        if ended[: starts[2] - 1].any() or (count[self.parent[1:][ended]] != 1).any():
            raise ValueError("code: an ended place that is not the only child of a code")
        if (code[self.child_start[np.flatnonzero(ended[: starts[self.levels] - 1]) + 1] - 1] != ENDED).any():
            raise ValueError("code: a code below an ended place")
        if not (np.diff(code)[self.parent[2:] == self.parent[1:-1]] > 0).all():
            raise ValueError("code: siblings not in ascending order")


def _descends(paths: npt.NDArray[np.integer], changed: npt.NDArray[np.bool_]) -> bool:
    """Return whether some path is lexicographically below the one before it."""
    first = changed[1:].argmax(axis=1)
    rows = np.arange(len(first))
    return bool((paths[1:][rows, first] < paths[:-1][rows, first]).any())


@dataclass(frozen=True)
class Pruning:
    """The nodes that a request removes from the trie. Pruning removes candidates and never changes a score.

    Exclusions are stored as removed subtrees, an allow-list as remaining nodes. Either is about as long as the request, however
    large the catalogue.

    Attributes:
        cut: the roots of the removed subtrees, int32 [c], ascending.
        kept: the remaining nodes, ancestors and the root included, int32 [k], ascending; None without an allow-list.
    """

    cut: Int32
    kept: Int32 | None = None

    @classmethod
    def none(cls) -> Pruning:
        """Return the pruning that removes no node."""
        return cls(np.empty(0, dtype=np.int32))

    @classmethod
    def of_dead_leaves(cls, trie: Trie, dead: npt.NDArray[np.integer]) -> Pruning:
        """Remove these leaves and every inner node without a live child. O(dead * L)."""
        cut: list[Int64] = []
        frontier = np.unique(dead).astype(np.int64)
        while len(frontier) and frontier[0] != ROOT:
            # A parent whose children are all dead is dead itself; the other dead nodes are roots of removed subtrees.
            parents, dead_children = np.unique(trie.parent[frontier], return_counts=True)
            emptied = parents[dead_children == trie.child_count[parents]]
            cut.append(frontier[~np.isin(trie.parent[frontier], emptied)])
            frontier = emptied.astype(np.int64)
        cut.append(frontier)
        return cls(np.sort(np.concatenate(cut)).astype(np.int32))

    @classmethod
    def to_leaves(cls, trie: Trie, live: npt.NDArray[np.integer]) -> Pruning:
        """Remove all nodes but these leaves and their ancestors. O(live * L)."""
        root = [ROOT] if len(live) else []
        return cls(cls.none().cut, np.concatenate([root, trie.with_ancestors(live)]).astype(np.int32))

    @property
    def is_none(self) -> bool:
        """Return whether no node is removed."""
        return self.kept is None and not len(self.cut)

    @property
    def empties_catalogue(self) -> bool:
        """Return whether no item is left."""
        if self.kept is not None:
            return not len(self.kept)
        return len(self.cut) == 1 and int(self.cut[0]) == ROOT

    def live(self, nodes: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Return which of these nodes are left, bool [n]. Their parents must be left."""
        if self.kept is not None:
            return among(self.kept, nodes)
        return ~among(self.cut, nodes)


def among(some: npt.NDArray[np.integer], nodes: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Return which of these nodes, [n], are among `some`, which ascend."""
    if not len(some):
        return np.zeros(len(nodes), dtype=bool)
    position = np.minimum(np.searchsorted(some, nodes), len(some) - 1)
    return np.asarray(some[position] == nodes)
