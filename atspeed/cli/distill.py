"""`atspeed distill`: a draft for the target of a bundle."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from atspeed.cli.options import AsJson, CheckpointMinutes, Minutes, Threads, optional, print_result
from atspeed.engine.bundle.bundle import Bundle


def distill(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.", exists=True, file_okay=False)],
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="The Hugging Face checkpoint that the target was exported from.", exists=True, file_okay=False
        ),
    ],
    histories: Annotated[
        Path,
        typer.Option(
            help="Histories to learn from: .csv, .jsonl, inter.json, or a user and items per line.",
            exists=True,
            dir_okay=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new bundle.", file_okay=False)],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe file of the draft; see docs/training.md.", exists=True, dir_okay=False),
    ] = None,
    run_folder: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; a run in it is resumed.  [default: OUT-run]", file_okay=False),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter that was imported with it.", exists=True, file_okay=False)
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Base that it was imported with, as a delta.", exists=True, file_okay=False)
    ] = None,
    threads: Threads = None,
    minutes: Minutes = None,
    checkpoint_minutes: CheckpointMinutes = 5.0,
    as_json: AsJson = False,
) -> None:
    """Train a draft for the target of a bundle, and write a bundle with both. The target stays as it is."""
    checkpoints = optional("atspeed.training.checkpoints").Checkpoints.within(minutes, checkpoint_minutes)
    settings = optional("atspeed.training.recipe").read_distill_recipe(recipe)
    opened = Bundle(bundle)
    known = opened.catalogue().known_ids()
    read = optional("atspeed.importing.histories").histories_of(histories, known, bundle, with_targets=True)
    source = optional("atspeed.importing.checkpoint").Source(checkpoint, adapter=adapter, base=base)
    source.config()
    distillation = optional("atspeed.training.distillation")
    target = distillation.GivenTarget(
        opened, partial(source.load, opened.manifest.target.vocab_size), str(checkpoint), source.digest()
    )
    place = run_folder or out.resolve().with_name(f"{out.resolve().name}-run")
    with checkpoints.stop_at_signals():
        written = distillation.distill(
            target, read, settings, out, place, source=histories.name, threads=threads, checkpoints=checkpoints
        )
    if optional("atspeed.training.processes").is_main():
        print_result(str(written), {"bundle": written}, as_json=as_json)
