"""Imports a checkpoint as a bundle without a draft. All files are read and compared before the weights are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.bundle_files import sha256_of
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.catalogue_update import CODE_NAMES
from atspeed.engine.bundle.manifest import Manifest, Precision, Provenance, hash_files, write_manifest
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.errors import CatalogueError
from atspeed.engine.files.json_file import write_json
from atspeed.engine.model.bundle_check import verify_bundle
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
from atspeed.importing.histories import read_histories
from atspeed.importing.index import Index, check_lengths, read_index
from atspeed.importing.items import popularity_rank, read_items, served_rows
from atspeed.importing.layouts import PromptLayout
from atspeed.importing.template import check_prompts, split_prompt
from atspeed.importing.user_prompt import UserPrompt
from atspeed.training.bundles import entry_of, versions
from atspeed.training.export import ExportError, check_precision, export_decoder, head_of, max_positions
from atspeed.training.models import SpelledModel
from atspeed.training.sequences import Spelling
from atspeed.training.stages import partial_of, remove


@dataclass(frozen=True)
class ImportFiles:
    """The files of an import.

    Attributes:
        source: the checkpoint.
        index: the codes of the items.
        histories: histories on which prompts are compared.
        items: the items to serve; all of the index without it.
        popularity: a file or a column.
    """

    source: Source
    index: Path
    histories: Path
    items: Path | None = None
    popularity: str | None = None


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
    """

    catalogue: Catalogue
    spelling: Spelling
    tail: tuple[str, ...]
    prompts: int
    unserved: int
    tokenizer: Any


def import_checkpoint(
    files: ImportFiles, choices: ImportChoices, out: Path, *, save_checkpoint: Path | None = None
) -> tuple[ReadFiles, Manifest]:
    """Write the bundle `out`, which appears in one step. Return what was read, and the manifest.

    save_checkpoint: a folder for the model as it was exported, with its tokenizer. Other commands need it where an adapter or
    a base was applied. Raises ImportingError, ExportError or BundleError.
    """
    _check_folders(out, save_checkpoint)
    read = read_files(files, choices)
    with _appearing(out) as partial, _appearing(save_checkpoint) if save_checkpoint else nullcontext() as saved:
        model = files.source.load(read.spelling.vocab_size)
        manifest = _write(model, files, choices, read, partial)
        verify_bundle(partial, passes=False)  # the export has run passes over its tokens
        if saved:
            model.save_pretrained(saved)
            read.tokenizer.save_pretrained(saved)
    return read, manifest


def _check_folders(out: Path, save_checkpoint: Path | None) -> None:
    """Raise ImportingError unless both folders are new, and apart."""
    for folder in filter(None, (out, save_checkpoint)):
        if os.path.lexists(folder):
            raise ImportingError(f"{folder}: exists already")
    if save_checkpoint:
        one, other = out.resolve(), save_checkpoint.resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise ImportingError(
                f"--save-checkpoint {save_checkpoint}: must be another folder than --out, and not in it"
            )


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` at the end of the block, and is removed if the block fails.

    It is made before the weights are read, so that a folder that cannot be written is known by then.
    """
    partial = partial_of(folder)
    try:
        remove(partial)  # left by an import that was killed
        partial.mkdir(parents=True)
    except OSError as error:
        raise ImportingError(f"{folder}: not written: {error.strerror or error}") from error
    try:
        yield partial
        partial.rename(folder)
    except ExportError as error:
        raise ExportError(str(error).replace(str(partial), str(folder))) from error
    except OSError as error:
        raise ImportingError(f"{folder}: not written: {error.strerror or error}") from error
    finally:
        remove(partial)


def _write(
    model: PreTrainedModel, files: ImportFiles, choices: ImportChoices, read: ReadFiles, folder: Path
) -> Manifest:
    """Write all files of a bundle, the manifest last."""
    read.catalogue.save(folder / "catalogue")
    write_json(folder / CODE_NAMES, _code_names(read))
    report = export_decoder(
        model,
        folder / "target",
        code_tokens=read.spelling.code_tokens,
        precision=choices.precision,
        prompt=read.spelling.prompt,
        head=head_of(choices.scoring_rule),
    )
    hashes = hash_files(folder)
    manifest = Manifest(
        name=choices.name,
        scoring_rule=choices.scoring_rule,
        items_per_path=choices.items_per_path,
        catalogue_version=read.catalogue.version,
        target=entry_of("target", SpelledModel(model, read.spelling), report, hashes),
        draft=None,
        provenance=_provenance(files, choices, read),
        files=hashes,
    )
    write_manifest(folder, manifest)
    return manifest


def _code_names(read: ReadFiles) -> list[list[str]]:
    """Return the names of each level's codes, without tail codes."""
    names = read.tokenizer.convert_ids_to_tokens(list(read.spelling.code_tokens))
    starts, tails = read.catalogue.trie.codebook_offset.tolist(), read.catalogue.tail_start.tolist()
    levels = [names[start : start + tail] for start, tail in zip(starts, tails, strict=True)]
    return [level for level in levels if level]


def read_files(files: ImportFiles, choices: ImportChoices) -> ReadFiles:
    """Read everything but the weights, and compare the prompts. Raises ImportingError or ExportError."""
    config = files.source.config()
    check_precision(config, choices.precision)
    layout = choices.layout
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
    user = UserPrompt(layout, tokenizer, spelled.text)
    tail = tail_tokens(user, spelled)
    columns = code_columns(index, tokens, tail)
    template = split_prompt(user, spelled.tokens, next(iter(histories.values()))[0])
    prompts = check_prompts(user, template, spelled.tokens, histories, files.histories)
    catalogue = _catalogue(index, columns, rows, rank)
    spelling = _spelling(columns, template, tokenizer, vocab_size)
    _check_fits(config, spelling, catalogue)
    unserved = sum(bool((catalogue.find(history) < 0).any()) for history in histories.values())
    return ReadFiles(catalogue, spelling, tuple(tokenizer.convert_ids_to_tokens(tail)), prompts, unserved, tokenizer)


def _catalogue(index: Index, columns: CodeColumns, rows: Int64, rank: Int64 | None) -> Catalogue:
    ids = [index.ids[row] for row in rows.tolist()]
    try:
        return Catalogue.build(ids, columns.codes[rows], columns.sizes, tail_start=columns.tail_start, rank=rank)
    except CatalogueError as error:
        raise ImportingError(f"{index.path}: {error}") from error


def _spelling(columns: CodeColumns, template: PromptTemplate, tokenizer: Any, vocab_size: int) -> Spelling:
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    around = (*template.prefix, *template.separator, *template.suffix, *columns.tokens)
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


def _provenance(files: ImportFiles, choices: ImportChoices, read: ReadFiles) -> Provenance:
    source = files.source
    imported = {
        "checkpoint": source.checkpoint.resolve().name,
        "checkpoint_sha256": source.digest(),
        "index_sha256": sha256_of(files.index.parent, files.index.name),
        "layout": choices.layout_name,
        "prompt": choices.layout.model_dump_json(),
        "tail": " ".join(map(repr, read.tail)),
        "equal_prompts": str(read.prompts),
    }
    for name, folder in (("adapter", source.adapter), ("base", source.base)):
        if folder:
            imported[name] = folder.resolve().name
    return Provenance(imported=imported, versions=versions())
