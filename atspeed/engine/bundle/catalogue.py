"""A catalogue: items, their code paths and the trie. Immutable, versioned by hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Int32, Int64
from atspeed.engine.bundle.arrays import read_array
from atspeed.engine.bundle.id_index import IdIndex, Ids
from atspeed.engine.bundle.item_ids import MAX_ID_BYTES, id_problem, shown
from atspeed.engine.bundle.titles import Titles
from atspeed.engine.errors import CatalogueError
from atspeed.engine.files.atomic_write import replacing
from atspeed.engine.search.trie import ENDED, Pruning, Trie

Codes = npt.NDArray[np.int32]

_CHUNK = 1 << 16  # ids checked at once: some megabytes of temporary arrays


@dataclass(frozen=True)
class Catalogue:
    """Items in the order of (code path, rank, id), so that the items of one path are neighbours.

    Ten million items take less than a gigabyte, so no method may keep a Python object per item.

    Attributes:
        ids: bytes [items], UTF-8.
        codes: int32 [items, L], 0-based within each level; -1 in the places after the end of a shorter path.
        item_start: int32 [paths + 1]; the items of path i (leaf i of the trie) are item_start[i] .. item_start[i + 1] - 1.
        item_path: the path of each item, int32 [items].
        trie: the trie of the distinct paths.
        tail_start: int64 [L]; codes from tail_start[level] on are tail tokens, which are scored and which prompts do not hold.
        titles: titles of the items; None without any.
    """

    ids: Ids
    codes: Codes
    item_start: Int32
    item_path: Int32
    trie: Trie
    tail_start: Int64
    titles: Titles | None = None

    @classmethod
    def build(
        cls,
        ids: Sequence[str] | Ids,
        codes: npt.NDArray[np.integer],
        codebook_sizes: Sequence[int],
        *,
        tail_start: Sequence[int] | None = None,
        rank: npt.NDArray[np.number] | None = None,
    ) -> Catalogue:
        """Build a catalogue from items in any order.

        Raises CatalogueError when an id is invalid or occurs twice, when a code is outside its codebook, when a path is the
        beginning of another, and when a code stands behind a tail token.

        Args:
            ids: strings, or UTF-8 bytes [items].
            codes: integers [items, L]; -1 in the places after the end of a shorter path.
            codebook_sizes: codes per level, tail tokens included.
            tail_start: the first tail token of each level; None without tails.
            rank: [items]; items of one path stand in ascending order of it. None: in the order of their ids.
        """
        if len(ids) != len(codes) or not len(ids):
            raise CatalogueError(f"items: {len(ids)} ids for {len(codes)} code paths")
        if rank is not None and rank.shape != (len(ids),):
            raise CatalogueError(f"rank: shape {list(rank.shape)} for {len(ids)} items")
        encoded = _encode(ids)
        within = (encoded,) if rank is None else (encoded, rank)
        order = np.lexsort((*within, *codes.T[::-1]))  # by code path, then by rank and id
        encoded = encoded[order]
        sizes = tuple(codebook_sizes)
        catalogue = cls._assemble(encoded, codes[order], sizes, np.asarray(sizes if tail_start is None else tail_start))
        ordered = np.sort(encoded)
        repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(repeated):
            raise CatalogueError(f"ids: {ordered[repeated[0]].decode()!r} occurs more than once")
        return catalogue

    @classmethod
    def _assemble(
        cls,
        ids: Ids,
        codes: npt.NDArray[np.integer],
        codebook_sizes: tuple[int, ...],
        tail_start: npt.NDArray[np.integer],
    ) -> Catalogue:
        if ids.ndim != 1 or ids.dtype.kind != "S" or codes.ndim != 2 or codes.dtype.kind not in "iu":
            raise CatalogueError("ids and codes: not byte strings [items] and integers [items, L]")
        if len(ids) != len(codes):
            raise CatalogueError(f"items: {len(ids)} ids for {len(codes)} code paths")
        # The first item of each path: its codes differ from those of the item before.
        first = np.ones(len(codes), dtype=bool)
        first[1:] = (codes[1:] != codes[:-1]).any(axis=1)
        try:
            trie = Trie.from_paths(codes[first], codebook_sizes)
        except ValueError as error:
            raise CatalogueError(f"codes: {error}") from error
        item_start = np.append(np.flatnonzero(first), len(codes)).astype(np.int32)
        item_path = np.cumsum(first, dtype=np.int32) - np.int32(1)
        catalogue = cls(
            ids, codes.astype(np.int32, copy=False), item_start, item_path, trie, tail_start.astype(np.int64)
        )
        catalogue._check_tails()
        return catalogue

    def _check_tails(self) -> None:
        """Raise CatalogueError unless every path is one or more codes and then tail tokens only."""
        sizes = np.asarray(self.trie.codebook_sizes)
        if self.tail_start.shape != sizes.shape or (self.tail_start < 0).any() or (self.tail_start > sizes).any():
            starts = self.tail_start.tolist()
            raise CatalogueError(f"tails: {starts} are not the first tail tokens of the codebooks {sizes.tolist()}")
        if not self.has_tails:
            return
        paths = self.codes[self.item_start[:-1]]
        if (paths[:, 0] >= self.tail_start[0]).any():
            raise CatalogueError("codes: a path without a code before its tail")
        tail = paths >= self.tail_start
        if (np.logical_or.accumulate(tail, axis=1) & ~tail & (paths != ENDED)).any():
            raise CatalogueError("codes: a code stands after a tail token")

    def save(self, folder: Path) -> None:
        """Write ids.npy, codes.npy and codebooks.npy, tails.npy if there are tails, and the titles, each in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        sizes = np.asarray(self.trie.codebook_sizes, dtype=np.int64)
        arrays = {"ids": self.ids, "codes": self.codes, "codebooks": sizes}
        if self.has_tails:
            arrays["tails"] = self.tail_start
        for name, array in arrays.items():
            with replacing(folder / f"{name}.npy") as file:
                # Through `write` alone: numpy writes into a real file by itself, and reports no error when the disk is full.
                np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)
        if self.titles is not None:
            self.titles.save(folder)

    @classmethod
    def load(cls, folder: Path) -> Catalogue:
        """Read a catalogue that `save` wrote. Raises CatalogueError naming the file."""
        ids, codes, codebooks = (read_array(folder / f"{name}.npy") for name in ("ids", "codes", "codebooks"))
        tails = read_array(folder / "tails.npy") if os.path.lexists(folder / "tails.npy") else codebooks
        for name, array in (("codebooks", codebooks), ("tails", tails)):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise CatalogueError(f"{folder}/{name}.npy: not integers [L]")
        try:
            catalogue = cls._assemble(ids, codes, tuple(codebooks.tolist()), tails)
            _check_ids(catalogue.ids)
        except CatalogueError as error:
            raise CatalogueError(f"{folder}: {error}") from error
        return replace(catalogue, titles=Titles.load(folder, catalogue.items))

    @cached_property
    def version(self) -> str:
        """Return the hash of the content: equal versions have equal items under equal node ids."""
        digest = hashlib.sha256(repr((self.trie.codebook_sizes, self.ids.dtype.str, self.codes.shape)).encode())
        digest.update(np.ascontiguousarray(self.ids).data)
        digest.update(np.ascontiguousarray(self.codes).data)
        if self.has_tails:
            digest.update(np.ascontiguousarray(self.tail_start).data)
        return digest.hexdigest()[:16]

    @property
    def has_tails(self) -> bool:
        """Return whether some level has tail tokens."""
        return tuple(self.tail_start.tolist()) != self.trie.codebook_sizes

    @property
    def in_order_of_ids(self) -> bool:
        """Return whether the items of every path stand in the order of their ids."""
        return bool(((self.ids[1:] > self.ids[:-1]) | (self.item_path[1:] != self.item_path[:-1])).all())

    @cached_property
    def longest_spelling(self) -> int:
        """Return the most codes of a path before its tail."""
        if not self.has_tails:
            return self.trie.levels
        return int(self.spelled_lengths(self.item_start[:-1]).max())

    @cached_property
    def shortest_spelling(self) -> int:
        """Return the fewest codes of a path before its tail."""
        return int(self._spelled_lengths(self.codes[self.item_start[:-1]]).min())

    @property
    def items(self) -> int:
        """Return the number of items."""
        return len(self.ids)

    @cached_property
    def _index(self) -> IdIndex:
        return IdIndex.of(self.ids)

    def warm_up(self) -> None:
        """Build the index, which the first request would otherwise wait for. O(items), once."""
        _ = self._index, self.trie.child_count, self.trie.ends, self.shortest_spelling

    def find(self, ids: Iterable[str]) -> Int64:
        """Return the item index of each id, [len(ids)]; -1 for an unknown id. O(ids), however large the catalogue."""
        width = self.ids.dtype.itemsize
        wanted = [item.encode("utf-8", "surrogatepass") for item in ids]
        if not wanted:
            return np.empty(0, dtype=np.int64)
        # numpy truncates long ids and drops trailing NUL bytes, so such an id could match another. No id is empty.
        keys = [key if len(key) <= width and not key.endswith(b"\0") else b"" for key in wanted]
        return self._index.find(np.array(keys, dtype=self.ids.dtype))

    def known_ids(self) -> set[str]:
        """Return all ids: an object per item, which serving never needs."""
        return {item.decode() for item in self.ids.tolist()}

    def id_of(self, item: int) -> str:
        """Return the id of an item index."""
        return bytes(self.ids[item]).decode()

    def titles_of(self, ids: Iterable[str]) -> dict[str, str]:
        """Return the titles of items by id. Items without a title are left out."""
        if (titles := self.titles) is None:
            return {}
        wanted = list(ids)
        found = zip(wanted, self.find(wanted).tolist(), strict=True)
        return {item_id: titles[item] for item_id, item in found if item >= 0 and titles[item]}

    def with_titles(self, titles: Mapping[str, str]) -> Catalogue:
        """Return the catalogue with these titles by id, in place of those that it has."""
        made = Titles.of(titles.get(self.id_of(item), "") for item in range(self.items)) if titles else None
        return replace(self, titles=made)

    def leaf_of(self, items: npt.NDArray[np.integer]) -> Int64:
        """Return the trie leaf of each item index, [n]."""
        leaf: Int64 = self.item_path[items].astype(np.int64) + self.trie.level_start[self.trie.levels]
        return leaf

    def spelled_lengths(self, items: npt.NDArray[np.integer]) -> Int64:
        """Return the number of codes of each item before its tail, [n]."""
        codes = self.codes[items]
        if self.shortest_spelling == codes.shape[1]:
            return np.full(len(codes), codes.shape[1], dtype=np.int64)
        return self._spelled_lengths(codes)

    def _spelled_lengths(self, codes: Codes) -> Int64:
        spelled = np.logical_and.accumulate((codes != ENDED) & (codes < self.tail_start), axis=1)
        return np.asarray(spelled.sum(axis=1), dtype=np.int64)

    def spelled_codes(self, items: npt.NDArray[np.integer]) -> list[Codes]:
        """Return the codes of each item before its tail: those that prompts and replies hold."""
        lengths = self.spelled_lengths(items).tolist()
        return [path[:length] for path, length in zip(self.codes[items], lengths, strict=True)]

    def spelled_tokens(self, items: npt.NDArray[np.integer], code_tokens: Sequence[int] | Int64) -> list[Int64]:
        """Return the tokens of each item in a prompt. code_tokens: the token id of each code column, [C]."""
        tokens, offset = np.asarray(code_tokens, dtype=np.int64), self.trie.codebook_offset
        # Columns after the end of a spelling get a token too, and are cut off.
        rows, lengths = tokens[self.codes[items] + offset], self.spelled_lengths(items).tolist()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def items_of(self, leaf: int) -> range:
        """Return the indices of the items of a leaf's code path, in order."""
        path = leaf - int(self.trie.level_start[self.trie.levels])
        return range(int(self.item_start[path]), int(self.item_start[path + 1]))

    def pruning(self, *, excluded: Int64 | None = None, allowed: Int64 | None = None) -> Pruning:
        """Return the pruning to items that are not `excluded` and, if given, are `allowed` (item indices).

        A leaf is removed when none of its items is left, an inner node when none of its children is. O(indices * L).
        """
        if excluded is None:
            excluded = np.empty(0, dtype=np.int64)
        if allowed is not None:
            return Pruning.to_leaves(self.trie, self.leaf_of(np.setdiff1d(allowed, excluded)))
        if not len(excluded):
            return Pruning.none()
        # Leaves all of whose items are excluded.
        leaves, gone = np.unique(self.leaf_of(np.unique(excluded)), return_counts=True)
        path = leaves - self.trie.level_start[self.trie.levels]
        emptied = gone == (self.item_start[path + 1] - self.item_start[path])
        return Pruning.of_dead_leaves(self.trie, leaves[emptied])


def _encode(ids: Sequence[str] | Ids) -> Ids:
    """Return the ids as bytes. Raises CatalogueError on an invalid id, or one that a numpy byte string would change."""
    if isinstance(ids, np.ndarray):
        _check_ids(ids)
        return ids
    for item in ids:
        if problem := id_problem(item):
            raise CatalogueError(f"ids: {shown(item)} {problem}")
    return np.array([item.encode() for item in ids])


def _check_ids(ids: Ids) -> None:
    """Raise CatalogueError, naming the first invalid id. Makes no Python object per item."""
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
    apart = np.pad(rows, ((0, 0), (0, 1)))  # a NUL behind each: no character may continue in the next id
    try:
        apart.tobytes().decode()
    except UnicodeDecodeError as error:
        broken = bytes(ids[error.start // apart.shape[1]])
        raise CatalogueError(f"ids: {broken!r} is not UTF-8") from error
