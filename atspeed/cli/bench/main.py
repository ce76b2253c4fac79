"""`atspeed bench`: measurements that check.

parity         our lists beside Hugging Face generate (extra `train`)    acceptance     target passes of drafts, modes, budgets
lossless       strict beside target-only, with exclusions                recommenders   Recall and NDCG beside other methods
load           latency and goodput at rising rates               scaling        what grows with catalogue, K, prompt
decode         what a list takes, beside other engines           overhead       what the services add to the models' time
prefix         first passes, cold and cached                     gpu            all that a GPU is wanted for
precision      number formats: time, lists, Recall                       report         a page about a result, from its JSON
"""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer

from atspeed.cli.bench.options import (
    Histories,
    JsonFile,
    Page,
    Seed,
    Tolerance,
    Users,
    chosen_histories,
    save,
    written,
)
from atspeed.cli.errors import Commands
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
from atspeed.engine.bundle.manifest import Bundle
from atspeed.engine.search.list_comparison import Verdict
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.scoring import ScoringRule
from atspeed.rpc import event_loop

_PAGES = {
    "recommenders": "atspeed.benchmarks.recommender_table",
    "decode": "atspeed.benchmarks.decode_report",
    "load": "atspeed.benchmarks.load_report",
    "overhead": "atspeed.benchmarks.overhead",
    "precision": "atspeed.benchmarks.precision_report",
    "prefix": "atspeed.benchmarks.prefix_report",
    "scaling": "atspeed.benchmarks.scaling_report",
}
"""The module that writes a result's page, by the `benchmark` of its header."""

bench_commands = Commands(help="Measure and check.")


@bench_commands.command("parity")
def bench_parity(
    bundle: BundleFolder,
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="The Hugging Face checkpoint that the target was exported from.", exists=True, file_okay=False
        ),
    ],
    users: Users = 200,
    histories: Histories = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Our lists beside Hugging Face generate; exits with 1 when one differs beyond near-ties."""
    parity, exporter = optional("atspeed.benchmarks.parity"), optional("atspeed.training.export")
    optional("transformers.utils.logging").disable_progress_bar()  # its bar for a load that takes a moment
    opened = Bundle(bundle)
    chosen = chosen_histories(opened, histories, users, seed)
    rows = event_loop.run(parity.run(bundle, exporter.load_checkpoint(checkpoint), chosen))
    _show(parity, rows, _answer(rows))
    save(json_file, opened, seed, parity.to_json(rows))
    if different := sum(row.different for row in rows):
        raise CommandError(f"{different} lists differ from Hugging Face generate beyond near-ties")


RuleChoice = Literal["bundle", "vocab", "trie", "both"]


@bench_commands.command("lossless")
def bench_lossless(
    bundle: BundleFolder,
    users: Users = 500,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Items wanted.")] = 20,
    excluded: Annotated[int, typer.Option(min=0, max=MAX_EXCLUDED, help="Items excluded per user.")] = 50,
    rule: Annotated[RuleChoice, typer.Option(help="Scoring rules; another than the bundle's on a copy.")] = "bundle",
    histories: Histories = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Strict beside target-only with excluded items; exits with 1 when a list differs or a path is invalid."""
    from atspeed.benchmarks import lossless

    opened = Bundle(bundle)
    chosen = chosen_histories(opened, histories, users, seed)
    question = lossless.Question(k=k, excluded=excluded, seed=seed)
    rows = event_loop.run(lossless.run(bundle, chosen, question, _rules(opened, rule)))
    _show(lossless, rows, _answer(rows))
    save(json_file, opened, seed, lossless.to_json(rows))
    if failures := sum(row.different + row.invalid_paths for row in rows):
        raise CommandError(f"{failures} lists differ beyond near-ties or paths are invalid")


def _speculative(modes: list[Mode] | None) -> list[Mode] | None:
    if Mode.TARGET_ONLY in (modes or ()):
        raise typer.BadParameter("target-only does not speculate: it is what the others are compared with")
    return modes


DraftBundles = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=BUNDLE", help="Another draft for the same target; GROUP/SEED=BUNDLE for several alike."),
]
Widths = Annotated[
    list[int] | None, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.  [default: 1 3 5 10 20]")
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(help="Nodes of a plan: Nk per level, N/level, N/all.  [default: 2k 40(/level) 120(/all) 240(/all)]"),
]
Modes = Annotated[
    list[Mode] | None,
    typer.Option("--mode", "--modes", callback=_speculative, help="How lists are made.  [default: all that speculate]"),
]


