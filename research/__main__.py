"""Command line of the studies. `python -m research --help` lists them."""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from atspeed.benchmarks.histories import choose_histories
from atspeed.benchmarks.results import terminal_table, to_json
from atspeed.benchmarks.services import progress_bar
from atspeed.cli.bench.options import (
    Histories,
    JsonFile,
    LeastItems,
    MostItems,
    OutFolder,
    PageFolder,
    ResultFile,
    Seed,
    Threads,
    Tolerance,
    Users,
    print_identity,
    save,
    source_of,
    write_report,
)
from atspeed.cli.commands import Commands
from atspeed.cli.options import (
    MAX_EXCLUDED,
    MAX_THREADS,
    MAX_USERS,
    MAX_WIDTH,
    BundleFolder,
    CommandError,
    err,
    optional,
    out,
)
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.search.mode import Mode
from atspeed.training.data import read_atspeed
from research import acceptance, draft_commands, graph_times, plan_sizes
from research.eval_examples import choose_cases
from research.planner_ablation import calibration, fetch, study

PAGES = {
    "acceptance": "research.acceptance_report",
    "draft-kinds": "research.draft_kinds_report",
    "graph-times": "research.graph_times",
    "losses": "research.losses_report",
    "plan-sizes": "research.plan_sizes",
    "recommenders": "research.recommenders",
    "precision": "research.precision",
    "planner": "research.planner_ablation.report",
    "long-histories": "research.long_histories",
}
"""The module that writes a result's page, by the `benchmark` of its header."""

app = Commands(pretty_exceptions_show_locals=False, help="Finished studies. They need the extras train and bench.")

RunFolder = Annotated[Path, typer.Option(help="A finished run of `atspeed train`.", exists=True, file_okay=False)]
RunData = Annotated[Path | None, typer.Option(help="The data that the run's recipe reads.")]


DataFolder = Annotated[
    Path,
    typer.Option(
        help="The data set: a folder with items.jsonl and train/valid/test.txt.", exists=True, file_okay=False
    ),
]


def _speculative(modes: list[Mode] | None) -> list[Mode] | None:
    if Mode.TARGET_ONLY in (modes or ()):
        raise typer.BadParameter("target-only does not speculate: the other modes are compared with it")
    return modes


