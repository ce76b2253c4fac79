"""Inflates a bundle: checkpoints are inflated and exported into a new bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import Head, ModelEntry, Precision, Role, hash_files, link_files, write_manifest
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.training.bundles import entry_of
from atspeed.training.errors import ExportError
from atspeed.training.export import ExportReport, export_decoder, head_of
from atspeed.training.export_checks import TOLERANCE, check_origin
from atspeed.training.inflated_checkpoints import write_inflated
from atspeed.training.inflation import InflationError, ModelShape
from atspeed.training.models import SpelledModel
from atspeed.training.parity import compare_checkpoints
from atspeed.training.stages import remove


@dataclass(frozen=True)
class Inflation:
    """The inflation of one model.

    Attributes:
        checkpoint: the Hugging Face checkpoint from which the bundle's model was exported.
        shape: the sizes of the larger model.
    """

    checkpoint: Path
    shape: ModelShape


def inflate_bundle(
    bundle: Bundle, out: Path, inflations: Mapping[Role, Inflation], *, label: str, precision: Precision, seed: int
) -> Path:
    """Write out/bundle, and out/ROLE-checkpoint for every inflated model. Returns the bundle's path.

    Models without an inflation are kept as they are.

    Args:
        bundle: the trained bundle.
        out: the folder to write into.
        inflations: the inflation of each model to inflate.
        label: the suffix of the bundle's name.
        precision: the number format of the exported weights.
        seed: the seed of the random weights.

    Raises InflationError when a checkpoint does not belong to the bundle or does not fit its shape, or when the bundle or a
    checkpoint is inside `out`.
    """
    manifest = bundle.manifest
    trained = {role: _trained(bundle, role, inflation.checkpoint) for role, inflation in inflations.items()}
    _check_apart(bundle, out, inflations)
    partial, folder = out / "bundle.partial", out / "bundle"
    remove(partial)
    link_files(bundle.root, [name for name in manifest.files if name.partition("/")[0] not in inflations], partial)
    exported = {}
    for role, inflation in inflations.items():
        checkpoint = out / f"{role}-checkpoint"
        remove(checkpoint)
        dtype = getattr(torch, _kept_as(precision))
        write_inflated(trained[role].model, trained[role].spelling, inflation.shape, checkpoint, dtype=dtype, seed=seed)
        head = head_of(manifest.scoring_rule)
        exported[role] = _export(trained[role], checkpoint, partial / role, precision, head)
    files = hash_files(partial)
    entries: dict[str, ModelEntry] = {
        role: entry_of(role, model, report, files).model_copy(update=_kept(bundle.model(role)))
        for role, (model, report) in exported.items()
    }
    name = f"{manifest.name}-inflated-{label}"
    write_manifest(partial, manifest.model_copy(update={"name": name, "files": files, **entries}))
    verify_bundle(partial, passes=False)  # each export has run passes over its tokens
    remove(folder)
    partial.rename(folder)
    return folder


def _check_apart(bundle: Bundle, out: Path, inflations: Mapping[Role, Inflation]) -> None:
    """Raise InflationError when what is written would replace, or stand inside, what is read."""
    written = [out / "bundle", *(out / f"{role}-checkpoint" for role in inflations)]
    read = [bundle.root, *(inflation.checkpoint for inflation in inflations.values())]
    for source in read:
        if any(path.resolve().is_relative_to(source.resolve()) for path in written):
            raise InflationError(f"{out}: would overwrite or corrupt {source}; give another folder")


def _trained(bundle: Bundle, role: Role, checkpoint: Path) -> SpelledModel:
    """Load the checkpoint of a bundle's model. Raises InflationError if it computes something else."""
    entry = bundle.model(role)
    if entry.inflated_from is not None:
        raise InflationError(f"{bundle.root}: its {role} is already inflated")
    model = SpelledModel.load(checkpoint)
    if model.spelling.code_tokens != entry.code_tokens:
        raise InflationError(f"{checkpoint}: not the checkpoint that the {role} of {bundle.root} was exported from")
    try:
        check_origin(model.model, str(checkpoint), bundle, role)
    except ExportError as error:
        raise InflationError(str(error)) from error
    return model


def _export(
    trained: SpelledModel, checkpoint: Path, folder: Path, precision: Precision, head: Head
) -> tuple[SpelledModel, ExportReport]:
    """Load the inflated model, compare it with the trained one, and export it."""
    inflated = SpelledModel.load(checkpoint)
    worst, largest = compare_checkpoints(trained.model, inflated.model, trained.spelling.code_tokens)
    if not worst <= TOLERANCE[_kept_as(precision)] * max(1.0, largest):  # negated, so that NaN fails too
        raise InflationError(
            f"{checkpoint}: differs from the trained model by {worst:.2g} in a logit (the largest is {largest:.2g})"
        )
    spelling = inflated.spelling
    report = export_decoder(
        inflated.model, folder, code_tokens=spelling.code_tokens, precision=precision, prompt=spelling.prompt, head=head
    )
    return inflated, report


def _kept_as(precision: Precision) -> Precision:
    """Return the number format of an inflated checkpoint."""
    return precision if precision in {"float16", "bfloat16"} else "float32"


def _kept(trained: ModelEntry) -> dict[str, object]:
    """Return the fields that the inflated model takes from the trained one. Plan scales fit, as the scores are the same."""
    kept = trained.model_dump(include={"plan_scale", "draft_kind"})
    return {**kept, "inflated_from": trained.parameters}
