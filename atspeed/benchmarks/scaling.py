"""What grows with what: load time, memory and selection with the catalogue; a search with its beams and its prompt.

Catalogues are synthetic, each measured in a process of its own. Searches are target-only, of a bundle's model, in this process;
so what is measured is the engine, without gRPC.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from atspeed.benchmarks.catalogue_probe import Probe
from atspeed.benchmarks.errors import BenchmarkError
from atspeed.benchmarks.in_process_baseline import BareRunner, bare_runner, median_ms
from atspeed.benchmarks.results import Result
from atspeed.benchmarks.synthetic import synthetic_catalogue

NAME = "scaling"
SIZES = (10**4, 10**5, 10**6, 10**7)
WIDTHS = (1, 5, 10, 20, 50)
_LEVELS = 4
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class CatalogueRow:
    """One synthetic catalogue. nodes: of its trie, by depth from the root. probe: what it costs a process."""

    items: int
    codebook_sizes: Sequence[int]
    nodes: Sequence[int]
    made_seconds: float
    disk_bytes: int
    probe: Probe


@dataclass(frozen=True)
class SearchRow:
    """Target-only searches of K beams, medians in ms. cold: nothing of the prompt was cached.

    forward_ms, constraint_ms: of all passes of a search together: reading the tokens, and choosing each node's best children.
    """

    k: int
    history_items: int
    prompt_tokens: int
    cold: bool
    passes: int
    search_ms: float
    forward_ms: float
    constraint_ms: float


@dataclass(frozen=True)
class CatalogueQuestion:
    """Which catalogues, and what is asked of each: K beams, with so many excluded items."""

    sizes: Sequence[int] = SIZES
    codebook: int = 256
    k: int = 20
    excluded: int = 10_000
    seed: int = 1


@dataclass(frozen=True)
class SearchQuestion:
    """Which searches: all widths with the longest history, all history lengths with `k` beams. repeats: users of each."""

    widths: Sequence[int] = WIDTHS
    k: int = 20
    repeats: int = 15
    threads: int = 1
    seed: int = 1


def measure_catalogues(question: CatalogueQuestion) -> list[CatalogueRow]:
    """One row per size, ascending."""
    return [_catalogue(items, question) for items in sorted(question.sizes)]


def _catalogue(items: int, question: CatalogueQuestion) -> CatalogueRow:
    with tempfile.TemporaryDirectory() as temporary:
        folder, begun = Path(temporary), time.perf_counter()
        catalogue = synthetic_catalogue(items, (question.codebook,) * _LEVELS, question.seed)
        catalogue.save(folder)
        seconds = time.perf_counter() - begun
        nodes = np.diff(catalogue.trie.level_start).tolist()
        del catalogue  # the probe is to have the machine's memory to itself
        return CatalogueRow(
            items=items,
            codebook_sizes=(question.codebook,) * _LEVELS,
            nodes=nodes,
            made_seconds=round(seconds, 3),
            disk_bytes=sum(file.stat().st_size for file in folder.iterdir()),
            probe=_probe(folder, question),
        )


def _probe(folder: Path, question: CatalogueQuestion) -> Probe:
    options = [f"--k={question.k}", f"--excluded={question.excluded}"]
    command = [sys.executable, "-m", "atspeed.benchmarks.catalogue_probe", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)  # noqa: S603 - our own module
    if done.returncode:
        raise BenchmarkError(f"the catalogue's process ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return Probe(**json.loads(done.stdout))


async def measure_searches(root: Path, question: SearchQuestion) -> list[SearchRow]:
    """Against K, then against the history's length, cold and warm."""
    async with bare_runner(root, threads=question.threads) as runner:
        longest = runner.longest_history
        shapes = [(k, longest) for k in question.widths]
        shapes += [(question.k, items) for items in sorted({1, max(1, longest // 4), max(1, longest // 2)})]
        rows = []
        for k, items in dict.fromkeys(shapes):
            rows += await _searches(runner, k, items, question)
        return rows


async def _searches(runner: BareRunner, k: int, items: int, question: SearchQuestion) -> list[SearchRow]:
    """Users nobody knows yet, and the same users again."""
    rng = np.random.default_rng(question.seed)
    catalogue = runner.catalogue
    histories = rng.integers(catalogue.items, size=(question.repeats, items))
    prompts = [runner.prompt(map(catalogue.id_of, own), f"{k}/{items}") for own in histories.tolist()]
    rows = []
    for cold in (True, False):
        times, searches = [], []
        for prompt in prompts:
            begun = time.perf_counter_ns()
            searches.append(await runner.search(prompt, k))
            times.append(time.perf_counter_ns() - begun)
        rows.append(
            SearchRow(
                k=k,
                history_items=items,
                prompt_tokens=len(prompts[0].tokens),
                cold=cold,
                passes=max(search.passes for search in searches),
                search_ms=median_ms(times),
                forward_ms=median_ms(search.cost.forward_ns for search in searches),
                constraint_ms=median_ms(search.cost.selection_ns for search in searches),
            )
        )
    return rows


def header(question: CatalogueQuestion, searches: SearchQuestion | None) -> dict[str, Any]:
    """What a result file says beside its rows."""
    return {"benchmark": NAME, "catalogues": asdict(question), "searches": asdict(searches) if searches else None}


def to_json(catalogues: Sequence[CatalogueRow], searches: Sequence[SearchRow]) -> list[dict[str, Any]]:
    """The rows, for a result file; `kind` tells them apart."""
    return [
        *({"kind": "catalogue", **asdict(row)} for row in catalogues),
        *({"kind": "search", **asdict(row)} for row in searches),
    ]


def from_json(result: Result) -> tuple[list[CatalogueRow], list[SearchRow]]:
    """The rows of a result file. Raises BenchmarkError when it is another benchmark's."""
    if result.header.get("benchmark") != NAME:
        raise BenchmarkError("the result is not one of `bench scaling`")
    rows = [(row["kind"], {name: value for name, value in row.items() if name != "kind"}) for row in result.rows]
    catalogues = [CatalogueRow(**{**row, "probe": Probe(**row["probe"])}) for kind, row in rows if kind == "catalogue"]
    return catalogues, [SearchRow(**row) for kind, row in rows if kind == "search"]


def tables(catalogues: Sequence[CatalogueRow], searches: Sequence[SearchRow]) -> list[Table]:
    """The rows, for people; a catalogue is a column, so that all of it fits on a screen."""
    names, *measures = zip(CATALOGUE_COLUMNS, *map(catalogue_cells, catalogues), strict=True)
    shown = [_table("Catalogues", names, measures)]
    if searches:
        shown.append(_table("Target-only searches", SEARCH_COLUMNS, [search_cells(row) for row in searches]))
    return shown


CATALOGUE_COLUMNS = (
    "items",
    "nodes",
    "load s",
    "resident MB",
    "peak MB",
    "disk MB",
    "find ms",
    "exclude ms",
    "allow ms",
    "constraint ms",
    "selection ms",
)
SEARCH_COLUMNS = (
    "K",
    "items",
    "prompt",
    "prefix",
    "passes",
    "search ms",
    "forward ms",
    "constraint ms",
    "constraint share",
)


def catalogue_cells(row: CatalogueRow) -> list[str]:
    """A row in the order of CATALOGUE_COLUMNS; the last two without and with excluded items."""
    probe = row.probe
    megabytes = (f"{size / 1e6:.0f}" for size in (probe.resident_bytes, probe.peak_bytes, row.disk_bytes))
    times = (f"{value:.2f}" for value in (probe.find_ms, probe.exclude_ms, probe.allow_ms))
    constraint = f"{probe.constraint_ms:.2f} / {probe.excluded_constraint_ms:.2f}"
    selection = f"{probe.selection_ms:.2f} / {probe.excluded_selection_ms:.2f}"
    counts = (f"{row.items:,}", f"{sum(row.nodes):,}", f"{probe.load_seconds:.2f}")
    return [*counts, *megabytes, *times, constraint, selection]


def search_cells(row: SearchRow) -> list[str]:
    """A row in the order of SEARCH_COLUMNS."""
    share = row.constraint_ms / row.search_ms if row.search_ms else 0.0
    counts = (row.k, row.history_items, row.prompt_tokens)
    times = (row.search_ms, row.forward_ms, row.constraint_ms)
    prefix = "cold" if row.cold else "warm"
    return [*map(str, counts), prefix, str(row.passes), *(f"{value:.2f}" for value in times), f"{share:.1%}"]


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    shown = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        shown.add_column(name.replace(" ", "\n"), justify="right")
    for line in lines:
        shown.add_row(*line)
    return shown
