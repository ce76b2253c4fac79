"""A page about `bench scaling`: scaling.md and its plot, written from the result file alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from atspeed.benchmarks import markdown
from atspeed.benchmarks.markdown import draw, figures, origin, table
from atspeed.benchmarks.results import Result
from atspeed.benchmarks.scaling import (
    CATALOGUE_COLUMNS,
    SEARCH_COLUMNS,
    CatalogueRow,
    SearchRow,
    catalogue_cells,
    from_json,
    search_cells,
)

PAGE = "scaling.md"
_PLOT = "scaling.svg"


def write(result: Result, folder: Path) -> Path:
    """Write the page and its plot; the page's path. Raises BenchmarkError when the result is another benchmark's."""
    catalogues, searches = from_json(result)
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / _PLOT, [partial(_times, catalogues), partial(_memory, catalogues)])
    return markdown.write(folder / PAGE, _page(result.header, catalogues, searches))


def _page(
    header: Mapping[str, Any], catalogues: Sequence[CatalogueRow], searches: Sequence[SearchRow]
) -> Iterator[str]:
    asked = header["catalogues"]
    yield from ("# Scaling", "")
    yield from origin(header, [("threads", f"{header['searches']['threads']}")] if header["searches"] else [])
    yield from figures(_figures(header, catalogues, searches))
    yield from ("## Catalogues", "")
    yield (
        f"Synthetic ones, four codebooks of {asked['codebook']}. Each is loaded in a process of its own as a service loads it, "
        f"its version checked. Find, exclude, allow: a request that names {asked['excluded']:,} items (half the catalogue, where "
        f"it has fewer than twice as many). Constraint and selection: per pass of a target-only search with K = {asked['k']} on "
        "random logits, without and with these items excluded."
    )
    yield from ("", f"![times and memory by items]({_PLOT})", "")
    yield from table(CATALOGUE_COLUMNS, [catalogue_cells(row) for row in catalogues])
    if searches:
        yield from ("## Searches", "")
        yield from ("Target-only, of the bundle's target in one process; medians over users with random histories.", "")
        yield from table(SEARCH_COLUMNS, [search_cells(row) for row in searches])


def _figures(
    header: Mapping[str, Any], catalogues: Sequence[CatalogueRow], searches: Sequence[SearchRow]
) -> Iterator[tuple[str, str]]:
    """Of the largest catalogue; its share of a pass is that of the bundle's target with as many beams and its longest prompt."""
    largest = max(catalogues, key=lambda row: row.items)
    probe, name, k = largest.probe, f"{largest.items:,} items", header["catalogues"]["k"]
    yield f"{name}: seconds until loaded", f"{probe.load_seconds:.1f}"
    sizes = (f"{size / 1e6:,.0f}" for size in (probe.resident_bytes, probe.peak_bytes))
    yield f"{name}: MB resident, and at most while it loads", " / ".join(sizes)
    chosen = probe.constraint_ms + probe.selection_ms
    yield f"{name}: constraint and selection of a pass at K = {k}, ms", f"{chosen:.2f}"
    warm = [row for row in searches if row.k == k and not row.cold]
    if warm:
        row = max(warm, key=lambda row: row.prompt_tokens)
        model = row.forward_ms / row.passes
        yield (
            f"{name}: their share of a pass of the bundle's target, which takes {model:.1f} ms in the model",
            f"{chosen / (chosen + model):.1%}",
        )


def _times(rows: Sequence[CatalogueRow], axis: Axes) -> None:
    items = [row.items for row in rows]
    for label, values in (
        ("constraint, per pass", [row.probe.constraint_ms for row in rows]),
        ("selection, per pass", [row.probe.selection_ms for row in rows]),
        ("find the excluded", [row.probe.find_ms for row in rows]),
        ("exclude", [row.probe.exclude_ms for row in rows]),
        ("allow", [row.probe.allow_ms for row in rows]),
    ):
        axis.plot(items, values, marker="o", markersize=3, label=label)
    axis.set_xscale("log")
    axis.set_xlabel("items")
    axis.set_ylabel("ms")


def _memory(rows: Sequence[CatalogueRow], axis: Axes) -> None:
    items = [row.items for row in rows]
    axis.plot(items, [row.probe.resident_bytes / 1e6 for row in rows], marker="o", markersize=3, color="C5")
    axis.plot(items, [row.disk_bytes / 1e6 for row in rows], marker="o", markersize=3, color="C6")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("items")
    axis.set_ylabel("MB resident, on disk")
