"""How many target passes a speculative beam search takes, for each draft, mode, K and node budget.

In this process, without services: the orchestrator's loop and policies over the ONNX models, as many processes as cores.
What is counted is what a cold request would take: the prompt and the first plan in one pass, then one pass per miss. What
depends on the machine, time, is not measured here.

    2k          2K nodes per level, the AtSpeed paper's N         40          40 per level, the paper's largest N
    120, 240    so many nodes in all, best first (method, section 7)
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from atspeed.benchmarks.acceptance_search import (
    NO_DRAFT,
    Budget,
    BudgetUnit,
    Configuration,
    Outcome,
    Setup,
    cutoffs,
    search_all,
)
from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.eval_examples import HeldOutCase
from atspeed.benchmarks.intervals import Interval, bootstrap, half_width
from atspeed.benchmarks.results import Result
from atspeed.benchmarks.services import progress_bar
from atspeed.benchmarks.shared_tree_models import TEMPERATURE
from atspeed.engine.bundle.manifest import Bundle
from atspeed.engine.errors import BundleError
from atspeed.engine.search.list_comparison import Verdict
from atspeed.engine.search.mode import Guarantee, Mode

NAME = "acceptance"
REFERENCE = "the target alone"
WIDTHS = (1, 3, 5, 10, 20)
BUDGETS = ("2k", "40", "120", "240")
MODES = (Mode.STRICT, Mode.TOLERANCE, Mode.EXACT_SAMPLING, Mode.RELAXED_SAMPLING)
NDCG_AT = 10
_LARGEST_CHUNK = 20
_CHUNKS_PER_WORKER = 8


@dataclass(frozen=True)
class Question:
    """What is swept. workers: processes. threads: of one pass in each. seed: of the bootstrap, as of the choice of users."""

    budgets: Sequence[Budget]
    widths: Sequence[int] = WIDTHS
    modes: Sequence[Mode] = MODES
    tolerance: float = 0.1
    seed: int = 1
    workers: int = 1
    threads: int = 1


@dataclass(frozen=True)
class AcceptanceRow:
    """One configuration over all users. Means and shares are over requests.

    reference: what the lists are compared with: the target's beam search, or for the sampling modes the target's own sample
    by the same seed; identical, near_ties and different are counts. accepted_levels: of each level 1 .. L-1, the share that
    needed no pass of its own. miss_level: where the first such pass was needed, shares by level, `none` = one_pass_share.
    target_passes_ci95: half width. nodes_planned_mean: distinct nodes of all plans; nodes_used_mean: those the search went
    through. forced_share: of the beams, those that are their parent's only child. recall, ndcg: by cutoff.
    ndcg_difference: relaxed sampling only, NDCG at the first 10 less that of the reference.
    """

    draft: str
    mode: str
    k: int
    budget: str
    reference: str
    users: int
    target_passes_mean: float
    target_passes_ci95: float
    one_pass_share: float
    accepted_levels: Sequence[float]
    accepted_levels_mean: float
    miss_level: Mapping[str, float]
    draft_passes_mean: float
    nodes_planned_mean: float
    nodes_used_mean: float
    forced_share: float
    largest_slack_mean: float
    identical: int
    near_ties: int
    different: int
    recall: Mapping[str, float]
    ndcg: Mapping[str, float]
    ndcg_difference: Interval | None = None
    per_user: Mapping[str, Sequence[float]] | None = None

    @property
    def promises_identity(self) -> bool:
        """Whether the mode's lists are the reference's by construction."""
        return Mode(self.mode).properties.guarantee is Guarantee.EXACT


def parse_budget(label: str) -> Budget:
    """`2k`: 2K nodes per level. `40/level`: 40 per level. `240/all`: 240 in all. `40`, `120` and `240` are short for three."""
    known = {"40": "40/level", "120": "120/all", "240": "240/all"}
    units = {"k": BudgetUnit.BEAM_WIDTHS, "/level": BudgetUnit.PER_LEVEL, "/all": BudgetUnit.IN_ALL}
    match = re.fullmatch(r"([1-9][0-9]{0,5})(k|/level|/all)", known.get(label, label))
    if match is None:
        raise BenchmarkError(f"--budget {label}: must be 40, 120, 240, Nk, N/level or N/all, with N from 1 to 999999")
    return Budget(label, int(match[1]), units[match[2]])


def draft_bundles(bundle: Bundle, name: str, others: Sequence[str]) -> dict[str, Bundle]:
    """The bundles that the named drafts come from: the bundle's own draft, if it has one, as `name`; `others` as NAME=BUNDLE.

    Raises BenchmarkError, naming the option, unless each has a draft for the same target over the same catalogue.
    """
    if name == NO_DRAFT:
        raise BenchmarkError(f"--name {name}: the name stands for searches without a draft")
    found = {name: bundle} if bundle.manifest.draft else {}
    for option in others:
        other, equals, folder = option.partition("=")
        if not (other and equals and folder):
            raise BenchmarkError(f"--draft {option}: must be NAME=BUNDLE")
        if other in found or other == NO_DRAFT:
            raise BenchmarkError(
                f"--draft {option}: the name {other!r} is taken; --name renames the bundle's own draft"
            )
        found[other] = _same_target(bundle, option, Path(folder))
    if not found:
        raise BenchmarkError(f"{bundle.root}: the bundle has no draft model; name one by --draft NAME=BUNDLE")
    return found


def run(
    bundle: Bundle, drafts: Mapping[str, Bundle], cases: Sequence[HeldOutCase], question: Question
) -> list[AcceptanceRow]:
    """Search for every case under every configuration. Rows: the target alone, then by mode, draft, K and budget."""
    setup = Setup(
        bundle=bundle.root,
        drafts=tuple((name, other.root) for name, other in drafts.items()),
        configurations=tuple(_configurations(drafts, question)),
        tolerance=question.tolerance,
        threads=question.threads,
    )
    outcomes = _search(setup, cases, question.workers)
    by_configuration = dict(zip(setup.configurations, zip(*outcomes, strict=True), strict=True))
    levels = bundle.catalogue().trie.levels
    return [
        _row(configuration, found, by_configuration[configuration.reference], levels, question.seed)
        for configuration, found in by_configuration.items()
    ]


def table(rows: Sequence[AcceptanceRow]) -> Group:
    """The rows, for people: a table per mode."""
    modes = dict.fromkeys(row.mode for row in rows)
    return Group(*(_table_of(mode, [row for row in rows if row.mode == mode]) for mode in modes))


def _table_of(mode: str, rows: Sequence[AcceptanceRow]) -> Table:
    title = f"{mode}, {rows[0].users} users"
    shown = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    shown.add_column("draft", overflow="fold")
    for name in (
        "K",
        "plan",
        "target passes",
        "one\npass",
        "nodes",
        "same",
        "near\nties",
        "differ",
        f"NDCG\n@{NDCG_AT}",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        counts = (row.identical, row.near_ties, row.different)
        shown.add_row(
            row.draft,
            str(row.k),
            row.budget,
            f"{row.target_passes_mean:.2f} ±{row.target_passes_ci95:.2f}",
            f"{row.one_pass_share:.0%}",
            f"{row.nodes_planned_mean:.0f}",
            *map(str, counts),
            f"{row.ndcg[str(min(row.k, NDCG_AT))]:.4f}",
        )
    return shown


def from_json(result: Result) -> list[AcceptanceRow]:
    """The rows of a result file. Raises BenchmarkError when it is another benchmark's."""
    if result.header.get("benchmark") != NAME:
        raise BenchmarkError("the result is not one of bench acceptance")
    rows = []
    for row in result.rows:
        difference = row.get("ndcg_difference")
        rows.append(AcceptanceRow(**{**row, "ndcg_difference": Interval(**difference) if difference else None}))
    return rows


