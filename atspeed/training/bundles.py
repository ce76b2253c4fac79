"""Writes a bundle: exported models, catalogue and manifest, in one step."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

from atspeed.engine.bundle.bundle_files import link_or_copy
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import (
    EncoderEntry,
    Manifest,
    ModelEntry,
    Provenance,
    Role,
    fingerprint,
    hash_files,
    read_manifest,
    write_manifest,
)
from atspeed.engine.files.json_file import finite
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.engine.model.encoder_decoder import ENCODER_FILE
from atspeed.training.data import Dataset
from atspeed.training.export import MODEL_FILE, ExportReport, export_decoder
from atspeed.training.models import SpelledModel
from atspeed.training.recipe import Recipe
from atspeed.training.stages import Measures, remove


def write_bundle(
    folder: Path,
    recipe: Recipe,
    catalogue: Catalogue,
    models: Mapping[Role, SpelledModel],
    *,
    scales: tuple[float, ...] | None,
    provenance: Provenance,
    target_from: Path | None = None,
) -> None:
    """Write a recipe's bundle. It appears in one step.

    Args:
        folder: the folder of the bundle.
        recipe: the recipe of the run.
        catalogue: the catalogue.
        models: the trained models by role.
        scales: the draft's plan scales.
        provenance: the origin that the manifest records.
        target_from: a bundle with the same catalogue and target, whose files this bundle shares.
    """
    partial = folder.with_suffix(".partial")
    remove(partial)
    if target_from is None:
        catalogue.save(partial / "catalogue")
    else:
        for part in ("catalogue", "target"):
            share_files(target_from / part, partial / part)
    exported = {role: model for role, model in models.items() if role != "target" or target_from is None}
    reports = {role: _export(role, model, recipe, partial) for role, model in exported.items()}
    files = hash_files(partial)
    entries = {role: entry_of(role, models[role], report, files) for role, report in reports.items()}
    if target_from is not None:
        entries["target"] = read_manifest(target_from).target
    if scales is not None:
        entries["draft"] = entries["draft"].model_copy(update={"plan_scale": scales})
    manifest = Manifest(
        name=recipe.name,
        scoring_rule=recipe.scoring_rule,
        allow_empty_history=recipe.allow_empty_history,
        catalogue_version=catalogue.version,
        target=entries["target"],
        draft=entries.get("draft"),
        provenance=provenance,
        files=files,
    )
    write_manifest(partial, manifest)
    verify_bundle(partial, passes=False)  # each export has run passes over its tokens
    remove(folder)
    partial.rename(folder)


def provenance_of(recipe: Recipe, dataset: Dataset, measures: Measures) -> Provenance:
    """Describe the origin of a bundle. measures: the results of its evaluation, empty without one."""
    return Provenance(
        recipe=recipe.model_dump_json(),
        data=f"{dataset.name} ({dataset.digest})",
        terms=dataset.terms,
        versions=versions(),
        metrics={name: round(value, 6) for name, value in finite(measures).items()},
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that trained the bundle."""
    names = ("atspeed-serving", "faiss-cpu", "numpy", "onnx", "tokenizers", "torch", "transformers")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def share_files(source: Path, folder: Path) -> None:
    """Link the files of a folder into another one, or copy them; see `link_or_copy`."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        link_or_copy(path, folder / path.name)


def _export(role: Role, model: SpelledModel, recipe: Recipe, bundle: Path) -> ExportReport:
    part = recipe.parts[role]
    spelling = model.spelling
    return export_decoder(
        model.model,
        bundle / role,
        code_tokens=spelling.code_tokens,
        precision=part.precision,
        prompt=spelling.prompt,
    )


def entry_of(role: Role, model: SpelledModel, report: ExportReport, files: Mapping[str, str]) -> ModelEntry:
    """Build the manifest's entry of an exported model. files: the bundle's hashes."""
    encoder = None
    if report.decoder_start is not None:
        encoder = EncoderEntry(path=f"{role}/{ENCODER_FILE}", decoder_start=report.decoder_start)
    return ModelEntry(
        path=f"{role}/{MODEL_FILE}",
        architecture=report.architecture,
        precision=report.precision,
        parameters=report.parameters,
        vocab_size=report.vocab_size,
        layers=report.layers,
        kv_heads=report.kv_heads,
        head_dim=report.head_dim,
        max_positions=report.max_positions,
        code_tokens=model.spelling.code_tokens,
        prompt=model.spelling.prompt,
        fingerprint=fingerprint(dict(files), role),
        encoder=encoder,
    )
