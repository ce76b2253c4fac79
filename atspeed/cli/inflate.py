"""`atspeed inflate`: larger models that compute the same, for benchmarks of cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from atspeed.cli.options import MAX_SEED, AsJson, optional, print_result
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import Precision

# Sizes are those of `atspeed.training.inflation.SHAPES`.
TargetShape = Literal["85m", "0.5b", "1.7b", "7b"]
DraftShape = Literal["keep", "8m", "68m"]


def inflate(
    bundle: Annotated[
        Path,
        typer.Argument(help="Bundle that `atspeed train` wrote beside its checkpoints.", exists=True, file_okay=False),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the new bundle and its checkpoints.", file_okay=False)],
    shape: Annotated[
        TargetShape,
        typer.Option(help="Sizes of the target: 12 layers x 768; Qwen3-0.6B's layers; Qwen3-1.7B's sizes; LLaMA-7B's."),
    ],
    draft_shape: Annotated[
        DraftShape, typer.Option(help="Sizes of the draft: 4 layers x 384; LLaMA-68M's sizes.")
    ] = "keep",
    target_checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint that the target was exported from.  [default: target-checkpoint beside BUNDLE]",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    draft_checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint that the draft was exported from.  [default: draft-checkpoint beside BUNDLE]",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Number format of weights.")] = "float32",
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the added random weights, which change no score.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Inflate the models of a bundle: the same lists at the cost of a larger model. Writes OUT/bundle and its checkpoints."""
    inflated, shapes = optional("atspeed.training.inflated_bundles"), optional("atspeed.training.inflation").SHAPES
    optional("transformers.utils.logging").disable_progress_bar()
    beside = bundle.resolve().parent
    inflations = {"target": inflated.Inflation(target_checkpoint or beside / "target-checkpoint", shapes[shape])}
    if draft_shape != "keep":
        checkpoint = draft_checkpoint or beside / "draft-checkpoint"
        inflations["draft"] = inflated.Inflation(checkpoint, shapes[draft_shape])
    label = shape if draft_shape == "keep" else f"{shape}-{draft_shape}"
    folder = inflated.inflate_bundle(Bundle(bundle), out, inflations, label=label, precision=precision, seed=seed)
    print_result(str(folder), {"bundle": folder}, as_json=as_json)
