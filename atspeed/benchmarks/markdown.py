"""Parts of pages about measurements: tables, where a result comes from, and plots that come out alike for the same numbers."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atspeed.engine.files.atomic_write import replace_text

_NOT_IN_FILE = {"Date": None, "Creator": None}


def write(page: Path, lines: Iterable[str]) -> Path:
    """Write a page, and its folder where there is none; its path."""
    replace_text(page, "\n".join(lines) + "\n")
    return page


def table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, and an empty line."""
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    yield from (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    yield ""


def figures(lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """What a page is most asked for: what a figure is of, and the figure."""
    yield from ("## In short", "")
    yield from table(("figure", "measured"), lines)


def item_range(items: Sequence[int | None]) -> str:
    """How long histories are, from the least and the most items."""
    least, most = items
    if most is None:
        return f"{least} items or more"
    return f"{least} to {most} items" if least != most else f"{most} items"


def origin(header: Mapping[str, Any], settings: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The command, bundle (if any), machine and versions of a result file's header. settings: more lines of the table."""
    machine = header["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    yield from ("```sh", shlex.join(header["command"]), "```", "")
    yield from table(
        ("", ""),
        [
            *(_bundle(header["bundle"]) if header["bundle"] else ()),
            *settings,
            ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"),
            ("revision", header["revision"] or "unknown"),
            ("versions", versions),
            ("measured", header["created_at"]),
        ],
    )


def _bundle(bundle: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "bundle", f"{bundle['name']}, version {bundle['version']}, scoring rule {bundle['scoring_rule']}"
    yield from ((role, model(bundle, role)) for role in bundle["parameters"])


def model(bundle: Mapping[str, Any], role: str) -> str:
    """A model's size, and whether it is inflated. bundle: that of a result file's header."""
    size = f"{bundle['parameters'][role]:,} parameters, {bundle['precision'][role]}"
    trained = bundle.get("inflated_from", {}).get(role)
    return f"{size}; *inflated*: computes what {trained:,} trained parameters compute" if trained else size


def plotting() -> AbstractContextManager[None]:
    """The style that plots are drawn and saved in."""
    return mpl.rc_context({"svg.hashsalt": "atspeed", "font.size": 9})


def save(figure: Figure, path: Path) -> None:
    """Write a plot as SVG, without what changes from run to run."""
    figure.savefig(path, format="svg", metadata=_NOT_IN_FILE)


def draw(path: Path, panels: Sequence[Callable[[Axes], None]]) -> None:
    """A plot of panels side by side, each drawn by its own function; one legend below, of what the first panel labels."""
    with plotting():
        figure = Figure(figsize=(3.4 * len(panels) + 0.8, 3.0), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for drawn, axis in zip(panels, axes, strict=True):
            drawn(axis)
            axis.grid(visible=True, alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save(figure, path)
