"""Time of passes and lists of two bundles, such as one target in two graphs.

Both have the same catalogue, and models of the same sizes. They take turns pass by pass and list by list, so that a
disturbance of the machine meets both. Plans have a fixed size, since an adaptive one follows the measured times.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atspeed.benchmarks import markdown
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.markdown import origin, paragraphs, row_table
from atspeed.benchmarks.probe_trees import HostPasses, ProbeTree
from atspeed.benchmarks.results import BenchmarkError, Columns, Result
from atspeed.benchmarks.services import progress_bar
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.loading import load_decoder
from atspeed.engine.search.mode import Mode
from atspeed.local.recommender import Recommender, RecommenderOptions
from atspeed_client import RecommendRequest
from orchestrator.planning.planner import PlanLimits, PlannerKind

NAME = "graph-times"
TOKENS = (1, 2, 10, 40, 80, 120)
"""New tokens of a timed pass."""
MODES = (Mode.TARGET_ONLY, Mode.STRICT)


@dataclass(frozen=True)
class GraphTimesConfig:
    """Configuration. cached: cached tokens of a timed pass. passes: passes of each kind. widths: K of the lists."""

    cached: Sequence[int]
    passes: int
    widths: Sequence[int]
    threads: Sequence[int]


@dataclass(frozen=True)
class GraphTimesRow:
    """Times of the first bundle, those of the second, and the median of their ratios.

    Attributes:
        what: the pass or the list.
        threads: threads of a pass.
        count: pairs of times.
        first_ms: median of the first bundle.
        second_ms: median of the second bundle.
        ratio: median of a pair's second time over its first.
    """

    what: str
    threads: int
    count: int
    first_ms: float
    second_ms: float
    ratio: float

    @classmethod
    def of(cls, what: str, threads: int, pairs: npt.ArrayLike) -> GraphTimesRow:
        """Summarise pairs of times, in milliseconds."""
        first, second = np.asarray(pairs).T
        medians = (round(float(np.median(each)), 3) for each in (first, second, second / first))
        return cls(what, threads, len(first), *medians)


COLUMNS: Columns[GraphTimesRow] = (
    ("", lambda row: row.what),
    ("threads", lambda row: str(row.threads)),
    ("pairs", lambda row: str(row.count)),
    ("first, ms", lambda row: f"{row.first_ms:.2f}"),
    ("second, ms", lambda row: f"{row.second_ms:.2f}"),
    ("second / first", lambda row: f"{row.ratio:.3f}"),
)


def run(bundles: tuple[Bundle, Bundle], histories: Sequence[History], config: GraphTimesConfig) -> list[GraphTimesRow]:
    """Measure passes of both targets, then lists of each mode and K for users who return with one new item.

    Raises BenchmarkError when the bundles have other catalogues, or when a target has too few positions.
    """
    first, second = (bundle.manifest for bundle in bundles)
    if first.catalogue_version != second.catalogue_version:
        raise BenchmarkError("the bundles have different catalogues, so their lists cannot be compared")
    needed = max(config.cached, default=0) + 1
    for bundle in bundles:
        if (positions := bundle.model("target").max_positions) < needed:
            raise BenchmarkError(f"--cached {needed - 1}: the target of {bundle.root} has {positions} positions")
    return [
        row
        for threads in config.threads
        for rows in (_passes(bundles, threads, config), _lists(bundles, histories, threads, config))
        for row in rows
    ]


def _passes(bundles: tuple[Bundle, Bundle], threads: int, config: GraphTimesConfig) -> Iterator[GraphTimesRow]:
    options = RuntimeOptions(intra_op_threads=threads)
    decoders = [load_decoder(bundle, "target", options) for bundle in bundles]
    vocab_size = bundles[0].model("target").vocab_size
    for cached in config.cached:
        for new in TOKENS:
            tree = ProbeTree.siblings(vocab_size, cached, new)
            runs = [HostPasses(decoder, tree) for decoder in decoders]
            times = np.array(
                [[_pass_ms(each, cached, cached + new) for each in runs] for _ in range(config.passes + 1)]
            )
            # The first pass allocates memory.
            yield GraphTimesRow.of(f"pass of {new} behind {cached}", threads, times[1:])


def _pass_ms(passes: HostPasses, start: int, end: int) -> float:
    begun = time.perf_counter_ns()
    passes.run(start, end)
    return (time.perf_counter_ns() - begun) / 1e6


def _lists(
    bundles: tuple[Bundle, Bundle], histories: Sequence[History], threads: int, config: GraphTimesConfig
) -> Iterator[GraphTimesRow]:
    took: dict[tuple[Mode, int], list[tuple[float, float]]] = {(mode, k): [] for k in config.widths for mode in MODES}
    with ExitStack() as stack:
        options = RecommenderOptions(threads=threads, plan_limits=PlanLimits(PlannerKind.FIXED))
        libraries = [stack.enter_context(Recommender(bundle.root, options)) for bundle in bundles]
        progress = stack.enter_context(progress_bar())
        for number, history in enumerate(progress.track(histories, description="users")):
            for (mode, k), pairs in took.items():
                first, second = (_list_ms(each, f"{number}-{mode}-{k}", history, mode, k) for each in libraries)
                pairs.append((first, second))
    yield from (GraphTimesRow.of(f"{mode} list, K = {k}", threads, pairs) for (mode, k), pairs in took.items())


def _list_ms(library: Recommender, tenant: str, history: History, mode: Mode, k: int) -> float:
    """Measure the list of a user whose prompt is cached up to the last item. tenant: keeps equal prompts apart."""
    before, after = (
        RecommendRequest(history=known, k=k, beam_width=k, mode=mode, tenant=tenant)
        for known in (history[:-1], history)
    )
    library.send(before)
    begun = time.perf_counter_ns()
    library.send(after)
    return (time.perf_counter_ns() - begun) / 1e6


def header(bundles: tuple[Bundle, Bundle], config: GraphTimesConfig, *, users: int, histories: str) -> dict[str, Any]:
    """Return the header's fields."""
    compared = [bundle.manifest.version for bundle in bundles]
    return {"benchmark": NAME, "compared": compared, **asdict(config), "users": users, "histories": histories}


def write(result: Result, folder: Path) -> Path:
    """Write the page of a result file. Returns its path."""
    return markdown.write(folder / "graph-times.md", _page(result.header, result.rows_of(NAME, GraphTimesRow)))


def _page(header: Mapping[str, Any], rows: Sequence[GraphTimesRow]) -> Iterator[str]:
    yield from paragraphs(
        "# Time of passes and lists in two graphs",
        f"Both bundles take turns: passes of new tokens behind cached ones, then lists of {header['users']} users, of "
        f"{header['histories']}, who return with one new item, in process, with plans of 2K nodes per level. "
        "Medians; the ratio is the median of those of pairs.",
    )
    yield from origin(
        header,
        [(name, f"version {version}") for name, version in zip(("first", "second"), header["compared"], strict=True)],
    )
    yield from row_table(COLUMNS, rows)
