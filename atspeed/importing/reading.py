"""Reads the files of an import, but the weights, and compares the prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.item_texts import ItemTexts
from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.errors import CatalogueError
from atspeed.engine.search.scoring import ScoringRule
from atspeed.importing.checkpoint import Source
from atspeed.importing.code_tokens import (
    CodeColumns,
    SpelledItems,
    check_labels,
    code_columns,
    name_tokens,
    tail_tokens,
)
from atspeed.importing.errors import ImportingError
from atspeed.importing.histories import History, read_histories
from atspeed.importing.index import Index, check_lengths, read_index
from atspeed.importing.item_texts import split_texts
from atspeed.importing.items import item_fields, popularity_rank, read_items, served_rows
from atspeed.importing.layouts import PromptLayout
from atspeed.importing.template import ItemSpelling, check_prompts, split_prompt
from atspeed.importing.user_fields import FieldValues, read_user_fields, split_user_fields
from atspeed.importing.user_prompt import UserPrompt
from atspeed.training.architectures import max_positions
from atspeed.training.sequences import Spelling


@dataclass(frozen=True)
class ImportFiles:
    """The files of an import.

    Attributes:
        source: the checkpoint.
        index: the codes of the items.
        histories: histories on which prompts are compared.
        items: the items to serve; all of the index without it.
        popularity: a file or a column.
        user_fields: users with the fields that prompts hold.
    """

    source: Source
    index: Path
    histories: Path
    items: Path | None = None
    popularity: str | None = None
    user_fields: Path | None = None


@dataclass(frozen=True)
class ImportChoices:
    """How a checkpoint is served.

    Attributes:
        name: the name of the bundle.
        layout: the prompt.
        layout_name: where it comes from, for the manifest.
        precision: the number format of the weights.
        scoring_rule: over which tokens log-probabilities are normalised.
        unequal_paths: whether items may have paths of other lengths.
        items_per_path: how many items of one path a list may hold.
    """

    name: str
    layout: PromptLayout
    layout_name: str
    precision: Precision = "float32"
    scoring_rule: ScoringRule = ScoringRule.VOCAB
    unequal_paths: bool = False
    items_per_path: int | None = None


@dataclass(frozen=True)
class ReadFiles:
    """The files that were read and compared before the weights.

    Attributes:
        catalogue: the catalogue.
        spelling: the tokens of prompts and codes.
        tail: the names of the tokens that are scored behind the codes.
        prompts: the histories whose prompts are the user's.
        unserved: those with an item that is not served. Served prompts leave it out.
        tokenizer: the tokenizer.
        texts: the texts of items, if prompts hold more than their codes.
    """

    catalogue: Catalogue
    spelling: Spelling
    tail: tuple[str, ...]
    prompts: int
    unserved: int
    tokenizer: Any
    texts: ItemTexts | None = None


def read_files(files: ImportFiles, choices: ImportChoices) -> ReadFiles:
    """Read everything but the weights, and compare the prompts. Raises ImportingError or ExportError."""
    config = files.source.config()
    layout = choices.layout
    users = read_user_fields(files.user_fields, layout)
    index = read_index(files.index, layout)
    check_lengths(index, unequal=choices.unequal_paths)
    check_labels(index)
    items = read_items(files.items) if files.items else {}
    rows = served_rows(index, items, files.items)
    rank = popularity_rank(files.popularity, index, items, rows) if files.popularity else None
    histories = read_histories(files.histories, index)
    tokenizer = files.source.tokenizer()
    vocab_size = files.source.rows(config, tokenizer)
    tokens = name_tokens(index, tokenizer, vocab_size)
    spelled = SpelledItems(index, tokens)
    read = dict.fromkeys(chain((index.ids[row] for row in rows.tolist()), *histories.values()))
    fields = item_fields(layout.fields, index.titles_by_item if layout.fields else {}, items, files.items, read)
    user = UserPrompt(layout, tokenizer, spelled.text, lambda item: fields.get(item, {}), users.first)
    tail = tail_tokens(user, spelled)
    columns = code_columns(index, tokens, tail)
    catalogue = _catalogue(index, columns, rows, rank)
    template, spelling, texts = _template(user, spelled, list(read), histories)
    template = _with_user_fields(user, template, spelling, users, histories)
    prompts = check_prompts(user, template, spelling, histories, files.histories, users.users)
    if texts is not None:
        texts = _in_order(texts, read, catalogue)
        template = template.model_copy(update={"texts": texts.entry(catalogue.version)})
    tokens_of = _spelling(columns, template, tokenizer, vocab_size, texts)
    _check_fits(config, tokens_of, catalogue)
    unserved = sum(bool((catalogue.find(history) < 0).any()) for history in histories.values())
    names = tuple(tokenizer.convert_ids_to_tokens(tail))
    return ReadFiles(catalogue, tokens_of, names, prompts, unserved, tokenizer, texts)


def _template(
    user: UserPrompt, spelled: SpelledItems, items: list[str], histories: dict[str, History]
) -> tuple[PromptTemplate, ItemSpelling, ItemTexts | None]:
    """Return the template with the first values of users, the tokens of items, and the texts of `items` if prompts hold any."""
    if not user.layout.fields:
        template = split_prompt(user, spelled.tokens, next(iter(histories.values()))[0])
        return template, ItemSpelling(spelled.tokens, spelled.tokens), None
    template, texts = split_texts(user, items)
    return template, ItemSpelling.of_texts(texts, {item: row for row, item in enumerate(items)}), texts


def _with_user_fields(
    user: UserPrompt,
    template: PromptTemplate,
    spelling: ItemSpelling,
    users: FieldValues,
    histories: dict[str, History],
) -> PromptTemplate:
    """Return the template with all values of the users' fields."""
    if not users.values:
        return template
    history = next(iter(histories.values()))
    window = history[template.window_start(len(history)) :]
    return split_user_fields(user, template, users, window, spelling.window(window))


