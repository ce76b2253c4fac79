"""Scaling with the size of the catalogue, the beams and the prompt.

Load time, memory and selection are measured against the catalogue; searches against their beams and prompts. Catalogues are
synthetic, and each is measured in its own process. Searches are target-only, of a bundle's model, in this process. The engine
is measured without gRPC.
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
import numpy.typing as npt
from rich.table import Table

from atspeed.benchmarks.catalogue_probe import Probe
from atspeed.benchmarks.in_process_baseline import InProcessBaseline, in_process_baseline, median_ms
from atspeed.benchmarks.results import BenchmarkError, Columns, cells, grid, terminal_table, to_json
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.id_index import Ids

NAME = "scaling"
SIZES = (10**4, 10**5, 10**6, 10**7)
WIDTHS = (1, 5, 10, 20, 50)
_LEVELS = 4  # as the trained bundles have
_ROOT = Path(__file__).parents[2]
_SKEW = 0.6  # exponent of the Zipf law of a level's codes: 10^7 items then fill a third of the third level's prefixes
_DIGITS = 9  # of synthetic ids


@dataclass(frozen=True)
class CatalogueRow:
    """One synthetic catalogue. nodes: nodes of its trie by depth, from the root. probe: cost for a process."""

    items: int
    codebook_sizes: Sequence[int]
    nodes: Sequence[int]
    made_seconds: float
    disk_bytes: int
    probe: Probe


@dataclass(frozen=True)
class SearchRow:
    """Target-only searches of K beams, medians in ms.

    Attributes:
        cold: True if nothing of the prompt was cached.
        forward_ms: time in the model, of all passes of a search together.
        constraint_ms: time to choose the best children of each node, of all passes together.
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
class CatalogueConfig:
    """Configuration of the catalogues. excluded: excluded items of a request."""

    sizes: Sequence[int] = SIZES
    codebook: int = 256
    k: int = 20
    excluded: int = 10_000
    seed: int = 1


@dataclass(frozen=True)
class SearchConfig:
    """Configuration of the searches: all widths with the longest history, all history lengths with `k` beams.

    repeats: users of each measurement.
    """

    widths: Sequence[int] = WIDTHS
    k: int = 20
    repeats: int = 15
    threads: int = 1
    seed: int = 1


def measure_catalogues(config: CatalogueConfig) -> list[CatalogueRow]:
    """Return one row per size, ascending."""
    return [_catalogue(items, config) for items in sorted(config.sizes)]


def _catalogue(items: int, config: CatalogueConfig) -> CatalogueRow:
    with tempfile.TemporaryDirectory() as temporary:
        folder, begun = Path(temporary), time.perf_counter()
        catalogue = synthetic_catalogue(items, (config.codebook,) * _LEVELS, config.seed)
        catalogue.save(folder)
        seconds = time.perf_counter() - begun
        nodes = np.diff(catalogue.trie.level_start).tolist()
        del catalogue  # frees the memory for the probe
        return CatalogueRow(
            items=items,
            codebook_sizes=(config.codebook,) * _LEVELS,
            nodes=nodes,
            made_seconds=round(seconds, 3),
            disk_bytes=sum(file.stat().st_size for file in folder.iterdir()),
            probe=_probe(folder, config),
        )


