"""Imports a checkpoint as a bundle without a draft. All files are read and compared before the weights are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from transformers import PreTrainedModel

from atspeed.engine.bundle.bundle_files import sha256_of
from atspeed.engine.bundle.catalogue_update import CODE_NAMES
from atspeed.engine.bundle.manifest import Manifest, Provenance, hash_files, write_manifest
from atspeed.engine.bundle.prompts import texts_folder
from atspeed.engine.files.json_file import write_json
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.importing.errors import ImportingError
from atspeed.importing.reading import ImportChoices, ImportFiles, ReadFiles, read_files
from atspeed.training.bundles import entry_of, versions
from atspeed.training.errors import ExportError
from atspeed.training.export import export_decoder, head_of
from atspeed.training.models import SpelledModel
from atspeed.training.stages import partial_of, remove


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
    if read.texts is not None:
        read.texts.save(folder / texts_folder("target"))
    report = export_decoder(
        model,
        folder / "target",
        code_tokens=read.spelling.code_tokens,
        precision=choices.precision,
        prompt=read.spelling.prompt,
        head=head_of(choices.scoring_rule),
        texts=read.texts,
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
    if files.user_fields:
        imported["user_fields_sha256"] = sha256_of(files.user_fields.parent, files.user_fields.name)
    for name, folder in (("adapter", source.adapter), ("base", source.base)):
        if folder:
            imported[name] = folder.resolve().name
    return Provenance(imported=imported, versions=versions())
