"""Target passes of speculative beam search, for each draft, mode, K and plan size.

The orchestrator's loop and policies run over the ONNX models without services, in as many processes as there are cores.
Counts are those of a cold request: the prompt and the first plan in one pass, then one pass per miss. Time is not measured.

    2k          2K nodes per level, the AtSpeed paper's N         40          40 per level, the paper's largest N
    120, 240    so many nodes in all, in the order of their margins (method, section 7)
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group

from atspeed.benchmarks.intervals import Interval, bootstrap, half_width
from atspeed.benchmarks.results import (
    COMPARISON_COLUMNS,
    BenchmarkError,
    Columns,
    comparison_counts,
    terminal_table,
    to_json,
)
from atspeed.benchmarks.services import progress_bar
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.errors import BundleError
from atspeed.engine.search.mode import Guarantee, Mode
from research.acceptance_search import (
    NO_DRAFT,
    Budget,
    BudgetUnit,
    Configuration,
    SearchOutcome,
    SweepSetup,
    cutoffs,
    search_all,
)
from research.eval_examples import HeldOutCase
from research.shared_tree_models import TEMPERATURE

NAME = "acceptance"
REFERENCE = "the target alone"
WIDTHS = (1, 3, 5, 10, 20)
BUDGETS = ("2k", "40", "120", "240")
MODES = (Mode.STRICT, Mode.TOLERANCE, Mode.EXACT_SAMPLING, Mode.RELAXED_SAMPLING)
NDCG_AT = 10
_LARGEST_CHUNK = 20  # users; so that the progress bar moves
_CHUNKS_PER_WORKER = 8  # so that all processes end at about the same time


@dataclass(frozen=True)
class AcceptanceConfig:
    """Configuration of the sweep.

    Attributes:
        budgets, widths, modes: all their combinations are measured.
        seed: seed of the choice of users and of the bootstrap.
        workers: processes.
        threads: threads of a pass in each process.
    """

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

    Attributes:
        reference: mode of the lists that these are compared with: the target's beam search, or for the sampling modes the
            target's own sample by the same seed.
        target_passes_ci95: half width of the interval.
        accepted_levels: for each level 1 .. L-1, the share that needed no pass of its own.
        miss_level: level of the first miss, as shares; `none` is one_pass_share.
        nodes_planned_mean: distinct nodes of all plans.
        nodes_used_mean: planned nodes that the search went through.
        forced_share: share of the beams that are forced nodes.
        identical, near_ties, different: counts of lists.
        recall, ndcg: by cutoff.
        ndcg_difference: NDCG@10 less that of the reference; relaxed sampling only.
        per_user: every user's numbers.
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
        """True if the mode's lists are the reference's by construction."""
        return Mode(self.mode).properties.guarantee is Guarantee.EXACT


def parse_budget(label: str) -> Budget:
    """Parse `2k` (2K nodes per level), `40/level`, `240/all`, and the short forms `40`, `120` and `240`."""
    known = {"40": "40/level", "120": "120/all", "240": "240/all"}
    units = {"k": BudgetUnit.BEAM_WIDTHS, "/level": BudgetUnit.PER_LEVEL, "/all": BudgetUnit.IN_ALL}
    match = re.fullmatch(r"([1-9][0-9]{0,5})(k|/level|/all)", known.get(label, label))
    if match is None:
        raise BenchmarkError(f"--budget {label}: must be 40, 120, 240, Nk, N/level or N/all, with N from 1 to 999999")
    return Budget(label, int(match[1]), units[match[2]])


def draft_bundles(bundle: Bundle, name: str, others: Sequence[str]) -> dict[str, Bundle]:
    """Return the bundle of each named draft: the bundle's own draft as `name`, and `others` as NAME=BUNDLE.

    Raises BenchmarkError that names the option, unless each has a draft for the same target over the same catalogue.
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
    bundle: Bundle, drafts: Mapping[str, Bundle], cases: Sequence[HeldOutCase], config: AcceptanceConfig
) -> list[AcceptanceRow]:
    """Search for every case under every configuration. Rows are the target alone, then by mode, draft, K and budget."""
    setup = SweepSetup(
        bundle=bundle.root,
        drafts=tuple((name, other.root) for name, other in drafts.items()),
        configurations=tuple(_configurations(drafts, config)),
        tolerance=config.tolerance,
        threads=config.threads,
    )
    outcomes = _search(setup, cases, config.workers)
    by_configuration = dict(zip(setup.configurations, zip(*outcomes, strict=True), strict=True))
    levels = bundle.catalogue().trie.levels
    return [
        _row(configuration, found, by_configuration[configuration.reference], levels, config.seed)
        for configuration, found in by_configuration.items()
    ]


