"""A catalogue snapshot: items, their code paths and the trie over them. Immutable; its version is the hash of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from atspeed.engine.bundle.id_index import IdIndex, Ids
from atspeed.engine.errors import CatalogueError
from atspeed.engine.search.trie import Int32, Int64, Pruning, Trie

Codes = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Catalogue:
    """Items in the order of (code path, id), so that the items of one path are neighbours.

    ids:   bytes [items], UTF-8. codes: int32 [items, L], 0-based within each level. trie: over the distinct paths.
    item_start: int32 [paths + 1]; the items of path i (leaf i of the trie) are item_start[i] .. item_start[i + 1] - 1.
    item_path: int32 [items]; the path of each item.

    Ten million items take less than a gigabyte, so nothing here may keep a Python object per item.
    """

    ids: Ids
    codes: Codes
    item_start: Int32
    item_path: Int32
    trie: Trie

    @classmethod
    def build(
        cls, ids: Sequence[str] | Ids, codes: npt.NDArray[np.integer], codebook_sizes: Sequence[int]
    ) -> Catalogue:
        """From items in any order, ids as strings or as UTF-8 bytes [items].

        Raises CatalogueError on duplicate or empty ids, or codes outside their codebook.
        """
        if len(ids) != len(codes) or not len(ids):
            raise CatalogueError(f"items: {len(ids)} ids for {len(codes)} code paths")
        encoded = _encode(ids)
        order = np.lexsort((encoded, *codes.T[::-1]))
        encoded = encoded[order]
        catalogue = cls._assemble(encoded, codes[order], tuple(codebook_sizes))
        ordered = np.sort(encoded)
        repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(repeated):
            raise CatalogueError(f"ids: {ordered[repeated[0]].decode()!r} occurs more than once")
        return catalogue

    @classmethod
    def _assemble(cls, ids: Ids, codes: npt.NDArray[np.integer], codebook_sizes: tuple[int, ...]) -> Catalogue:
        if ids.ndim != 1 or ids.dtype.kind != "S" or codes.ndim != 2 or codes.dtype.kind not in "iu":
            raise CatalogueError("ids and codes: not byte strings [items] and integers [items, L]")
        if len(ids) != len(codes):
            raise CatalogueError(f"items: {len(ids)} ids for {len(codes)} code paths")
        first = np.ones(len(codes), dtype=bool)
        first[1:] = (codes[1:] != codes[:-1]).any(axis=1)
        try:
            trie = Trie.from_paths(codes[first], codebook_sizes)
        except ValueError as error:
            raise CatalogueError(f"codes: {error}") from error
        item_start = np.append(np.flatnonzero(first), len(codes)).astype(np.int32)
        item_path = np.cumsum(first, dtype=np.int32) - np.int32(1)
        return cls(ids, codes.astype(np.int32, copy=False), item_start, item_path, trie)

    def save(self, folder: Path) -> None:
        """Write ids.npy, codes.npy and codebooks.npy."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "ids.npy", self.ids, allow_pickle=False)
        np.save(folder / "codes.npy", self.codes, allow_pickle=False)
        np.save(folder / "codebooks.npy", np.asarray(self.trie.codebook_sizes, dtype=np.int64), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Catalogue:
        """Read what `save` wrote. Raises CatalogueError naming the file."""
        arrays = {}
        for name in ("ids", "codes", "codebooks"):
            try:
                arrays[name] = np.load(folder / f"{name}.npy", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise CatalogueError(f"{folder / name}.npy: {error}") from error
        return cls._assemble(arrays["ids"], arrays["codes"], tuple(arrays["codebooks"].tolist()))

    @cached_property
    def version(self) -> str:
        """Content hash: equal versions hold equal items under equal node ids."""
        digest = hashlib.sha256(repr((self.trie.codebook_sizes, self.ids.dtype.str, self.codes.shape)).encode())
        digest.update(np.ascontiguousarray(self.ids).data)
        digest.update(np.ascontiguousarray(self.codes).data)
        return digest.hexdigest()[:16]

    @property
    def items(self) -> int:
        """Number of items."""
        return len(self.ids)

    @cached_property
    def _index(self) -> IdIndex:
        return IdIndex.of(self.ids)

    def warm_up(self) -> None:
        """Make what the first request would otherwise wait for. O(items), once."""
        _ = self._index, self.trie.child_count

    def find(self, ids: Iterable[str]) -> Int64:
        """Item index of each id, -1 where the catalogue does not know it; [len(ids)]. O(ids), however large the catalogue."""
        width = self.ids.dtype.itemsize
        wanted = [item.encode("utf-8", "surrogatepass") for item in ids]
        # numpy cuts what is too wide and drops trailing NUL bytes, so such an id could pose as another. No id is empty.
        keys = [key if len(key) <= width and not key.endswith(b"\0") else b"" for key in wanted]
        return self._index.find(np.array(keys, dtype=self.ids.dtype))

    def id_of(self, item: int) -> str:
        """The id of an item index."""
        return bytes(self.ids[item]).decode()

    def leaf_of(self, items: npt.NDArray[np.integer]) -> Int64:
        """The trie leaf of each item index, [n]."""
        leaf: Int64 = self.item_path[items].astype(np.int64) + self.trie.level_start[self.trie.levels]
        return leaf

    def items_of(self, leaf: int) -> range:
        """The item indices that share a leaf's code path, in id order."""
        path = leaf - int(self.trie.level_start[self.trie.levels])
        return range(int(self.item_start[path]), int(self.item_start[path + 1]))

    def pruning(self, *, excluded: Int64 | None = None, allowed: Int64 | None = None) -> Pruning:
        """Prune the trie to items that are not `excluded` and, where given, are `allowed` (item indices).

        A leaf dies when none of its items is left, an inner node when none of its children is. O(indices x L).
        """
        if excluded is None:
            excluded = np.empty(0, dtype=np.int64)
        if allowed is not None:
            return Pruning.to_leaves(self.trie, self.leaf_of(np.setdiff1d(allowed, excluded)))
        if not len(excluded):
            return Pruning.none()
        leaves, gone = np.unique(self.leaf_of(np.unique(excluded)), return_counts=True)
        path = leaves - self.trie.level_start[self.trie.levels]
        emptied = gone == (self.item_start[path + 1] - self.item_start[path])
        return Pruning.of_dead_leaves(self.trie, leaves[emptied])


def _encode(ids: Sequence[str] | Ids) -> Ids:
    """The ids as bytes. Raises CatalogueError on one that is empty or that a numpy byte string would not give back."""
    if isinstance(ids, np.ndarray):
        if (ids == b"").any():
            raise CatalogueError("ids: an item id is empty")
        return ids
    try:
        encoded = [item.encode() for item in ids]
    except UnicodeEncodeError as error:
        raise CatalogueError(f"ids: {error.object!r} cannot be written as UTF-8") from error
    for item in ids:
        if not item:
            raise CatalogueError("ids: an item id is empty")
        if item.endswith("\0"):
            raise CatalogueError(f"ids: {item!r} ends in NUL")
    return np.array(encoded)
