"""The prompts of a bundle's users as their authors write them, for a comparison with the bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.bundle.manifest import Bundle
from atspeed.importing.checkpoint import Source
from atspeed.importing.code_tokens import SpelledItems, name_tokens
from atspeed.importing.errors import ImportingError
from atspeed.importing.index import read_index
from atspeed.importing.layouts import PromptLayout, read_layout
from atspeed.importing.user_prompt import UserPrompt, user_prompt


def authors_prompt(
    bundle: Bundle, prompt: str, tokenizer: Path, index: Path | None
) -> Callable[[Sequence[str]], list[int]]:
    """Return the function from a history of item ids to the tokens of its prompt.

    Args:
        bundle: the bundle, for its items.
        prompt: the name of a layout, or a file.
        tokenizer: the folder of the tokenizer.
        index: the index file that names the codes; None: the tokenizer names the code tokens of the bundle.

    Raises ImportingError when the tokens of an item are not those of the index.
    """
    layout, loaded = read_layout(prompt), Source(tokenizer).tokenizer()
    entry, catalogue = bundle.model("target"), bundle.catalogue()
    if index is None:
        return user_prompt(layout, loaded, catalogue, entry.code_tokens).tokens
    spelled = _spelled(bundle, index, layout, loaded)
    items = np.arange(catalogue.items)
    for item, ours in zip(items.tolist(), catalogue.spelled_tokens(items, entry.code_tokens), strict=True):
        name = catalogue.id_of(item)
        if name not in spelled.index.rows:
            raise ImportingError(f"{index}: item {shown(name)} of {bundle.root} is missing")
        theirs = spelled.tokens(name)
        if theirs.tolist() != ours.tolist():
            pair = (" ".join(map(str, tokens.tolist())) for tokens in (theirs, ours))
            raise ImportingError(
                f"{index}: item {shown(name)}: {spelled.text(name)} is {' and the bundle has '.join(pair)}"
            )
    return UserPrompt(layout, loaded, spelled.text).tokens


def _spelled(bundle: Bundle, index: Path, layout: PromptLayout, tokenizer: object) -> SpelledItems:
    read = read_index(index, layout)
    return SpelledItems(read, name_tokens(read, tokenizer, bundle.model("target").vocab_size))
