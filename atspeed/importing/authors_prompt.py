"""The prompts of a bundle as their authors write them, for a comparison with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.bundle.manifest import Bundle
from atspeed.engine.search.trie import ENDED
from atspeed.importing.checkpoint import Source
from atspeed.importing.code_tokens import SpelledItems, name_tokens
from atspeed.importing.errors import ImportingError
from atspeed.importing.index import read_index
from atspeed.importing.layouts import PromptLayout, read_layout
from atspeed.importing.user_prompt import UserPrompt, user_prompt


@dataclass(frozen=True)
class AuthorsPrompt:
    """A prompt as the authors write it.

    Attributes:
        user: renders histories of item ids.
        tail: the names of the tokens that its layout scores behind the codes.
        bundle_tail: the names of those that the bundle scores.
    """

    user: UserPrompt
    tail: tuple[str, ...]
    bundle_tail: tuple[str, ...]

    def tokens(self, history: Sequence[str]) -> list[int]:
        """Return the token ids of a history's prompt."""
        return self.user.tokens(history)


def authors_prompt(
    bundle: Bundle, prompt: str, tokenizer: Path, index: Path | None, changes: dict[str, Any] | None = None
) -> AuthorsPrompt:
    """Return the authors' prompt for the items of a bundle.

    Args:
        bundle: the bundle, for its items.
        prompt: the name of a layout, or a file.
        tokenizer: the folder of the tokenizer.
        index: the index file that names the codes; None: the tokenizer names the code tokens of the bundle.
        changes: fields that take the place of the layout's own.

    Raises ImportingError when the tokens of an item are not those of the index.
    """
    layout, loaded = read_layout(prompt, changes), Source(tokenizer).tokenizer()
    entry, catalogue = bundle.model("target"), bundle.catalogue()
    if index is None:
        return _with_tails(user_prompt(layout, loaded, catalogue, entry.code_tokens), bundle, catalogue)
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
    return _with_tails(UserPrompt(layout, loaded, spelled.text), bundle, catalogue)


def _with_tails(user: UserPrompt, bundle: Bundle, catalogue: Catalogue) -> AuthorsPrompt:
    """Return the prompt with the tails of the first item. All items of a layout have the same."""
    tokens = np.asarray(bundle.model("target").code_tokens)
    path = catalogue.codes[0]
    whole = tokens[(path + catalogue.trie.codebook_offset)[path != ENDED]].tolist()
    codes = int(catalogue.spelled_lengths(np.array([0]))[0])
    theirs = user.tail(user.semantic_id(catalogue.id_of(0)))
    names = (tuple(user.tokenizer.convert_ids_to_tokens(tail[codes:])) for tail in (theirs, whole))
    return AuthorsPrompt(user, *names)


def _spelled(bundle: Bundle, index: Path, layout: PromptLayout, tokenizer: Any) -> SpelledItems:
    read = read_index(index, layout)
    return SpelledItems(read, name_tokens(read, tokenizer, bundle.model("target").vocab_size))