def to_json(rows: Sequence[AcceptanceRow], *, per_user: bool = False) -> list[dict[str, Any]]:
    """The rows, for a result file; what a row does not have is left out, and without `per_user` every user's numbers."""
    left_out = set() if per_user else {"per_user"}
    return [
        {name: value for name, value in asdict(row).items() if value is not None and name not in left_out}
        for row in rows
    ]


def header(
    drafts: Mapping[str, Bundle], question: Question, *, data: str, users: int, seconds: float
) -> dict[str, Any]:
    """What the rows were asked for, beside where they come from. seconds: wall time of all searches together."""
    return {
        "benchmark": NAME,
        "data": data,
        "users": users,
        "tolerance": question.tolerance,
        "temperature": TEMPERATURE,
        "budgets": {budget.label: f"{budget.count} {budget.unit}" for budget in question.budgets},
        "drafts": {name: _about(bundle) for name, bundle in drafts.items()},
        "workers": question.workers,
        "threads": question.threads,
        "wall_seconds": round(seconds, 1),
    }


def _about(bundle: Bundle) -> dict[str, Any]:
    manifest, draft = bundle.manifest, bundle.model("draft")
    return {
        "bundle": manifest.name,
        "version": manifest.version,
        "fingerprint": draft.fingerprint,
        "architecture": draft.architecture,
        "parameters": draft.parameters,
    }


def _same_target(bundle: Bundle, option: str, folder: Path) -> Bundle:
    try:
        other = Bundle(folder)
        other.model("draft")
    except BundleError as error:
        raise BenchmarkError(f"--draft {option}: {error}") from error
    for what, ours, theirs in (
        ("catalogue", bundle.manifest.catalogue_version, other.manifest.catalogue_version),
        ("target", bundle.manifest.target.fingerprint, other.manifest.target.fingerprint),
        ("scoring rule", bundle.manifest.scoring_rule, other.manifest.scoring_rule),
    ):
        if ours != theirs:
            raise BenchmarkError(f"--draft {option}: its {what} is {theirs}, that of --bundle is {ours}")
    return other