def _in_order(texts: ItemTexts, items: Iterable[str], catalogue: Catalogue) -> ItemTexts:
    """Return the texts of the catalogue's items, in its order."""
    place = catalogue.find(items)
    rows = np.empty(catalogue.items, dtype=np.int64)
    rows[place[place >= 0]] = np.flatnonzero(place >= 0)
    return texts.take(rows)


def _catalogue(index: Index, columns: CodeColumns, rows: Int64, rank: Int64 | None) -> Catalogue:
    ids = [index.ids[row] for row in rows.tolist()]
    try:
        return Catalogue.build(ids, columns.codes[rows], columns.sizes, tail_start=columns.tail_start, rank=rank)
    except CatalogueError as error:
        raise ImportingError(f"{index.path}: {error}") from error


def _spelling(
    columns: CodeColumns, template: PromptTemplate, tokenizer: Any, vocab_size: int, texts: ItemTexts | None
) -> Spelling:
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    around = (*template.fixed_tokens, *columns.tokens, *(texts.distinct().tolist() if texts else ()))
    if (largest := max(around)) >= vocab_size:
        name = tokenizer.convert_ids_to_tokens(largest)
        raise ImportingError(f"prompt: token {name!r} is {largest}, but the embedding has {vocab_size} rows")
    return Spelling(
        code_tokens=columns.tokens,
        prompt=template,
        pad_token=next(token for token in pads if token is not None),
        vocab_size=vocab_size,
    )


def _check_fits(config: Any, spelling: Spelling, catalogue: Catalogue) -> None:
    """Raise ImportingError when the longest prompt with its codes has more tokens than the model has positions.

    A prompt without an item must hold a token, too.
    """
    template = spelling.prompt
    if not template.prefix and not (config.is_encoder_decoder and template.suffix):
        raise ImportingError("prompt: no token stands before the history, and a decoder must begin with one")
    longest = spelling.prompt.max_tokens(catalogue.longest_spelling) + catalogue.trie.levels - 1
    if longest > max_positions(config):
        raise ImportingError(
            f"prompt: {spelling.prompt.max_items} items take up to {longest} tokens, the model has "
            f"{max_positions(config)} positions; --max-items takes fewer"
        )