COLUMNS: Columns[AcceptanceRow] = (
    ("draft", lambda row: row.draft),
    ("K", lambda row: str(row.k)),
    ("plan", lambda row: row.budget),
    ("target passes", lambda row: f"{row.target_passes_mean:.2f} ±{row.target_passes_ci95:.2f}"),
    ("one pass", lambda row: f"{row.one_pass_share:.0%}"),
    ("nodes", lambda row: f"{row.nodes_planned_mean:.0f}"),
    *COMPARISON_COLUMNS,
    (f"NDCG @{NDCG_AT}", lambda row: f"{row.ndcg[str(min(row.k, NDCG_AT))]:.4f}"),
)


def tables(rows: Sequence[AcceptanceRow]) -> Group:
    """Return a table for each mode."""
    modes = dict.fromkeys(row.mode for row in rows)
    return Group(
        *(
            terminal_table(f"{mode}, {rows[0].users} users", COLUMNS, [row for row in rows if row.mode == mode])
            for mode in modes
        )
    )


def rows_to_json(rows: Sequence[AcceptanceRow], *, per_user: bool = False) -> list[dict[str, Any]]:
    """Return the rows of the result file. Fields without a value are left out, and without `per_user` every user's numbers."""
    return to_json([row if per_user else replace(row, per_user=None) for row in rows], omit_none=True)


def header(
    drafts: Mapping[str, Bundle], config: AcceptanceConfig, *, data: str, users: int, seconds: float
) -> dict[str, Any]:
    """Return the header's fields. seconds: wall time of all searches together."""
    return {
        "benchmark": NAME,
        "data": data,
        "users": users,
        "tolerance": config.tolerance,
        "temperature": TEMPERATURE,
        "budgets": {budget.label: f"{budget.count} {budget.unit}" for budget in config.budgets},
        "drafts": {name: _about(bundle) for name, bundle in drafts.items()},
        "workers": config.workers,
        "threads": config.threads,
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


def _configurations(drafts: Mapping[str, Bundle], config: AcceptanceConfig) -> Iterator[Configuration]:
    speculative = [
        Configuration(draft, mode, k, budget)
        for mode in config.modes
        for draft in drafts
        for k in config.widths
        for budget in config.budgets
    ]
    alone = [Configuration(NO_DRAFT, Mode.TARGET_ONLY, k, None) for k in config.widths]
    yield from dict.fromkeys([*alone, *(configuration.reference for configuration in speculative), *speculative])


def _search(setup: SweepSetup, cases: Sequence[HeldOutCase], workers: int) -> list[list[SearchOutcome]]:
    """Return all outcomes, [cases][configurations], and show a progress bar meanwhile."""
    with progress_bar() as progress:
        task = progress.add_task(f"{len(setup.configurations)} configurations, users", total=len(cases))
        size = max(1, min(_LARGEST_CHUNK, len(cases) // (workers * _CHUNKS_PER_WORKER)))
        chunks = [cases[start : start + size] for start in range(0, len(cases), size)]
        outcomes: dict[int, list[list[SearchOutcome]]] = {}
        for index, found in _chunk_by_chunk(setup, chunks, workers):
            outcomes[index] = found
            progress.advance(task, len(found))
    return [outcome for index in sorted(outcomes) for outcome in outcomes[index]]


def _chunk_by_chunk(
    setup: SweepSetup, chunks: Sequence[Sequence[HeldOutCase]], workers: int
) -> Iterator[tuple[int, list[list[SearchOutcome]]]]:
    """Yield each chunk's outcomes as they come. A single worker runs in this process."""
    if workers == 1:
        yield from ((index, search_all(setup, chunk)) for index, chunk in enumerate(chunks))
        return
    # Spawned: ONNX Runtime's threads do not survive a fork.
    pool = ProcessPoolExecutor(max_workers=workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from _completed(pool, setup, chunks)
    except BrokenProcessPool as error:
        raise BenchmarkError("a worker process died; too little memory for so many of them? --workers 1") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _completed(
    pool: Executor, setup: SweepSetup, chunks: Sequence[Sequence[HeldOutCase]]
) -> Iterator[tuple[int, list[list[SearchOutcome]]]]:
    asked: dict[Future[list[list[SearchOutcome]]], int] = {
        pool.submit(search_all, setup, chunk): index for index, chunk in enumerate(chunks)
    }
    for done in as_completed(asked):
        yield asked[done], done.result()


def _row(
    configuration: Configuration,
    found: Sequence[SearchOutcome],
    reference: Sequence[SearchOutcome],
    levels: int,
    seed: int,
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
        **comparison_counts(verdicts),
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
