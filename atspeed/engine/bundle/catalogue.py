"""A catalogue snapshot: items, their code paths and the trie over them. Immutable; its version is the hash of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Int32, Int64
from atspeed.engine.bundle.id_index import IdIndex, Ids
from atspeed.engine.bundle.item_ids import MAX_ID_BYTES, id_problem, shown
from atspeed.engine.errors import CatalogueError
from atspeed.engine.files.atomic_write import replacing
from atspeed.engine.search.trie import Pruning, Trie

Codes = npt.NDArray[np.int32]

_CHUNK = 1 << 16  # ids checked at once


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

        Raises CatalogueError on ids that occur twice or cannot be one, or codes outside their codebook.
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
        """Write ids.npy, codes.npy and codebooks.npy, each in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        sizes = np.asarray(self.trie.codebook_sizes, dtype=np.int64)
        for name, array in (("ids", self.ids), ("codes", self.codes), ("codebooks", sizes)):
            with replacing(folder / f"{name}.npy") as file:
                # Through `write` alone: into a real file numpy writes by itself, and says nothing when the disk is full.
                np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Catalogue:
        """Read what `save` wrote. Raises CatalogueError naming the file."""
        ids, codes, codebooks = (_read_array(folder / f"{name}.npy") for name in ("ids", "codes", "codebooks"))
        if codebooks.ndim != 1 or codebooks.dtype.kind not in "iu":
            raise CatalogueError(f"{folder}/codebooks.npy: not integers [L]")
        try:
            catalogue = cls._assemble(ids, codes, tuple(codebooks.tolist()))
            _check_ids(catalogue.ids)
        except CatalogueError as error:
            raise CatalogueError(f"{folder}: {error}") from error
        return catalogue

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


def _read_array(path: Path) -> npt.NDArray[Any]:
    """An array of its own, never one that is mapped from the file: what is checked is then what is served."""
    try:
        with path.open("rb") as file:
            array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            return array
    except (OSError, ValueError, EOFError) as error:
        raise CatalogueError(f"{path}: {error}") from error


def _encode(ids: Sequence[str] | Ids) -> Ids:
    """The ids as bytes. Raises CatalogueError on one that cannot be an id or that a numpy byte string would not give back."""
    if isinstance(ids, np.ndarray):
        _check_ids(ids)
        return ids
    for item in ids:
        if problem := id_problem(item):
            raise CatalogueError(f"ids: {shown(item)} {problem}")
    return np.array([item.encode() for item in ids])


def _check_ids(ids: Ids) -> None:
    """Raise CatalogueError, naming the first, when some cannot be an id. No Python object per item."""
    if (ids == b"").any():
        raise CatalogueError("ids: an item id is empty")
    if ids.dtype.itemsize > MAX_ID_BYTES and (long := np.flatnonzero(np.char.str_len(ids) > MAX_ID_BYTES)).size:
        item = bytes(ids[long[0]]).decode(errors="replace")
        raise CatalogueError(f"ids: {shown(item)} {id_problem(item)}")
    for begin in range(0, len(ids), _CHUNK):
        _check_utf8(ids[begin : begin + _CHUNK])


def _check_utf8(ids: Ids) -> None:
    rows = np.ascontiguousarray(ids).view(np.uint8).reshape(len(ids), ids.dtype.itemsize)
    if (rows < 0x80).all():
        return
    apart = np.pad(rows, ((0, 0), (0, 1)))  # a NUL behind each: what one id lacks, the next cannot bring
    try:
        apart.tobytes().decode()
    except UnicodeDecodeError as error:
        broken = bytes(ids[error.start // apart.shape[1]])
        raise CatalogueError(f"ids: {broken!r} is not UTF-8") from error
