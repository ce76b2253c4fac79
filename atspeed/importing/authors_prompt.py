"""The prompts of a bundle as their authors write them, for a comparison with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.bundle.user_fields import UserFields
from atspeed.engine.search.trie import ENDED
from atspeed.importing.checkpoint import Source
from atspeed.importing.code_tokens import SpelledItems, name_tokens
from atspeed.importing.errors import ImportingError
from atspeed.importing.index import Index, read_index
from atspeed.importing.items import item_fields, read_items
from atspeed.importing.layouts import read_layout
from atspeed.importing.user_prompt import UserPrompt, user_prompt


@dataclass(frozen=True)
class AuthorsPrompt:
    """A prompt as the authors write it.

    Attributes:
        user: renders histories of item ids.
        tail: the names of the tokens that its layout scores behind the codes.
        bundle_tail: the names of those that the bundle scores.
        items: the items of the index; empty without one.
        user_fields: the values of a user that a history stands for.
    """

    user: UserPrompt
    tail: tuple[str, ...]
    bundle_tail: tuple[str, ...]
    items: frozenset[str] = frozenset()
    user_fields: Callable[[Sequence[str]], UserFields] = lambda _: {}

    def tokens(self, history: Sequence[str]) -> list[int]:
        """Return the token ids of a history's prompt."""
        return self.user.tokens(history, self.user_fields(history))


@dataclass(frozen=True)
class AuthorsFiles:
    """The files of a prompt.

    Attributes:
        prompt: the name of a layout, or a file.
        tokenizer: the checkpoint, or the folder, whose tokenizer it is.
        index: the index file that names the codes; None: the tokenizer names the code tokens of the bundle.
        items: the item file with the fields that the prompt holds.
        changes: fields that take the place of the layout's own.
    """

    prompt: str
    tokenizer: Source
    index: Path | None = None
    items: Path | None = None
    changes: dict[str, Any] = field(default_factory=dict)


def authors_prompt(
    bundle: Bundle, files: AuthorsFiles, user_fields: Callable[[Sequence[str]], UserFields] = lambda _: {}
) -> AuthorsPrompt:
    """Return the authors' prompt for the items of a bundle.

    user_fields: the values of a user that a history stands for. Raises ImportingError when the tokens of an item are not those
    of the index, when an item lacks a field, and when the prompt holds fields of users that the bundle's lacks.
    """
    layout, tokenizer = read_layout(files.prompt, files.changes), files.tokenizer.tokenizer()
    entry, catalogue = bundle.model("target"), bundle.catalogue()
    known = {field.name for field in entry.prompt.user_fields}
    if lacking := [name for name in layout.user_fields if name not in known]:
        raise ImportingError(f"{files.prompt}: {{{lacking[0]}}} is no field of users in the prompts of {bundle.root}")
    index = read_index(files.index, layout) if files.index else None
    served = map(catalogue.id_of, range(catalogue.items)) if layout.fields else ()
    titles = index.titles_by_item if index else {}
    held = item_fields(layout.fields, titles, read_items(files.items) if files.items else {}, files.items, served)

    def fields(item: str) -> dict[str, str]:
        return held.get(item, {})

    if index is None:
        user = user_prompt(layout, tokenizer, catalogue, entry.code_tokens, fields)
        return replace(_with_tails(user, bundle, catalogue), user_fields=user_fields)
    spelled = SpelledItems(index, name_tokens(index, tokenizer, entry.vocab_size))
    _check_items(bundle, catalogue, spelled)
    written = _with_tails(UserPrompt(layout, tokenizer, spelled.text, fields), bundle, catalogue, index)
    return replace(written, user_fields=user_fields)


def _check_items(bundle: Bundle, catalogue: Catalogue, spelled: SpelledItems) -> None:
    """Raise ImportingError, naming an item, when its tokens are not those of the index."""
    items, index = np.arange(catalogue.items), spelled.index
    tokens = catalogue.spelled_tokens(items, bundle.model("target").code_tokens)
    for item, ours in zip(items.tolist(), tokens, strict=True):
        name = catalogue.id_of(item)
        if name not in index.rows:
            raise ImportingError(f"{index.path}: item {shown(name)} of {bundle.root} is missing")
        theirs = spelled.tokens(name)
        if theirs.tolist() != ours.tolist():
            pair = (" ".join(map(str, tokens.tolist())) for tokens in (theirs, ours))
            raise ImportingError(
                f"{index.path}: item {shown(name)}: {spelled.text(name)} is {' and the bundle has '.join(pair)}"
            )


def _with_tails(user: UserPrompt, bundle: Bundle, catalogue: Catalogue, index: Index | None = None) -> AuthorsPrompt:
    """Return the prompt with the tails of the first item. All items of a layout have the same."""
    tokens = np.asarray(bundle.model("target").code_tokens)
    path = catalogue.codes[0]
    whole = tokens[(path + catalogue.trie.codebook_offset)[path != ENDED]].tolist()
    codes = int(catalogue.spelled_lengths(np.array([0]))[0])
    theirs = user.tail(user.semantic_id(catalogue.id_of(0)))
    tail, bundle_tail = (tuple(user.tokenizer.convert_ids_to_tokens(tail[codes:])) for tail in (theirs, whole))
    return AuthorsPrompt(user, tail, bundle_tail, frozenset(index.rows) if index else frozenset())
