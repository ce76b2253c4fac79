"""Gives each code its token, by name, and each level its dense columns.

Authors add the names of codes to a tokenizer in lexicographic order, and only those that occur. So a token's id is looked up
by its name and never computed. In a level, codes have the natural order of their names: <a_2> stands before <a_10>.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atspeed.engine.arrays import Int32, Int64
from atspeed.engine.bundle.item_ids import shown
from atspeed.importing.errors import ImportingError
from atspeed.importing.index import Index
from atspeed.importing.layouts import EOS
from atspeed.importing.user_prompt import UserPrompt

_DIGITS = re.compile(r"([0-9]+)")
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class CodeColumns:
    """The code columns of a catalogue.

    Attributes:
        sizes: the codes of each level, tail codes included.
        tail_start: the first tail code of each level; None without a tail.
        tokens: the token of each column, level by level.
        codes: int32 [items, L], 0-based in each level; -1 behind the end of a path.
    """

    sizes: tuple[int, ...]
    tail_start: tuple[int, ...] | None
    tokens: tuple[int, ...]
    codes: Int32


@dataclass(frozen=True)
class SpelledItems:
    """The code tokens of items, and their text.

    Attributes:
        index: the index.
        of_name: the token of each of its names, int64 [names].
    """

    index: Index
    of_name: Int64

    def text(self, item: str) -> str:
        """Return the names of an item's codes, joined."""
        return "".join(map(self.index.names.__getitem__, self._path(item)))

    def tokens(self, item: str) -> Int64:
        """Return the tokens of an item's codes."""
        return self.of_name[self._path(item)]

    def _path(self, item: str) -> list[int]:
        path = self.index.paths[self.index.rows[item]]
        numbers: list[int] = path[path >= 0].tolist()
        return numbers


def tail_tokens(user: UserPrompt, spelled: SpelledItems) -> list[int]:
    """Return the tokens that are scored behind the codes of every item. Raises ImportingError when they are not the same."""
    index, layout = spelled.index, user.layout
    if not layout.tail:
        return []
    if layout.tail.endswith(EOS) and user.tokenizer.eos_token_id is None:
        raise ImportingError(f"tail: the tokenizer has no end-of-sequence token for {EOS}")
    last = index.paths[np.arange(len(index.ids)), index.lengths - 1]
    rows = np.unique(last, return_index=True)[1]  # an item for each last code: more cannot change what stands behind it
    found: list[int] | None = None
    for item in (index.ids[row] for row in rows.tolist()):
        codes, whole = spelled.tokens(item).tolist(), user.tail(spelled.text(item))
        tail = whole[len(codes) :]
        names = " ".join(map(repr, user.tokenizer.convert_ids_to_tokens(whole)))
        if whole[: len(codes)] != codes:
            raise ImportingError(
                f"{index.path}: the codes of item {shown(item)} do not encode to their tokens, but to {names}"
            )
        if tail != (found or tail):
            raise ImportingError(
                f"tail: {layout.tail!r} behind item {shown(item)} encodes to {names}, not as behind others"
            )
        found = tail
    return found or []


def name_tokens(index: Index, tokenizer: Any, rows: int) -> Int64:
    """Return the token of each name of an index. rows: those of the model's embedding. Raises ImportingError naming one."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    alone = tokenizer(index.names, add_special_tokens=False)["input_ids"]
    owner: dict[int, str] = {}
    for name, encoded in zip(index.names, alone, strict=True):
        token = vocabulary.get(name)
        if token is None or token == tokenizer.unk_token_id or encoded != [token]:
            pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(encoded)[:6]))
            why = "the tokenizer has no such token" if token is None else "it does not encode to its own token"
            raise ImportingError(f"{index.path}: code {shown(name)}: {why}, it encodes to {pieces}")
        if token in owner:
            raise ImportingError(f"{index.path}: codes {shown(owner[token])} and {shown(name)} have one token, {token}")
        if token >= rows:
            raise ImportingError(f"{index.path}: code {shown(name)}: token {token}, but the embedding has {rows} rows")
        owner[token] = name
    return np.array([vocabulary[name] for name in index.names], dtype=np.int64)


def check_labels(index: Index) -> None:
    """Raise ImportingError when names with one letter, such as <a_1> and <a_2>, stand at two positions of paths."""
    position: dict[str, tuple[int, str]] = {}
    for level in range(index.paths.shape[1]):
        for number in _present(index.paths[:, level]).tolist():
            name = index.names[number]
            label = _DIGITS.sub("", name)
            if not _LETTER.search(label):
                continue
            first, other = position.setdefault(label, (level, name))
            if first != level:
                raise ImportingError(
                    f"{index.path}: {shown(other)} is code {first + 1} of a path and {shown(name)} is code {level + 1} of one"
                )


def check_order(names: Sequence[str]) -> None:
    """Raise ImportingError when names with one letter, in the order of columns, are not in the order of their codes."""
    last: dict[str, str] = {}
    for name in names:
        label = _DIGITS.sub("", name)
        if label in last and _natural(name) < _natural(last[label]):
            raise ImportingError(
                f"code {shown(last[label])} stands before {shown(name)}: token ids are not in the order of the codes; "
                "`atspeed import` looks tokens up by name"
            )
        last[label] = name


def code_columns(index: Index, tokens: Int64, tail: Sequence[int]) -> CodeColumns:
    """Return dense columns. tokens: of each name. tail: the tokens that are scored behind every path."""
    lengths, levels = index.lengths, index.paths.shape[1]
    codes = np.full((len(index.ids), levels + len(tail)), -1, dtype=np.int32)
    ordered = sorted(range(len(index.names)), key=lambda number: _natural(index.names[number]))
    order = np.empty(len(ordered), dtype=np.int64)
    order[ordered] = np.arange(len(ordered))
    columns: list[list[int]] = []
    for level in range(levels):
        present = _present(index.paths[:, level])
        present = present[np.argsort(order[present])]
        dense = np.full(len(index.names) + 1, -1, dtype=np.int32)  # the last place is that of -1
        dense[present] = np.arange(len(present))
        codes[:, level] = dense[index.paths[:, level]]
        columns.append(tokens[present].tolist())
    columns += [[] for _ in tail]
    tail_start = tuple(map(len, columns))
    for place, token in enumerate(tail):
        for length in np.unique(lengths).tolist():
            column = columns[length + place]
            if token in column[: tail_start[length + place]]:
                raise ImportingError(f"{index.path}: token {token} is a code and a token of the tail in one place")
            behind = column.index(token) if token in column else len(column)
            columns[length + place] = [*column[:behind], token, *column[behind + 1 :]]
            codes[lengths == length, length + place] = behind
    return CodeColumns(
        sizes=tuple(map(len, columns)),
        tail_start=tail_start if tail else None,
        tokens=tuple(token for column in columns for token in column),
        codes=codes,
    )


def _present(column: Int32) -> Int64:
    found: Int64 = np.unique(column[column >= 0]).astype(np.int64)
    return found


def _natural(name: str) -> list[str | int]:
    """Return a sort key in which numbers are compared as numbers."""
    return [int(part) if place % 2 else part for place, part in enumerate(_DIGITS.split(name))]
