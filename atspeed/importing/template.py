"""Splits a user's prompt into the parts of a PromptTemplate; proves both equal.

The parts are read from rendered prompts, not reasoned: a tokenizer may merge tokens at the ends of texts, or put one behind an
added token. Then every history is rendered both ways and compared token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.bundle.item_texts import ItemTexts
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.bundle.user_fields import UserFields
from atspeed.importing.errors import ImportingError
from atspeed.importing.user_prompt import UserPrompt

ItemTokens = Callable[[str], Int64]
"""The code tokens of an item id, as prompts spell them."""
Tokens = Sequence[int]


@dataclass(frozen=True)
class ItemSpelling:
    """The tokens of items in prompts.

    Attributes:
        inner: those before another item.
        last: those at the end of a history.
    """

    inner: ItemTokens
    last: ItemTokens

    @classmethod
    def of_texts(cls, texts: ItemTexts, rows: Mapping[str, int]) -> ItemSpelling:
        """Return the spelling by texts. rows: of each item."""
        return cls(lambda item: texts.inner.row(rows[item]), lambda item: texts.last.row(rows[item]))

    def window(self, items: Sequence[str]) -> list[Int64]:
        """Return the tokens of each item of a window."""
        return [*map(self.inner, items[:-1]), *map(self.last, items[-1:])]


def split_prompt(user: UserPrompt, item_tokens: ItemTokens, item: str) -> PromptTemplate:
    """Split the prompts of `item`. Raises ImportingError when they are no prefix, items and suffix."""
    codes = item_tokens(item).tolist()
    one = user.tokens([item])
    places = _places(one, codes)
    if len(places) != 1:
        raise ImportingError(
            f"prompt: the codes of item {shown(item)} stand {len(places)} times in a prompt of that item: "
            f"{_names(user, codes)} in {_names(user, one)}"
        )
    prefix, suffix = one[: places[0]], one[places[0] + len(codes) :]
    return template_of(user, item, prefix, codes, [*codes, *suffix], suffix)


def template_of(
    user: UserPrompt, item: str, prefix: Tokens, inner: Tokens, end: Tokens, suffix: Tokens
) -> PromptTemplate:
    """Return the template of a prompt, with separators as they stand between repetitions of an item.

    Args:
        user: the prompt.
        item: the item.
        prefix: the tokens before an item.
        inner: those of the item before another item.
        end: those of the item at the end of a history, with all that follows.
        suffix: those that follow.
    """
    most = user.layout.max_items
    counts = range(2, 1 + (most if user.layout.numbered else min(most, 2)))
    head, separators = [*prefix, *inner], list[tuple[int, ...]]()
    rendered = (each for batch in user.batches([[item] * count for count in counts]) for each in batch)
    for whole in rendered:
        if whole[: len(head)] != head or whole[len(whole) - len(end) :] != [*end] or len(whole) < len(head) + len(end):
            joined = [*(whole[: len(whole) - len(end)] if whole[: len(head)] == head else head), *end]
            raise ImportingError(f"prompt: item {shown(item)}, repeated: {difference(user, whole, joined)}")
        separators.append(tuple(whole[len(head) : len(whole) - len(end)]))
        head += [*separators[-1], *inner]
    parts: dict[str, Any] = {"separator": separators[0] if separators else ()}
    if len(set(separators)) > 1:
        parts = {"separators": tuple(separators)}
    try:
        return PromptTemplate(prefix=tuple(prefix), suffix=tuple(suffix), max_items=most, **parts)
    except ValidationError as error:
        raise ImportingError(f"prompt: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error


def check_prompts(
    user: UserPrompt,
    template: PromptTemplate,
    spelling: ItemSpelling,
    histories: Mapping[str, Sequence[str]],
    path: Path,
    user_fields: Sequence[UserFields] = ({},),
) -> int:
    """Compare the template's prompts with the user's. Return how many were equal.

    histories: item ids by their place in the file at `path`. user_fields: values of users, which the histories get in turn.
    Raises ImportingError with the first difference.
    """
    places, checked = list(histories), 0
    users = [user_fields[place % len(user_fields)] for place in range(len(places))]
    for batch in user.batches(list(histories.values()), users):
        for rendered in batch:
            place = places[checked]
            history = histories[place]
            window = history[template.window_start(len(history)) :]
            expected = template.tokens(spelling.window(window), users[checked]).tolist()
            if rendered != expected:
                raise ImportingError(f"{path}: {place}: {difference(user, rendered, expected)}")
            checked += 1
    return checked


def _places(tokens: Tokens, wanted: Tokens) -> list[int]:
    """Return where a sequence stands in another."""
    if len(wanted) > len(tokens):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), len(wanted))
    return np.flatnonzero((windows == np.asarray(wanted)).all(axis=1)).tolist()


def difference(user: UserPrompt, rendered: Tokens, expected: Tokens) -> str:
    """Describe the first difference of two prompts."""
    shorter = min(len(rendered), len(expected))
    at = next((place for place in range(shorter) if rendered[place] != expected[place]), shorter)
    theirs, ours = (_names(user, tokens[at : at + 1]) or "the end" for tokens in (rendered, expected))
    return (
        f"the prompt is not made of segments that stay what they are: token {at} is {theirs} in the user's prompt and "
        f"{ours} where prefix, items, separators and suffix are joined"
    )


def _names(user: UserPrompt, tokens: Tokens) -> str:
    return " ".join(
        f"{name!r} ({token})"
        for name, token in zip(user.tokenizer.convert_ids_to_tokens(list(tokens)), tokens, strict=True)
    )
