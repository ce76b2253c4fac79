"""Reads the texts of items from rendered prompts: titles and other fields.

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
from atspeed.importing.layouts import ITEM
from atspeed.importing.template import difference, template_of
from atspeed.importing.user_prompt import UserPrompt

_WINDOWS = 20_000  # prompts with an item at each place; those of larger catalogues are drawn


def split_texts(user: UserPrompt, items: Sequence[str]) -> tuple[PromptTemplate, ItemTexts]:
    """Return the template and the texts of items, in their order. The template does not name the texts yet.

    Raises ImportingError when prompts are not made of texts of items and of tokens between them.
    """
    alone = TokenRows.of(_rendered(user, ([item] for item in items)))
    before, behind = common_ends(alone)
    last = _cut(alone, before, behind)
    first, end = alone.row(0)[:before].tolist(), alone.row(0)[before:].tolist()
    suffix = end[len(end) - behind :]
    if user.layout.max_items == 1:
        return template_of(user, items[0], first, [], end, suffix), ItemTexts(last, last)
    inner = _before_another(user, items, first, end)
    template = template_of(user, items[0], first, inner.row(0).tolist(), end, suffix)
    bounded = user.layout.item.startswith(ITEM) or user.layout.item.endswith(
        ITEM
    )  # by a code, which merges with nothing
    if not template.before(1) and not bounded:
        raise ImportingError(
            "prompt: the prompt is not made of segments that stay what they are: no token stands between the texts of two "
            "items, and each might change the other"
        )
    texts = ItemTexts(inner, last)
    _check_windows(user, items, template, texts)
    return template, texts


def _rendered(user: UserPrompt, histories: Iterable[Sequence[str]]) -> Iterator[Int32]:
    for batch in user.batches(list(histories)):
        for tokens in batch:
            yield np.asarray(tokens, dtype=np.int32)


def common_ends(rows: TokenRows) -> tuple[int, int]:
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


def _before_another(user: UserPrompt, items: Sequence[str], first: list[int], end: list[int]) -> TokenRows:
    """Return the texts of items before the first one. first, end: what stands before and behind them then.

    Raises ImportingError, naming an item, when it changes the tokens of the one behind it.
    """
    pairs = TokenRows.of(_rendered(user, ([item, items[0]] for item in items)))
    for place, item in enumerate(items):
        row = pairs.row(place).tolist()
        if row[: len(first)] != first or row[len(row) - len(end) :] != end or len(row) < len(first) + len(end):
            raise _changes(item, items[0])
    between = _cut(pairs, len(first), len(end))
    return _cut(between, 0, common_ends(between)[1])


def _check_windows(user: UserPrompt, items: Sequence[str], template: PromptTemplate, texts: ItemTexts) -> None:
    """Render windows of neighbouring items, so that every item stands at every place: it may change the number behind it.

    Raises ImportingError with the first difference.
    """
    rng, count = np.random.default_rng(0), min(len(items), _WINDOWS)
    starts = rng.permutation(len(items))[:count].tolist()
    windows = [[(start + place) % len(items) for place in range(template.max_items)] for start in starts]
    rendered = _rendered(user, ([items[row] for row in window] for window in windows))
    for window, row in zip(windows, rendered, strict=True):
        expected = template.tokens(texts.of(np.asarray(window)))
        if not np.array_equal(row, expected):
            named = f"items {shown(items[window[0]])} to {shown(items[window[-1]])}"
            raise ImportingError(f"prompt: {named}: {difference(user, row.tolist(), expected.tolist())}")


def _changes(before: str, behind: str) -> ImportingError:
    return ImportingError(
        f"prompt: the prompt is not made of segments that stay what they are: behind item {shown(before)}, item "
        f"{shown(behind)} has other tokens than alone"
    )