@app.command("acceptance")
def run_acceptance(
    bundle: BundleFolder,
    data: DataFolder,
    users: Users = 1000,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=BUNDLE", help="Another draft for the same target; GROUP/SEED=BUNDLE for seeds of a group."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the bundle's own draft in the results.")] = "draft",
    k: Annotated[
        list[int] | None,
        typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.  [default: 1 3 5 10 20]"),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Plan size: Nk per level, N/level, N/all.  [default: 2k 40(/level) 120(/all) 240(/all)]"),
    ] = None,
    mode: Annotated[
        list[Mode] | None,
        typer.Option("--mode", "--modes", callback=_speculative, help="Modes.  [default: all that speculate]"),
    ] = None,
    tolerance: Tolerance = 0.1,
    seed: Seed = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="Processes; by default as many as cores.")
    ] = None,
    threads: Threads = 1,
    per_user: Annotated[bool, typer.Option("--per-user", help="Keep every user's numbers in the result.")] = False,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Count target passes by draft, mode, K and plan size; exits with 1 if a strict or exact list differs."""
    opened = Bundle(bundle)
    drafts = acceptance.draft_bundles(opened, name, draft or ())
    config = acceptance.AcceptanceConfig(
        widths=k or acceptance.WIDTHS,
        budgets=[acceptance.parse_budget(label) for label in budget or acceptance.BUDGETS],
        modes=mode or acceptance.MODES,
        tolerance=tolerance,
        seed=seed,
        workers=workers or os.cpu_count() or 1,
        threads=threads,
    )
    dataset, allow_empty = read_atspeed(data), opened.manifest.allow_empty_history
    cases = choose_cases(dataset, opened.catalogue(), allow_empty=allow_empty, users=users, seed=seed)
    begun = time.monotonic()
    rows = acceptance.run(opened, drafts, cases, config)
    seconds = time.monotonic() - begun
    exact = [row for row in rows if row.promises_identity]
    out.print(acceptance.tables(rows))
    print_identity(acceptance.REFERENCE, exact, ", in the modes that promise it")
    about = acceptance.header(drafts, config, data=dataset.name, users=len(cases), seconds=seconds)
    json_rows = acceptance.rows_to_json(rows, per_user=per_user)
    save(json_file, opened, seed, json_rows, about, page=(report, PAGES["acceptance"]))
    if different := sum(row.different for row in exact):
        raise CommandError(f"{different} lists differ from the target's own beyond near-ties")


app.command("draft-kinds")(draft_commands.run_draft_kinds)
app.command("losses")(draft_commands.run_losses)


@app.command("plan-sizes")
def run_plan_sizes(
    bundle: BundleFolder,
    recipe: Annotated[Path, typer.Option(help="Recipe that names the data.", exists=True, dir_okay=False)] = Path(
        "runs/movielens-100k.toml"
    ),
    data: RunData = None,
    users: Users = 1000,
    k: Annotated[
        list[int] | None,
        typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.  [default: 10 20 50]"),
    ] = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Compare sizes of plans by margin with sizes by the draft's confidence; exits with 1 if a list differs."""
    recipes, pipeline = optional("atspeed.training.recipe"), optional("atspeed.training.pipeline")
    opened = Bundle(bundle)
    dataset, allow_empty = pipeline.load_dataset(recipes.read_recipe(recipe), data), opened.manifest.allow_empty_history
    cases = choose_cases(dataset, opened.catalogue(), allow_empty=allow_empty, users=users, seed=seed)
    widths = k or plan_sizes.WIDTHS
    rows = plan_sizes.run(opened, cases, widths)
    out.print(terminal_table("Sizes of plans", plan_sizes.COLUMNS, rows))
    about = plan_sizes.header(dataset.name, len(cases), widths)
    save(json_file, opened, seed, to_json(rows), about, page=(report, PAGES[plan_sizes.NAME]))
    if different := sum(row.users - row.identical for row in rows):
        raise CommandError(f"{different} lists differ from the target's own")


class LibraryMethod(StrEnum):
    """Recommender of a library."""

    SASREC = "sasrec"


@app.command("graph-times")
def run_graph_times(
    first: BundleFolder,
    second: Annotated[
        Path,
        typer.Option(
            help="Bundle with the same catalogue, and models of the same sizes.", exists=True, file_okay=False
        ),
    ],
    histories: Histories = None,
    users: Users = 30,
    least_items: LeastItems = 2,
    most_items: MostItems = None,
    cached: Annotated[
        list[int] | None, typer.Option(min=1, max=MAX_WIDTH, help="Cached tokens of a pass.  [default: 72]")
    ] = None,
    k: Annotated[
        list[int] | None, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.  [default: 10 20]")
    ] = None,
    passes: Annotated[int, typer.Option(min=1, max=10_000, help="Timed passes of each size.")] = 40,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, max=MAX_THREADS, help="Threads of a pass.  [default: 1]")
    ] = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Measure passes and lists of two bundles in turn, such as one target before and after a change of its graph."""
    bundles = (Bundle(first), Bundle(second))
    chosen = choose_histories(
        bundles[0].catalogue(), histories, users, seed, least_items=least_items, most_items=most_items
    )
    config = graph_times.GraphTimesConfig(cached or (72,), passes, k or (10, 20), threads or (1,))
    rows = graph_times.run(bundles, chosen, config)
    out.print(terminal_table("median times, in turn", graph_times.COLUMNS, rows))
    about = graph_times.header(bundles, config, users=len(chosen), histories=source_of(histories))
    save(json_file, bundles[1], seed, to_json(rows), about, page=(report, PAGES["graph-times"]))


@app.command("recommenders")
def run_recommenders(
    run_folder: RunFolder,
    data: RunData = None,
    users: Annotated[
        int | None, typer.Option(min=1, max=MAX_USERS, help="Number of test users; all by default.")
    ] = None,
    trained: Annotated[
        list[LibraryMethod] | None, typer.Option("--with", help="Train this one too (extra `bench`).")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Epochs of SASRec, of which the best is kept.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads; all cores by default.")
    ] = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Measure Recall and NDCG of a run's models, popularity, item-kNN and SASRec on one split, with intervals."""
    recommenders, sasrec = optional("research.recommenders"), optional("research.sasrec")
    if trained:
        sasrec.library()  # fails before the work if it is missing
    if threads:
        optional("torch").set_num_threads(threads)
    optional("transformers.utils.logging").disable_progress_bar()
    opened = recommenders.TrainedRun.open(run_folder, data)
    asked = opened.eval_examples(users, seed)
    methods = list(recommenders.own_methods(opened))
    if trained:
        settings = sasrec.SasRecSettings() if epochs is None else sasrec.SasRecSettings(epochs=epochs)
        err.print(f"training SASRec, {settings.epochs} epochs")
        methods.append(recommenders.sasrec(opened, settings, seed=seed))
    rows = recommenders.run(asked, methods, seed=seed)
    out.print(recommenders.tables(rows))
    about = recommenders.header(opened, methods, users=len(asked))
    json_rows = to_json(rows, omit_none=True)
    save(json_file, opened.bundle, seed, json_rows, about, page=(report, PAGES["recommenders"]))