def _configurations(drafts: Mapping[str, Bundle], question: Question) -> Iterator[Configuration]:
    speculative = [
        Configuration(draft, mode, k, budget)
        for mode in question.modes
        for draft in drafts
        for k in question.widths
        for budget in question.budgets
    ]
    alone = [Configuration(NO_DRAFT, Mode.TARGET_ONLY, k, None) for k in question.widths]
    yield from dict.fromkeys([*alone, *(configuration.reference for configuration in speculative), *speculative])


def _search(setup: Setup, cases: Sequence[HeldOutCase], workers: int) -> list[list[Outcome]]:
    """All outcomes, [cases][configurations], with a bar meanwhile."""
    with progress_bar() as progress:
        task = progress.add_task(f"{len(setup.configurations)} configurations, users", total=len(cases))
        size = max(1, min(_LARGEST_CHUNK, len(cases) // (workers * _CHUNKS_PER_WORKER)))
        chunks = [cases[start : start + size] for start in range(0, len(cases), size)]
        outcomes: dict[int, list[list[Outcome]]] = {}
        for index, found in _chunk_by_chunk(setup, chunks, workers):
            outcomes[index] = found
            progress.advance(task, len(found))
    return [outcome for index in sorted(outcomes) for outcome in outcomes[index]]


def _chunk_by_chunk(
    setup: Setup, chunks: Sequence[Sequence[HeldOutCase]], workers: int
) -> Iterator[tuple[int, list[list[Outcome]]]]:
    """Each chunk's outcomes as they come. Here, where one worker is enough."""
    if workers == 1:
        yield from ((index, search_all(setup, chunk)) for index, chunk in enumerate(chunks))
        return
    # Not forked: ONNX Runtime's threads would not come along.
    pool = ProcessPoolExecutor(max_workers=workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from _completed(pool, setup, chunks)
    except BrokenProcessPool as error:
        raise BenchmarkError("a worker process died; too little memory for so many of them? --workers 1") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _completed(
    pool: Executor, setup: Setup, chunks: Sequence[Sequence[HeldOutCase]]
) -> Iterator[tuple[int, list[list[Outcome]]]]:
    asked: dict[Future[list[list[Outcome]]], int] = {
        pool.submit(search_all, setup, chunk): index for index, chunk in enumerate(chunks)
    }
    for done in as_completed(asked):
        yield asked[done], done.result()


def _row(
    configuration: Configuration, found: Sequence[Outcome], reference: Sequence[Outcome], levels: int, seed: int
) -> AcceptanceRow:
    passes = [len(outcome.pass_levels) for outcome in found]
    first_miss = [next((level for level in outcome.pass_levels if level), None) for outcome in found]
    accepted = [_share([level not in outcome.pass_levels for outcome in found]) for level in range(1, levels)]
    verdicts = [outcome.verdict for outcome in found]
    at = min(configuration.k, NDCG_AT)
    ndcg = [outcome.quality[at].ndcg for outcome in found]
    difference = [own - alone.quality[at].ndcg for own, alone in zip(ndcg, reference, strict=True)]
    places = cutoffs(configuration.k)
    return AcceptanceRow(
        draft=configuration.draft,
        mode=str(configuration.mode),
        k=configuration.k,
        budget=configuration.budget.label if configuration.budget else "0",
        reference=str(configuration.reference.mode),
        users=len(found),
        target_passes_mean=_mean(passes),
        target_passes_ci95=round(half_width(passes), 6),
        one_pass_share=_share([count <= 1 for count in passes]),
        accepted_levels=accepted,
        accepted_levels_mean=round(sum(accepted), 6),
        miss_level={
            **{str(level): _share([miss == level for miss in first_miss]) for level in range(1, levels)},
            "none": _share([miss is None for miss in first_miss]),
        },
        draft_passes_mean=_mean([outcome.draft_passes for outcome in found]),
        nodes_planned_mean=_mean([outcome.nodes_planned for outcome in found]),
        nodes_used_mean=_mean([outcome.nodes_used for outcome in found]),
        forced_share=_ratio([outcome.nodes_forced for outcome in found], [outcome.beams for outcome in found]),
        largest_slack_mean=_mean([outcome.largest_slack for outcome in found]),
        identical=verdicts.count(Verdict.IDENTICAL),
        near_ties=verdicts.count(Verdict.NEAR_TIE),
        different=verdicts.count(Verdict.DIFFERENT),
        recall={str(cutoff): _mean([outcome.quality[cutoff].recall for outcome in found]) for cutoff in places},
        ndcg={str(cutoff): _mean([outcome.quality[cutoff].ndcg for outcome in found]) for cutoff in places},
        ndcg_difference=bootstrap(difference, seed=seed) if configuration.mode is Mode.RELAXED_SAMPLING else None,
        per_user={"target_passes": passes, f"ndcg@{at}": ndcg},
    )


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 6)


def _share(values: Sequence[bool]) -> float:
    return _mean([float(value) for value in values])


def _ratio(parts: Sequence[int], wholes: Sequence[int]) -> float:
    return round(sum(parts) / max(1, sum(wholes)), 6)
