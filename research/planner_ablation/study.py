"""Planners compared by simulated lists, for the same users and arrivals."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache, partial
from itertools import product, starmap
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.benchmarks.intervals import half_width
from atspeed.benchmarks.results import BenchmarkError, Columns
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.trie import Trie
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext
from orchestrator.planning.planner import PlanLimits, Planner, PlannerKind
from research.planner_ablation.clock import Clock
from research.planner_ablation.costs import PRECISIONS, Costs
from research.planner_ablation.discounted_prefetch import DiscountedPrefetcher
from research.planner_ablation.discounted_sizer import SIZES, DiscountedPlanner
from research.planner_ablation.serving import (
    MAX_NODES,
    RULE,
    AdaptivePrefetch,
    Candidate,
    Machine,
    NoPrefetch,
    Plans,
    Served,
    serve,
)
from research.planner_ablation.users import Users

NAME = "planner"
ADAPTIVE, ALONE, FIXED_OR_NONE = "adaptive", "target alone", "fixed size or none"
WIDTHS = (1, 3, 5, 10, 20, 50)
_BUSY_SHARE = 0.7


class Load(StrEnum):
    """Load of the target."""

    IDLE = "idle"  # one request at a time
    BUSY = "70 %"  # a Poisson process of so many arrivals, relative to what the target alone can serve


@dataclass(frozen=True)
class StudyConfig:
    """Configuration of the study.

    Attributes:
        seeds: runs of each setting, each with users and arrivals of its own.
        settle: requests before the counted ones: the candidates learn.
        users: counted requests of each run.
        workers: processes; each makes the runs of one seed at a time.
    """

    widths: Sequence[int] = WIDTHS
    seeds: int = 3
    settle: int = 40
    users: int = 40
    workers: int = 1


@dataclass(frozen=True)
class Setting:
    """Setting of a comparison. precision: of the target. is_warm: true if only the newest item is not cached."""

    precision: str
    k: int
    is_warm: bool
    load: Load


@dataclass(frozen=True)
class PlannerRow:
    """Candidate in a setting.

    Attributes:
        mean_ms: mean latency of a list.
        ratio: mean latency over that of today's planner, mean over the seeds.
        ratio_ci95: half of its 95 % interval.
        target_passes_mean: passes of a list.
        nodes_drafted_mean: nodes that the draft proposed for a list.
    """

    precision: str
    k: int
    prefix: str
    load: str
    candidate: str
    mean_ms: float
    ratio: float
    ratio_ci95: float
    target_passes_mean: float
    nodes_drafted_mean: float


TERMINAL_COLUMNS: Columns[PlannerRow] = (
    ("target", lambda row: row.precision),
    ("K", lambda row: str(row.k)),
    ("prefix", lambda row: row.prefix),
    ("load", lambda row: row.load),
    ("planner", lambda row: row.candidate),
    ("mean ms", lambda row: f"{row.mean_ms:.1f}"),
    ("over adaptive", lambda row: f"{row.ratio:.3f} ± {row.ratio_ci95:.3f}"),
    ("passes", lambda row: f"{row.target_passes_mean:.2f}"),
    ("nodes", lambda row: f"{row.nodes_drafted_mean:.0f}"),
)


def header(config: StudyConfig) -> dict[str, Any]:
    """Return the header's fields."""
    return {"benchmark": NAME, "question": asdict(config)}


def run(config: StudyConfig, benchmarks: Path, progress: Callable[[int, int], None]) -> list[PlannerRow]:
    """Return a row for each setting and candidate. benchmarks: folder with the recorded times.

    Raises BenchmarkError when a file is missing, or when a list is not the target's own.
    """
    costs = {precision: Costs.recorded(benchmarks, precision) for precision in PRECISIONS}
    parts = [(config, costs, seed, k) for seed in range(1, config.seeds + 1) for k in config.widths]
    runs: dict[Setting, list[Mapping[str, list[Served]]]] = {}
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")) as pool:
        found = pool.map(_run_part, *zip(*parts, strict=True)) if config.workers > 1 else starmap(_run_part, parts)
        for done, part in enumerate(found, start=1):
            for setting, lists in part.items():
                runs.setdefault(setting, []).append(lists)
            progress(done, len(parts))
    settings = (Setting(*one) for one in product(PRECISIONS, config.widths, (False, True), Load))
    return [row for setting in settings for row in _rows(setting, runs[setting])]


def _run_part(
    config: StudyConfig, costs: Mapping[str, Costs], seed: int, k: int
) -> dict[Setting, Mapping[str, list[Served]]]:
    """Return the lists of each candidate, in all settings of one K, for the users of one seed."""
    users = _users(seed)
    # What the draft proposes depends on the user and the size only, so all settings of a K share it.
    plans: list[Plans] = [{} for _ in range(config.settle + config.users)]
    settings = (Setting(*one) for one in product(PRECISIONS, [k], (False, True), Load))
    return {one: _serve_all(one, costs[one.precision], users, seed, config, plans) for one in settings}


