"""Pages about measurements in Markdown: tables, and where a result comes from."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atspeed.benchmarks.results import Columns, Row, cells
from atspeed.engine.files.atomic_write import replace_text


def write(page: Path, lines: Iterable[str]) -> Path:
    """Write a page, and its folder where there is none. Returns its path."""
    replace_text(page, "\n".join(lines) + "\n")
    return page


def table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a Markdown table and an empty line."""
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    yield from (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    yield ""


def row_table(columns: Columns[Row], rows: Iterable[Row]) -> Iterator[str]:
    """Yield a Markdown table of rows and an empty line."""
    return table([name for name, _ in columns], cells(columns, rows))


def paragraphs(*texts: str) -> Iterator[str]:
    """Yield texts, each with an empty line behind it."""
    for text in texts:
        yield from (text, "")


def figures(lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the section with the figures that readers look for first: a name and a figure a line."""
    yield from paragraphs("## In short")
    yield from table(("figure", "measured"), lines)


def item_range(items: Sequence[int | None]) -> str:
    """Return the lengths of histories in words, from the least and the most items."""
    least, most = items
    if most is None:
        return f"{least} items or more"
    return f"{least} to {most} items" if least != most else f"{most} items"


def command(header: Mapping[str, Any]) -> Iterator[str]:
    """Yield the command of a header as a code block."""
    yield from ("```sh", shlex.join(header["command"]), "```", "")


def origin(header: Mapping[str, Any], settings: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield the command, bundle (if any), machine and versions of a header. settings: more lines of the table."""
    machine = header["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    yield from command(header)
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
    """Return a model's size, and whether it is inflated. bundle: of a header."""
    size = f"{bundle['parameters'][role]:,} parameters, {bundle['precision'][role]}"
    trained = bundle.get("inflated_from", {}).get(role)
    return f"{size}; *inflated*: computes what {trained:,} trained parameters compute" if trained else size
