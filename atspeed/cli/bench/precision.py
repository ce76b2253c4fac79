"""`atspeed bench precision`: what a number format costs and gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atspeed.cli.bench.options import JsonFile, Page, Seed, save, written
from atspeed.cli.options import MAX_THREADS, MAX_USERS, MAX_WIDTH, optional, out


def bench_precision(
    run_folder: Annotated[Path, typer.Option(help="A finished run of `atspeed train`.", exists=True, file_okay=False)],
    data: Annotated[Path | None, typer.Option(help="The data that the run's recipe reads.")] = None,
    users: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="How many test users.")] = 1000,
    timed: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint to time passes of, say an inflated one; the run's without it.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams.")] = 20,
    threads: Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="Threads of a pass.")] = 1,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: Page = None,
) -> None:
    """Time, size, lists and Recall of a run's target in other number formats, and what company changes in a pass."""
    precisions, pages = optional("atspeed.benchmarks.precision"), optional("atspeed.benchmarks.precision_report")
    recommenders, cases = optional("atspeed.benchmarks.recommenders"), optional("atspeed.benchmarks.eval_examples")
    models = optional("atspeed.training.models")
    optional("transformers.utils.logging").disable_progress_bar()
    run = recommenders.TrainedRun.open(run_folder, data)
    asked = cases.choose_cases(
        run.dataset, run.catalogue, allow_empty=run.recipe.allow_empty_history, users=users, seed=seed
    )
    model = models.SpelledModel.load(run_folder / "target-checkpoint")
    measured = models.SpelledModel.load(timed) if timed else model
    question = precisions.Question(k, threads=threads, seed=seed)
    target = precisions.TrainedTarget(run.bundle, run.catalogue, model)
    rows = precisions.run(target, measured, asked, question)
    out.print(pages.table(rows))
    about = precisions.header(question, timed=f"a target of {measured.parameters:,} parameters")
    result = save(json_file, run.bundle, seed, precisions.to_json(rows), about)
    if report:
        written(pages.write(result, report))