def _probe(folder: Path, config: CatalogueConfig) -> Probe:
    options = [f"--k={config.k}", f"--excluded={config.excluded}"]
    command = [sys.executable, "-m", "atspeed.benchmarks.catalogue_probe", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)  # noqa: S603 - our own module
    if done.returncode:
        raise BenchmarkError(f"the catalogue probe ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return Probe(**json.loads(done.stdout))


async def measure_searches(root: Path, config: SearchConfig) -> list[SearchRow]:
    """Measure searches by K, then by the history's length, cold and warm."""
    async with in_process_baseline(root, threads=config.threads) as baseline:
        longest = baseline.longest_history
        shapes = [(k, longest) for k in config.widths]
        shapes += [(config.k, items) for items in sorted({1, max(1, longest // 4), max(1, longest // 2)})]
        rows = []
        for k, items in dict.fromkeys(shapes):
            rows += await _searches(baseline, k, items, config)
        return rows


async def _searches(baseline: InProcessBaseline, k: int, items: int, config: SearchConfig) -> list[SearchRow]:
    """Search for users whom no cache knows, and for the same users again."""
    rng = np.random.default_rng(config.seed)
    catalogue = baseline.catalogue
    histories = rng.integers(catalogue.items, size=(config.repeats, items))
    prompts = [baseline.prompt(map(catalogue.id_of, own), f"{k}/{items}") for own in histories.tolist()]
    rows = []
    for cold in (True, False):
        times, searches = [], []
        for prompt in prompts:
            begun = time.perf_counter_ns()
            searches.append(await baseline.search(prompt, k))
            times.append(time.perf_counter_ns() - begun)
        rows.append(
            SearchRow(
                k=k,
                history_items=items,
                prompt_tokens=len(prompts[0].tokens),
                cold=cold,
                passes=max(search.passes for search in searches),
                search_ms=median_ms(times),
                forward_ms=median_ms(search.stats.forward_ns for search in searches),
                constraint_ms=median_ms(search.stats.selection_ns for search in searches),
            )
        )
    return rows


def header(config: CatalogueConfig, searches: SearchConfig | None) -> dict[str, Any]:
    """Return the header's fields."""
    return {"benchmark": NAME, "catalogues": asdict(config), "searches": asdict(searches) if searches else None}


def rows_to_json(catalogues: Sequence[CatalogueRow], searches: Sequence[SearchRow]) -> list[dict[str, Any]]:
    """Return the rows of the result file; `kind` tells them apart."""
    return [*to_json(catalogues, kind="catalogue"), *to_json(searches, kind="search")]


CATALOGUE_COLUMNS: Columns[CatalogueRow] = (
    ("items", lambda row: f"{row.items:,}"),
    ("nodes", lambda row: f"{sum(row.nodes):,}"),
    ("load s", lambda row: f"{row.probe.load_seconds:.2f}"),
    ("resident MB", lambda row: f"{row.probe.resident_bytes / 1e6:.0f}"),
    ("peak MB", lambda row: f"{row.probe.peak_bytes / 1e6:.0f}"),
    ("disk MB", lambda row: f"{row.disk_bytes / 1e6:.0f}"),
    ("find ms", lambda row: f"{row.probe.find_ms:.2f}"),
    ("exclude ms", lambda row: f"{row.probe.exclude_ms:.2f}"),
    ("allow ms", lambda row: f"{row.probe.allow_ms:.2f}"),
    # Without and with excluded items.
    ("constraint ms", lambda row: f"{row.probe.constraint_ms:.2f} / {row.probe.excluded_constraint_ms:.2f}"),
    ("selection ms", lambda row: f"{row.probe.selection_ms:.2f} / {row.probe.excluded_selection_ms:.2f}"),
)
SEARCH_COLUMNS: Columns[SearchRow] = (
    ("K", lambda row: str(row.k)),
    ("items", lambda row: str(row.history_items)),
    ("prompt", lambda row: str(row.prompt_tokens)),
    ("prefix", lambda row: "cold" if row.cold else "warm"),
    ("passes", lambda row: str(row.passes)),
    ("search ms", lambda row: f"{row.search_ms:.2f}"),
    ("forward ms", lambda row: f"{row.forward_ms:.2f}"),
    ("constraint ms", lambda row: f"{row.constraint_ms:.2f}"),
    ("constraint share", lambda row: f"{row.constraint_ms / row.search_ms if row.search_ms else 0.0:.1%}"),
)


def tables(catalogues: Sequence[CatalogueRow], searches: Sequence[SearchRow]) -> list[Table]:
    """Return the tables for the terminal. A catalogue is a column, so that all of it fits on a screen."""
    titles = [name for name, _ in CATALOGUE_COLUMNS]
    names, *measures = zip(titles, *cells(CATALOGUE_COLUMNS, catalogues), strict=True)
    shown = [grid("Catalogues", names, measures)]
    if searches:
        shown.append(terminal_table("Target-only searches", SEARCH_COLUMNS, searches))
    return shown


def synthetic_catalogue(items: int, codebook_sizes: tuple[int, ...], seed: int) -> Catalogue:
    """Make a catalogue of at most 10^9 items with skewed codes, as residual quantisation has them.

    Some items share a path. Ids have no relation to paths.
    """
    rng = np.random.default_rng(seed)
    codes = np.empty((items, len(codebook_sizes)), dtype=np.int32)
    for level, size in enumerate(codebook_sizes):
        share = np.arange(1, size + 1) ** -_SKEW
        # A code is the index of the interval of the cumulated shares in which a uniform number is.
        codes[:, level] = np.searchsorted(np.cumsum(share / share.sum())[:-1], rng.random(items))
    return Catalogue.build(_ids(rng.permutation(items)), codes, codebook_sizes)


def _ids(numbers: npt.NDArray[np.int64]) -> Ids:
    """Return ids of `B` and the number in digits; [n]."""
    letters = np.empty((len(numbers), 1 + _DIGITS), dtype=np.uint8)
    letters[:, 0] = ord("B")
    for place in range(_DIGITS, 0, -1):  # from the last digit to the first
        letters[:, place] = ord("0") + numbers % 10
        numbers = numbers // 10
    return letters.view(f"S{1 + _DIGITS}").ravel()
