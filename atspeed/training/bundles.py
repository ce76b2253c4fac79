"""Writes a bundle: exported models, catalogue and manifest, in one step."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.bundle_files import files_below, sha256_of
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import (
    LANGUAGE_MODEL,
    LEVEL_HEADS,
    DeviceGraphEntry,
    EncoderEntry,
    Manifest,
    ModelEntry,
    Precision,
    Provenance,
    Role,
    fingerprint,
    hash_files,
    link_files,
    write_manifest,
)
from atspeed.engine.bundle.quantiser import FOLDER as QUANTISER
from atspeed.engine.bundle.quantiser import Quantiser
from atspeed.engine.files.json_file import finite
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.engine.model.device_graph import DEVICE_FILE
from atspeed.engine.model.encoder_decoder import ENCODER_FILE
from atspeed.engine.model.level_heads import head_file
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.data import Dataset
from atspeed.training.export import MODEL_FILE, ExportReport, export_decoder, head_of
from atspeed.training.level_heads import LevelHeadsModel
from atspeed.training.level_heads_export import export_level_heads
from atspeed.training.models import SpelledModel
from atspeed.training.recipe import Recipe
from atspeed.training.stages import Measures, partial_of, remove


def write_bundle(
    folder: Path,
    recipe: Recipe,
    catalogue: Catalogue,
    models: Mapping[Role, SpelledModel],
    *,
    scales: tuple[float, ...] | None,
    provenance: Provenance,
    quantiser: Quantiser | None = None,
) -> None:
    """Write a recipe's bundle. It appears in one step.

    Args:
        folder: the folder of the bundle.
        recipe: the recipe of the run.
        catalogue: the catalogue.
        models: the trained models by role.
        scales: the draft's plan scales.
        provenance: the origin that the manifest records.
        quantiser: what gave the items their code paths; None if the data did.
    """
    partial = _partial(folder)
    catalogue.save(partial / "catalogue")
    if quantiser is not None:
        quantiser.save(partial / QUANTISER)
    reports = {
        role: _export(role, model, recipe.parts[role].precision, recipe.scoring_rule, partial)
        for role, model in models.items()
    }
    files = hash_files(partial)
    entries = {role: entry_of(role, models[role], report, files) for role, report in reports.items()}
    if scales is not None:
        entries["draft"] = entries["draft"].model_copy(update={"plan_scale": scales})
    manifest = Manifest(
        name=recipe.name,
        scoring_rule=recipe.scoring_rule,
        allow_empty_history=recipe.allow_empty_history,
        catalogue_version=catalogue.version,
        target=entries["target"],
        draft=entries.get("draft"),
        quantiser=quantiser.entry if quantiser else None,
        provenance=provenance,
        files=files,
    )
    _finish(partial, folder, manifest)


def write_with_draft(
    folder: Path,
    source: Bundle,
    draft: SpelledModel,
    precision: Precision,
    scales: tuple[float, ...] | None,
    **changes: object,
) -> None:
    """Write a bundle of another bundle's target and catalogue, whose files it shares, with a draft. It appears in one step.

    Args:
        folder: the folder of the new bundle.
        source: the other bundle. Its own draft, if there is one, is left out.
        draft: the trained draft.
        precision: the number format of the draft's export.
        scales: the draft's plan scales.
        changes: fields of the manifest that differ.
    """
    partial = _partial(folder)
    left_out = {model.path.partition("/")[0] for model in (source.manifest.draft,) if model}
    kept = {name: digest for name, digest in source.manifest.files.items() if name.partition("/")[0] not in left_out}
    link_files(source.root, kept, partial)
    report = _export("draft", draft, precision, source.manifest.scoring_rule, partial)
    files = kept | {name: sha256_of(partial, name) for name in files_below(partial) if name not in kept}
    entry = entry_of("draft", draft, report, files).model_copy(update={"plan_scale": scales})
    _finish(partial, folder, source.manifest.model_copy(update={"draft": entry, "files": files, **changes}))


def _partial(folder: Path) -> Path:
    """Return an empty place beside a bundle's folder."""
    partial = partial_of(folder)
    remove(partial)
    return partial


def _finish(partial: Path, folder: Path, manifest: Manifest) -> None:
    """Write the manifest, read the bundle back, and move it into its place."""
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


def _export(role: Role, model: SpelledModel, precision: Precision, rule: ScoringRule, bundle: Path) -> ExportReport:
    spelling = model.spelling
    if isinstance(model.model, LevelHeadsModel):
        return export_level_heads(model.model, bundle / role, code_tokens=spelling.code_tokens, prompt=spelling.prompt)
    return export_decoder(
        model.model,
        bundle / role,
        code_tokens=spelling.code_tokens,
        precision=precision,
        prompt=spelling.prompt,
        head=head_of(rule),
    )


def entry_of(role: Role, model: SpelledModel, report: ExportReport, files: Mapping[str, str]) -> ModelEntry:
    """Build the manifest's entry of an exported model. files: the bundle's hashes."""
    encoder = None
    if report.decoder_start is not None:
        encoder = EncoderEntry(path=f"{role}/{ENCODER_FILE}", decoder_start=report.decoder_start)
    device_graph = DeviceGraphEntry(path=f"{role}/{DEVICE_FILE}", head=report.head) if report.head else None
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
        device_graph=device_graph,
        ordered_sums=report.ordered_sums,
        draft_kind=LEVEL_HEADS if report.heads else LANGUAGE_MODEL,
        heads=tuple(f"{role}/{head_file(level)}" for level in range(1, report.heads + 1)),
    )