@lru_cache(maxsize=1)
def _users(seed: int) -> Users:
    """Return the users of a seed; the parts of one follow each other."""
    return Users(seed)


def candidates(costs: Costs, users: Users, clock: Clock) -> Mapping[str, Callable[[], Candidate]]:
    """Return the makers of the candidates. A candidate has nothing learned."""
    trie, model = users.trie, users.user(0).target

    def product_planner(kind: PlannerKind) -> Planner:
        planner = Planner(trie, PlanLimits(kind=kind))
        planner.set_curves(costs.target, costs.draft)
        return planner

    def prefetch() -> AdaptivePrefetch:
        return AdaptivePrefetch(model, costs.target)

    def discounted(sizes: Sequence[float] = SIZES) -> DiscountedPlanner:
        return DiscountedPlanner(trie, sizes, clock)

    return {
        ADAPTIVE: lambda: Candidate(product_planner(PlannerKind.ADAPTIVE), prefetch()),
        ALONE: lambda: Candidate(None, NoPrefetch()),
        "prefetch, no draft": lambda: Candidate(None, prefetch()),
        "fixed size": lambda: Candidate(product_planner(PlannerKind.FIXED), prefetch()),
        FIXED_OR_NONE: lambda: Candidate(discounted((0.0, PlanLimits().nodes_per_beam)), prefetch()),
        "discounted means": lambda: Candidate(discounted(), prefetch()),
        "discounted means, prefetch too": lambda: Candidate(
            discounted(), DiscountedPrefetcher(trie, RULE, MAX_NODES, clock)
        ),
        "adaptive, drafts at any load": lambda: Candidate(DraftsAtAnyLoad(trie, costs), prefetch()),
    }


class DraftsAtAnyLoad(Planner):
    """Today's planner without its rule that nothing is drafted while the target is saturated."""

    def __init__(self, trie: Trie, costs: Costs) -> None:
        super().__init__(trie, PlanLimits())
        self.set_curves(costs.target, costs.draft)

    def sizer(self, mode: Mode, context: PlanContext) -> FixedPlanSizer:
        """Return the plan sizer of a request."""
        sizer = super().sizer(mode, context)
        sizer._is_target_saturated = lambda: False  # type: ignore[attr-defined]
        return sizer


def _serve_all(
    setting: Setting, costs: Costs, users: Users, seed: int, config: StudyConfig, plans: list[Plans]
) -> Mapping[str, list[Served]]:
    """Serve one seed's requests by each candidate, and return those that count."""
    number = config.settle + config.users
    arrivals = _arrivals(setting, costs, seed, number)
    found: dict[str, list[Served]] = {}
    for name in candidates(costs, users, Clock()):
        clock = Clock()
        machine = Machine(costs, clock, is_warm=setting.is_warm)
        candidate = candidates(costs, users, clock)[name]()
        served: dict[int, Served] = {}
        for request in range(number):
            coroutine = serve(
                machine,
                candidate,
                users.user(request),
                setting.k,
                seed * 100_000 + 2 * request,
                plans[request],
                partial(served.__setitem__, request),
            )
            clock.start(arrivals[request], coroutine)
        clock.run()
        found[name] = [served[request] for request in range(config.settle, number)]
    expected = [one.leaves for one in found[ALONE]]
    if wrong := [name for name, lists in found.items() if [one.leaves for one in lists] != expected]:
        raise BenchmarkError(f"{setting}: the lists of {', '.join(wrong)} are not the target's own")
    return found


def _arrivals(setting: Setting, costs: Costs, seed: int, number: int) -> list[int]:
    """Return the time of each arrival: far apart, or a Poisson process."""
    computed = costs.new_tokens if setting.is_warm else costs.prompt_tokens
    passes = float(costs.target.predict(computed)) + 3 * float(costs.target.predict(setting.k))
    if setting.load is Load.IDLE:
        return [10 * int(passes) * request for request in range(1, number + 1)]
    pauses = np.random.default_rng(seed).exponential(passes / _BUSY_SHARE, number)
    return [int(ns) for ns in np.cumsum(pauses)]


def _rows(setting: Setting, runs: Sequence[Mapping[str, list[Served]]]) -> Iterator[PlannerRow]:
    means = {name: [float(np.mean([one.latency_ns for one in run[name]])) / 1e6 for run in runs] for name in runs[0]}
    for name, mean_ms in means.items():
        ratios = [ms / reference for ms, reference in zip(mean_ms, means[ADAPTIVE], strict=True)]
        served = [one for run in runs for one in run[name]]
        yield PlannerRow(
            setting.precision,
            setting.k,
            "warm" if setting.is_warm else "cold",
            setting.load,
            name,
            round(float(np.mean(mean_ms)), 3),
            round(float(np.mean(ratios)), 4),
            round(half_width(ratios), 4),
            round(float(np.mean([one.passes for one in served])), 3),
            round(float(np.mean([one.drafted for one in served])), 2),
        )
