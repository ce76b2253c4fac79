"""Commands of the studies that train drafts: draft-kinds, losses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atspeed.benchmarks.results import terminal_table, to_json
from atspeed.cli.bench.options import JsonFile, PageFolder, Seed, Threads, Users, print_identity, save
from atspeed.cli.options import MAX_THREADS, MAX_USERS, CheckpointMinutes, CommandError, Minutes, optional, out
from atspeed.engine.bundle.bundle import Bundle
from research import acceptance, draft_kinds
from research.acceptance import AcceptanceRow
from research.eval_examples import choose_cases

Comparison = Annotated[
    Path,
    typer.Argument(help="File of drafts; see runs/movielens-losses.toml.", exists=True, dir_okay=False),
]
RunFolder = Annotated[
    Path,
    typer.Option(help="Folder of the base recipe's run, which continues where it was stopped.", file_okay=False),
]
RunData = Annotated[Path | None, typer.Option(help="The data that the run's recipe reads.")]
Workers = Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="Processes that train and count.")]


def run_draft_kinds(
    comparison: Comparison,
    run_folder: RunFolder,
    data: RunData = None,
    users: Users = 1000,
    timed: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Users whose plans are timed.")] = 50,
    target_state: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Also train heads of this size on the target's own state.")
    ] = None,
    workers: Workers = 1,
    threads: Threads = 1,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Train drafts of several kinds alike; count target passes and time plans; exits with 1 if a strict list differs."""
    compared, pipeline = optional("atspeed.training.compared_drafts"), optional("atspeed.training.pipeline")
    optional("transformers.utils.logging").disable_progress_bar()
    plan = optional("atspeed.training.comparison").read_comparison(comparison)
    run_folder.mkdir(parents=True, exist_ok=True)
    trained = compared.train_drafts(plan, run_folder, data, workers=workers, threads=threads)
    bundles = {name: Bundle(folder) for name, folder in trained.bundles.items()}
    opened, dataset = next(iter(bundles.values())), pipeline.load_dataset(plan.base, data)
    allow_empty = plan.base.allow_empty_history
    cases = choose_cases(dataset, opened.catalogue(), allow_empty=allow_empty, users=users, seed=seed)
    config = draft_kinds.DraftKindsConfig(timed=timed, seed=seed, workers=workers, threads=threads)
    counted, described = draft_kinds.count_passes(bundles, cases, config), draft_kinds.describe(bundles, cases, config)
    out.print(acceptance.tables(counted))
    out.print(terminal_table("Drafts", draft_kinds.COLUMNS, described))
    on_target = []
    if target_state:
        study_of_state = optional("research.target_state")
        on_target = study_of_state.run(plan, run_folder, (data, dataset), opened, target_state, cases, config)
        out.print(terminal_table("Heads on the target's state", study_of_state.COLUMNS, on_target))
    about = draft_kinds.header(config, data=dataset.name, users=len(cases))
    rows = to_json(described, kind=draft_kinds.NAME)
    rows += [{"kind": acceptance.NAME, **row} for row in acceptance.rows_to_json(counted)]
    rows += to_json(on_target, kind=draft_kinds.TARGET_STATE)
    save(json_file, opened, seed, rows, about, page=(report, "research.draft_kinds_report"))
    _refuse_different(counted)


def run_losses(
    comparison: Comparison,
    run_folder: RunFolder,
    data: RunData = None,
    users: Users = 1000,
    workers: Workers = 1,
    threads: Threads = 1,
    minutes: Minutes = None,
    checkpoint_minutes: CheckpointMinutes = 5.0,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Train drafts by several losses, each at its best setting; count target passes; exits with 1 if a strict list differs.

    --minutes, SIGTERM and Ctrl-C stop the training, which the same command continues. --seed draws the test users.
    """
    checkpoints = optional("atspeed.training.checkpoints").Checkpoints.within(minutes, checkpoint_minutes)
    compared, losses = optional("atspeed.training.compared_drafts"), optional("research.losses")
    optional("transformers.utils.logging").disable_progress_bar()
    plan = optional("atspeed.training.comparison").read_comparison(comparison)
    run_folder.mkdir(parents=True, exist_ok=True)
    with checkpoints.stop_at_signals():
        trained = compared.train_drafts(
            plan, run_folder, data, workers=workers, threads=threads, checkpoints=checkpoints
        )
    bundles = {name: Bundle(folder) for name, folder in trained.bundles.items()}
    opened = next(iter(bundles.values()))
    dataset = optional("atspeed.training.pipeline").load_dataset(plan.base, data)
    allow_empty = plan.base.allow_empty_history
    cases = choose_cases(dataset, opened.catalogue(), allow_empty=allow_empty, users=users, seed=seed)
    settings = losses.setting_rows(trained.candidates)
    out.print(terminal_table("Settings on validation users", losses.COLUMNS, settings))
    counted = losses.count_passes(bundles, cases, seed=seed, workers=workers, threads=threads)
    out.print(acceptance.tables(counted))
    rows = to_json(settings, kind=losses.NAME)
    rows += [{"kind": acceptance.NAME, **row} for row in acceptance.rows_to_json(counted)]
    about = losses.header(plan, data=dataset.name, users=len(cases))
    save(json_file, opened, seed, rows, about, page=(report, "research.losses_report"))
    _refuse_different(counted)


def _refuse_different(counted: list[AcceptanceRow]) -> None:
    """Print how many lists are the target's own. Raises CommandError if one differs beyond near-ties."""
    exact = [row for row in counted if row.promises_identity]
    print_identity(acceptance.REFERENCE, exact)
    if different := sum(row.different for row in exact):
        raise CommandError(f"{different} lists differ from the target's own beyond near-ties")
