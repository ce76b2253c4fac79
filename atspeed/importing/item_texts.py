"""Reads the texts of items from a user's prompts: titles and other fields, with the codes if they hold them.

A tokenizer may merge the end of a title with the text behind it. So texts are not tokenised alone: each item is rendered in a
prompt of its own and in one before another item. All that these prompts have in common is prefix, separator and suffix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from atspeed.engine.arrays import Int32
from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.bundle.item_texts import ItemTexts, TokenRows
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.importing.errors import ImportingError
from atspeed.importing.template import template_of
from atspeed.importing.user_prompt import UserPrompt


def split_texts(user: UserPrompt, items: Sequence[str]) -> tuple[PromptTemplate, ItemTexts]:
    """Return the template and the texts of items, in their order. The template does not name the texts yet.

    Raises ImportingError when prompts are not made of texts of items and of tokens between them.
    """
    alone = TokenRows.of(_rendered(user, ([item] for item in items)))
    before, behind = _common(alone)
    last = _cut(alone, before, behind)
    first, end = alone.row(0)[:before].tolist(), alone.row(0)[before:].tolist()
    suffix = end[len(end) - behind :]
    if user.layout.max_items == 1:
        return template_of(user, items[0], first, [], end, suffix), ItemTexts(last, last)
    pairs = TokenRows.of(_rendered(user, ([item, items[0]] for item in items)))
    _check_ends(pairs, items, first, end)
    pairs = _cut(pairs, before, len(end))
    inner = _cut(pairs, 0, _common(pairs)[1])
    template = template_of(user, items[0], first, inner.row(0).tolist(), end, suffix)
    return template, ItemTexts(inner, last)


def _rendered(user: UserPrompt, histories: Iterable[Sequence[str]]) -> Iterator[Int32]:
    for batch in user.batches(list(histories)):
        for tokens in batch:
            yield np.asarray(tokens, dtype=np.int32)


def _common(rows: TokenRows) -> tuple[int, int]:
    """Return how many tokens at the beginning and then at the end of rows are the same in all of them."""
    first = rows.tokens[: rows.starts[1]]
    before, behind = len(first), len(first)
    for start, stop in zip(rows.starts[:-1].tolist(), rows.starts[1:].tolist(), strict=True):
        row = rows.tokens[start:stop]
        before = _equal(first[:before], row)
        behind = _equal(first[len(first) - behind :][::-1], row[::-1])
    return before, min(behind, int(rows.lengths.min()) - before)


def _equal(one: Int32, other: Int32) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter


def _cut(rows: TokenRows, before: int, behind: int) -> TokenRows:
    """Return rows without so many tokens at their beginning and at their end."""
    return TokenRows.of(
        rows.tokens[start + before : stop - behind]
        for start, stop in zip(rows.starts[:-1].tolist(), rows.starts[1:].tolist(), strict=True)
    )


def _check_ends(pairs: TokenRows, items: Sequence[str], first: Sequence[int], end: Sequence[int]) -> None:
    """Raise ImportingError, naming an item, when another one before it changes how it, or the prompt, begins or ends."""
    for place, item in enumerate(items):
        row = pairs.row(place).tolist()
        if row[: len(first)] != [*first] or row[len(row) - len(end) :] != [*end] or len(row) < len(first) + len(end):
            raise ImportingError(
                f"prompt: item {shown(item)}: the prompt is not made of segments that stay what they are: behind this item, "
                f"item {shown(items[0])} has other tokens than alone"
            )
