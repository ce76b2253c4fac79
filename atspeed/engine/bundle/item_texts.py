"""Texts of items in prompts, as token ids: titles and other fields.

A tokenizer may merge the end of a text with what follows it. So an item has two texts: one before another item, and one at the
end of a history.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from atspeed.engine.arrays import Int32, Int64
from atspeed.engine.bundle.arrays import read_array
from atspeed.engine.bundle.prompt import TextsEntry
from atspeed.engine.errors import BundleError, CatalogueError
from atspeed.engine.files.atomic_write import replacing

_INNER, _LAST = ("inner_tokens", "inner_starts"), ("last_tokens", "last_starts")


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens, of any length.

    Attributes:
        tokens: int32 [tokens], row by row.
        starts: int64 [rows + 1]; row i is tokens[starts[i] : starts[i + 1]].
    """

    tokens: Int32
    starts: Int64

    @classmethod
    def of(cls, rows: Iterable[Int32]) -> TokenRows:
        """Join rows."""
        held = list(rows)
        lengths = np.fromiter(map(len, held), dtype=np.int64, count=len(held))
        tokens = np.concatenate(held) if held else np.zeros(0, dtype=np.int32)
        return cls(tokens.astype(np.int32, copy=False), np.append(0, np.cumsum(lengths)))

    @property
    def lengths(self) -> Int64:
        """Return the tokens of each row, int64 [rows]."""
        return np.diff(self.starts)

    def row(self, index: int) -> Int64:
        """Return the tokens of a row, int64."""
        return self.tokens[self.starts[index] : self.starts[index + 1]].astype(np.int64)

    def take(self, rows: Int64) -> TokenRows:
        """Return rows in another order."""
        lengths = self.lengths[rows]
        starts = np.append(0, np.cumsum(lengths))
        source = np.repeat(self.starts[rows] - starts[:-1], lengths) + np.arange(starts[-1])
        return TokenRows(self.tokens[source], starts)

    def equals(self, other: TokenRows) -> bool:
        """Return whether both hold the same rows."""
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.tokens, other.tokens)


@dataclass(frozen=True)
class ItemTexts:
    """The texts of a catalogue's items, in its order.

    Attributes:
        inner: the texts before another item.
        last: the texts at the end of a history.
    """

    inner: TokenRows
    last: TokenRows

    def of(self, window: Int64) -> list[Int64]:
        """Return the text of each item of a window, int64 [n] item indices."""
        items = window.tolist()
        return [*map(self.inner.row, items[:-1]), *map(self.last.row, items[-1:])]

    def take(self, rows: Int64) -> ItemTexts:
        """Return the texts in another order."""
        return ItemTexts(self.inner.take(rows), self.last.take(rows))

    def distinct(self) -> Int64:
        """Return the distinct tokens of all texts."""
        tokens: Int64 = np.union1d(self.inner.tokens, self.last.tokens).astype(np.int64)
        return tokens

    def entry(self, catalogue: str) -> TextsEntry:
        """Return the manifest's entry. catalogue: its version."""
        lengths = np.append(self.inner.lengths, self.last.lengths)
        return TextsEntry(
            catalogue=catalogue,
            digest=self._digest(),
            longest=max(1, int(lengths.max())),
            usual=max(1, int(np.median(lengths))),
        )

    def save(self, folder: Path) -> None:
        """Write the arrays, each in one step. Equal texts are written once."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in self._arrays().items():
            with replacing(folder / f"{name}.npy") as file:
                np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, entry: TextsEntry, *, vocab_size: int) -> ItemTexts:
        """Read the texts of an entry, which `save` wrote. vocab_size: of the model. Raises BundleError naming the folder."""
        inner = _read_rows(folder, _INNER, vocab_size)
        last = _read_rows(folder, _LAST, vocab_size) if (folder / f"{_LAST[0]}.npy").exists() else inner
        texts = cls(inner, last)
        if texts._digest() != entry.digest:
            raise BundleError(f"{folder}: other texts than those of the manifest")
        return texts

    def _arrays(self) -> Mapping[str, Int32 | Int64]:
        arrays: dict[str, Int32 | Int64] = dict(zip(_INNER, (self.inner.tokens, self.inner.starts), strict=True))
        if not self.last.equals(self.inner):
            arrays |= dict(zip(_LAST, (self.last.tokens, self.last.starts), strict=True))
        return arrays

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, array in self._arrays().items():
            digest.update(f"{name} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def _read_rows(folder: Path, names: tuple[str, str], vocab_size: int) -> TokenRows:
    try:
        tokens, starts = (read_array(folder / f"{name}.npy") for name in names)
    except CatalogueError as error:
        raise BundleError(str(error)) from error
    if tokens.dtype != np.int32 or starts.dtype != np.int64 or tokens.ndim != 1 or starts.ndim != 1:
        raise BundleError(f"{folder}: {names[0]}, {names[1]}: not int32 tokens and int64 starts")
    if not len(starts) or starts[0] != 0 or starts[-1] != len(tokens) or (np.diff(starts) < 0).any():
        raise BundleError(f"{folder}/{names[1]}.npy: not the starts of rows of {len(tokens)} tokens")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise BundleError(f"{folder}/{names[0]}.npy: a token id is outside the vocabulary of {vocab_size}")
    return TokenRows(tokens, starts)