@bench_commands.command("acceptance")
def bench_acceptance(
    bundle: BundleFolder,
    data: Annotated[
        Path,
        typer.Option(
            help="The data set: a folder with items.jsonl and train/valid/test.txt.", exists=True, file_okay=False
        ),
    ],
    users: Users = 1000,
    draft: DraftBundles = None,
    name: Annotated[str, typer.Option(help="Name of the bundle's own draft in the results.")] = "draft",
    k: Widths = None,
    budget: Budgets = None,
    mode: Modes = None,
    tolerance: Tolerance = 0.1,
    seed: Seed = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="Processes; by default as many as cores.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="Threads of a pass, in each process.")] = 1,
    per_user: Annotated[bool, typer.Option("--per-user", help="Keep every user's numbers in the result.")] = False,
    json_file: JsonFile = None,
    report: Page = None,
) -> None:
    """Target passes of each draft, mode, K and budget; exits with 1 when a strict or exact list differs."""
    from atspeed.benchmarks import acceptance
    from atspeed.benchmarks.eval_examples import choose_cases
    from atspeed.training.data import read_atspeed

    page = (
        optional("atspeed.benchmarks.acceptance_report") if report else None
    )  # what is missing is said before the work
    opened = Bundle(bundle)
    drafts = acceptance.draft_bundles(opened, name, draft or ())
    question = acceptance.Question(
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
    rows = acceptance.run(opened, drafts, cases, question)
    seconds = time.monotonic() - begun
    exact = [row for row in rows if row.promises_identity]
    _show(acceptance, rows, f"{_answer(exact)}, in the modes that promise it")
    result = save(
        json_file,
        opened,
        seed,
        acceptance.to_json(rows, per_user=per_user),
        acceptance.header(drafts, question, data=dataset.name, users=len(cases), seconds=seconds),
    )
    if page and report:
        written(page.write(result, report))
    if different := sum(row.different for row in exact):
        raise CommandError(f"{different} lists differ from the target's own beyond near-ties")


class LibraryMethod(StrEnum):
    """Recommenders that a library has."""

    SASREC = "sasrec"


@bench_commands.command("recommenders")
def bench_recommenders(
    run_folder: Annotated[Path, typer.Option(help="A finished run of `atspeed train`.", exists=True, file_okay=False)],
    data: Annotated[Path | None, typer.Option(help="The data that the run's recipe reads.")] = None,
    users: Annotated[
        int | None, typer.Option(min=1, max=MAX_USERS, help="How many test users; all without it.")
    ] = None,
    trained: Annotated[
        list[LibraryMethod] | None, typer.Option("--with", help="Train this one too (extra `bench`).")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Epochs of SASRec, the best of which is kept.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads; all cores by default.")
    ] = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
    report: Page = None,
) -> None:
    """Recall and NDCG of a run's models, popularity, item-kNN and SASRec on one split, with intervals."""
    recommenders, sasrec = optional("atspeed.benchmarks.recommenders"), optional("atspeed.benchmarks.sasrec")
    from atspeed.benchmarks import recommender_table

    if trained:
        sasrec.library()  # what is missing is said before the work
    if threads:
        optional("torch").set_num_threads(threads)
    optional("transformers.utils.logging").disable_progress_bar()
    opened = recommenders.TrainedRun.open(run_folder, data)
    asked = opened.questions(users, seed)
    methods = list(recommenders.own_methods(opened))
    if trained:
        settings = sasrec.Settings() if epochs is None else sasrec.Settings(epochs=epochs)
        err.print(f"training SASRec, {settings.epochs} epochs")
        methods.append(recommenders.sasrec(opened, settings, seed=seed))
    rows = recommenders.run(asked, methods, seed=seed)
    out.print(recommender_table.table(rows))
    about = recommenders.header(opened, methods, users=len(asked))
    result = save(json_file, opened.bundle, seed, recommender_table.to_json(rows), about)
    if report:
        written(recommender_table.write(result, report))


@bench_commands.command("report")
def bench_report(
    result: Annotated[Path, typer.Argument(help="What a benchmark wrote as --json.", exists=True, dir_okay=False)],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the page and its plots.", file_okay=False)],
) -> None:
    """A page about a measurement, from its JSON alone."""
    from atspeed.benchmarks.results import Result

    read = Result.read(result)
    page = _PAGES.get(read.header.get("benchmark", ""), "atspeed.benchmarks.acceptance_report")
    writer = optional(page)
    try:
        written(writer.write(read, folder))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CommandError(f"{result}: not a result that {page} can show: {error!r}") from error


def _rules(bundle: Bundle, choice: RuleChoice) -> list[ScoringRule]:
    if choice == "both":
        return list(ScoringRule)
    return [bundle.manifest.scoring_rule if choice == "bundle" else ScoringRule(choice)]


def _show(benchmark: ModuleType, rows: Any, answer: str) -> None:
    out.print(benchmark.table(rows))
    out.print(f"identical to {benchmark.REFERENCE}: {answer}", highlight=False)


def _answer(rows: Any) -> str:
    """Whether all lists are the reference's: yes, near-tie or NO, and how many are not."""
    counts = {
        Verdict.IDENTICAL: sum(row.identical for row in rows),
        Verdict.NEAR_TIE: sum(row.near_ties for row in rows),
        Verdict.DIFFERENT: sum(row.different for row in rows),
    }
    worst = Verdict.worst(verdict for verdict, count in counts.items() if count)
    return f"{worst.answer} ({', '.join(f'{count} {verdict}' for verdict, count in counts.items())})"
