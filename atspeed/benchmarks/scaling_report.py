"""Page about `bench scaling`: scaling.md and its plot, from the result file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from atspeed.benchmarks import markdown
from atspeed.benchmarks.markdown import figures, origin, paragraphs, row_table
from atspeed.benchmarks.plots import draw, line
from atspeed.benchmarks.results import Result
from atspeed.benchmarks.scaling import CATALOGUE_COLUMNS, NAME, SEARCH_COLUMNS, CatalogueRow, SearchRow

_PLOT = "scaling.svg"


def write(result: Result, folder: Path) -> Path:
    """Write the page and its plot. Returns the page's path."""
    catalogues = result.rows_of(NAME, CatalogueRow, kind="catalogue")
    searches = result.rows_of(NAME, SearchRow, kind="search")
    draw(folder / _PLOT, [partial(_draw_times, catalogues), partial(_draw_memory, catalogues)])
    return markdown.write(folder / "scaling.md", _page(result.header, catalogues, searches))


def _page(
    header: Mapping[str, Any], catalogues: Sequence[CatalogueRow], searches: Sequence[SearchRow]
) -> Iterator[str]:
    asked = header["catalogues"]
    yield from paragraphs("# Scaling")
    yield from origin(header, [("threads", f"{header['searches']['threads']}")] if header["searches"] else [])
    yield from figures(_figures(header, catalogues, searches))
    yield from paragraphs(
        "## Catalogues",
        f"Synthetic ones, four codebooks of {asked['codebook']}. Each is loaded in a process of its own as a service loads it, "
        f"its version checked. Find, exclude, allow: a request that names {asked['excluded']:,} items (half the catalogue, where "
        f"it has fewer than twice as many). Constraint and selection: per pass of a target-only search with K = {asked['k']} on "
        "random logits, without and with these items excluded.",
        f"![times and memory by items]({_PLOT})",
    )
    yield from row_table(CATALOGUE_COLUMNS, catalogues)
    if searches:
        yield from paragraphs(
            "## Searches",
            "Target-only, of the bundle's target in one process; medians over users with random histories.",
        )
        yield from row_table(SEARCH_COLUMNS, searches)


def _figures(
    header: Mapping[str, Any], catalogues: Sequence[CatalogueRow], searches: Sequence[SearchRow]
) -> Iterator[tuple[str, str]]:
    """Yield the figures of the largest catalogue.

    The share of a pass is that of a pass of the bundle's target with as many beams and its longest prompt.
    """
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


def _draw_times(rows: Sequence[CatalogueRow], axis: Axes) -> None:
    items = [row.items for row in rows]
    for label, values in (
        ("constraint, per pass", [row.probe.constraint_ms for row in rows]),
        ("selection, per pass", [row.probe.selection_ms for row in rows]),
        ("find the excluded", [row.probe.find_ms for row in rows]),
        ("exclude", [row.probe.exclude_ms for row in rows]),
        ("allow", [row.probe.allow_ms for row in rows]),
    ):
        line(axis, items, values, label=label)
    axis.set_xscale("log")
    axis.set_xlabel("items")
    axis.set_ylabel("ms")


def _draw_memory(rows: Sequence[CatalogueRow], axis: Axes) -> None:
    items = [row.items for row in rows]
    line(axis, items, [row.probe.resident_bytes / 1e6 for row in rows], color="C5")
    line(axis, items, [row.disk_bytes / 1e6 for row in rows], color="C6")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("items")
    axis.set_ylabel("MB resident, on disk")
