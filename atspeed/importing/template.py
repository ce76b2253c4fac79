"""Splits a user's prompt into the parts of a PromptTemplate; proves both equal.

The parts are read from rendered prompts, not reasoned: a tokenizer may merge tokens at the ends of texts, or put one behind an
added token. Then every history is rendered both ways and compared token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.importing.errors import ImportingError
from atspeed.importing.user_prompt import UserPrompt

ItemTokens = Callable[[str], Int64]
"""The code tokens of an item id, as prompts spell them."""


def split_prompt(user: UserPrompt, item_tokens: ItemTokens, item: str) -> PromptTemplate:
    """Split the prompts with `item` once and twice. Raises ImportingError when they are no prefix, items and suffix."""
    codes = item_tokens(item).tolist()
    one, two = user.tokens([item]), user.tokens([item, item])
    places = _places(one, codes)
    if len(places) != 1:
        raise ImportingError(
            f"prompt: the codes of item {shown(item)} stand {len(places)} times in a prompt of that item: "
            f"{_names(user, codes)} in {_names(user, one)}"
        )
    prefix, suffix = one[: places[0]], one[places[0] + len(codes) :]
    inner = two[len(prefix) : len(two) - len(suffix)]
    separator = inner[len(codes) : len(inner) - len(codes)]
    try:
        return PromptTemplate(
            prefix=tuple(prefix), separator=tuple(separator), suffix=tuple(suffix), max_items=user.layout.max_items
        )
    except ValidationError as error:
        raise ImportingError(f"prompt: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error


def check_prompts(
    user: UserPrompt,
    template: PromptTemplate,
    item_tokens: ItemTokens,
    histories: Mapping[str, Sequence[str]],
    path: Path,
) -> int:
    """Compare the template's prompts with the user's. Return how many were equal.

    histories: item ids by their place in the file at `path`. Raises ImportingError with the first difference.
    """
    places, checked = list(histories), 0
    for batch in user.batches(list(histories.values())):
        for rendered in batch:
            place = places[checked]
            history = histories[place]
            window = history[template.window_start(len(history)) :]
            expected = template.tokens([item_tokens(item) for item in window]).tolist()
            if rendered != expected:
                raise ImportingError(f"{path}: {place}: {_difference(user, rendered, expected)}")
            checked += 1
    return checked


def _places(tokens: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Return where a sequence stands in another."""
    if len(wanted) > len(tokens):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), len(wanted))
    return np.flatnonzero((windows == np.asarray(wanted)).all(axis=1)).tolist()


def _difference(user: UserPrompt, rendered: Sequence[int], expected: Sequence[int]) -> str:
    """Describe the first difference of two prompts."""
    shorter = min(len(rendered), len(expected))
    at = next((place for place in range(shorter) if rendered[place] != expected[place]), shorter)
    theirs, ours = (_names(user, tokens[at : at + 1]) or "the end" for tokens in (rendered, expected))
    return (
        f"the prompt is not made of segments that stay what they are: token {at} is {theirs} in the user's prompt and "
        f"{ours} where prefix, items, separators and suffix are joined"
    )


def _names(user: UserPrompt, tokens: Sequence[int]) -> str:
    return " ".join(
        f"{name!r} ({token})"
        for name, token in zip(user.tokenizer.convert_ids_to_tokens(list(tokens)), tokens, strict=True)
    )