@app.command("precision")
def run_precision(
    run_folder: RunFolder,
    data: RunData = None,
    users: Users = 1000,
    timed: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint whose passes are timed, such as an inflated one; the run's without it.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams.")] = 20,
    threads: Threads = 1,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Measure time, size, lists and Recall of a run's target in other number formats."""
    precision, recommenders = optional("research.precision"), optional("research.recommenders")
    models = optional("atspeed.training.models")
    optional("transformers.utils.logging").disable_progress_bar()
    run = recommenders.TrainedRun.open(run_folder, data)
    allow_empty = run.recipe.allow_empty_history
    cases = choose_cases(run.dataset, run.catalogue, allow_empty=allow_empty, users=users, seed=seed)
    model = models.SpelledModel.load(run_folder / "target-checkpoint")
    measured = models.SpelledModel.load(timed) if timed else model
    config = precision.PrecisionConfig(k, threads=threads, seed=seed)
    rows = precision.run(precision.TrainedTarget(run.bundle, run.catalogue, model), measured, cases, config)
    out.print(terminal_table(f"Number formats, {len(cases)} users", precision.TERMINAL_COLUMNS, rows))
    about = precision.header(config, timed=f"a target of {measured.parameters:,} parameters")
    save(json_file, run.bundle, seed, to_json(rows), about, page=(report, PAGES["precision"]))


@app.command("planner")
def run_planner(
    benchmarks: Annotated[
        Path, typer.Option(help="Folder with the recorded times and acceptance.", exists=True, file_okay=False)
    ] = Path("docs/benchmarks"),
    k: Annotated[
        list[int] | None,
        typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.  [default: 1 3 5 10 20 50]"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each setting, each with users of its own.")] = 3,
    settle: Annotated[
        int, typer.Option(min=0, max=MAX_USERS, help="Requests before these, from which planners learn.")
    ] = 40,
    users: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Requests that count, of each run.")] = 40,
    workers: Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="Processes.")] = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Compare planners by simulated lists, with recorded times of passes; exits with 1 if a list differs."""
    config = study.StudyConfig(k or study.WIDTHS, seeds, settle, users, workers)
    with progress_bar() as bar:
        task = bar.add_task("planner", total=None)
        rows = study.run(config, benchmarks, lambda done, total: bar.update(task, completed=done, total=total))
    reads = fetch.run(benchmarks)
    out.print(terminal_table("Planners", study.TERMINAL_COLUMNS, rows))
    out.print(terminal_table("Reads of Redis", fetch.COLUMNS, reads))
    found = [*to_json(rows, kind=study.NAME), *to_json(reads, kind=fetch.NAME)]
    found += to_json(calibration.run(benchmarks), kind=calibration.NAME)
    save(json_file, None, 1, found, study.header(config), page=(report, PAGES["planner"]))


@app.command("new-items")
def run_new_items(
    data: DataFolder,
    run_folder: Annotated[
        Path, typer.Option(help="Folder of the training, which continues where it was stopped.", file_okay=False)
    ],
    recipe: Annotated[Path, typer.Option(help="Recipe with quantised codes.", exists=True, dir_okay=False)] = Path(
        "runs/new-items.toml"
    ),
    share: Annotated[float, typer.Option(min=0.001, max=0.9, help="Share of the items that are held out.")] = 0.1,
    items: Annotated[
        int | None, typer.Option(min=20, max=MAX_EXCLUDED, help="Only the most frequent items; all without it.")
    ] = None,
    users: Users = 4000,
    threads: Threads = 1,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Hold items out of a training, encode them, and measure Recall on them beside old items."""
    new_items, recipes = optional("research.new_items"), optional("atspeed.training.recipe")
    optional("transformers.utils.logging").disable_progress_bar()
    read = recipes.read_recipe(recipe)
    if read.codes.kind != "quantised":
        raise CommandError(f"{recipe}: codes.kind: {read.codes.kind}, but new items need quantised codes")
    dataset, config = read_atspeed(data), new_items.NewItemsConfig(share, items, users, seed, threads)
    rows = new_items.run(dataset, read, run_folder, config)
    out.print(terminal_table("Items that training has not seen", new_items.COLUMNS, rows))
    bundle = Bundle(run_folder / "run" / "bundle")
    save(json_file, bundle, seed, to_json(rows), new_items.header(config, dataset))


@app.command("long-histories")
def run_long_histories(
    run_folder: Annotated[
        Path, typer.Option(help="Folder of the training, which continues where it was stopped.", file_okay=False)
    ],
    recipe: Annotated[Path, typer.Option(help="Recipe with long prompts.", exists=True, dir_okay=False)] = Path(
        "runs/movielens-long.toml"
    ),
    data: RunData = None,
    users: Users = 1000,
    rounds: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="Users of each length, and timed prefills.")] = 3,
    threads: Threads = 2,
    note: Annotated[str, typer.Option(help="A sentence for the page, such as on other work of the machine.")] = "",
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: PageFolder = None,
) -> None:
    """Time lists of long histories through the services, and measure what sparse prefill would save and cost."""
    long, recipes = optional("research.long_histories"), optional("atspeed.training.recipe")
    optional("transformers.utils.logging").disable_progress_bar()
    read, config = recipes.read_recipe(recipe), long.LongConfig(rounds, threads, seed)
    trained, inflated = long.bundles(read, run_folder, data)
    rows = long.lists(inflated / "bundle", config)
    out.print(terminal_table("Lists", long.COLUMNS, rows))
    prefills, times = long.times(trained, inflated, rounds)
    out.print(terminal_table("Prefills", long.sparse_layer.PREFILL_COLUMNS, prefills))
    out.print(terminal_table("Sparse attention", long.sparse_layer.TIME_COLUMNS, times))
    sparse = long.sparse_lists(trained, data, users, seed)
    out.print(terminal_table("Lists after sparse prefills", long.sample_attention.COLUMNS, sparse))
    found = to_json(rows, kind=long.NAME) + to_json(prefills, kind=long.PREFILL)
    found += to_json(times, kind=long.SPARSE_TIME) + to_json(sparse, kind=long.SPARSE_LISTS)
    about = long.header(config, optional("atspeed.training.pipeline").load_dataset(read, data).name, note)
    save(json_file, Bundle(inflated / "bundle"), seed, found, about, page=(report, PAGES[long.NAME]))
    if different := sum(row.users - row.identical for row in rows):
        raise CommandError(f"{different} lists differ from the cold list of their history")


@app.command("report")
def run_report(
    result: ResultFile,
    folder: OutFolder,
) -> None:
    """Write the page of a study from its result file."""
    write_report(result, folder, PAGES)


if __name__ == "__main__":
    app()
