"""Parts of pages about measurements: tables, where a result comes from, and plots that come out alike for the same numbers."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_NOT_IN_FILE = {"Date": None, "Creator": None}


def table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, and an empty line."""
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    yield from (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    yield ""


def origin(header: Mapping[str, Any], settings: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The command, the bundle, the machine and the versions of a result file's header. settings: more lines of the table."""
    bundle, machine = header["bundle"], header["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    yield from ("```sh", shlex.join(header["command"]), "```", "")
    yield from table(
        ("", ""),
        [
            ("bundle", f"{bundle['name']}, version {bundle['version']}, scoring rule {bundle['scoring_rule']}"),
            *((role, model(bundle, role)) for role in bundle["parameters"]),
            *settings,
            ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"),
            ("revision", header["revision"] or "unknown"),
            ("versions", versions),
            ("measured", header["created_at"]),
        ],
    )


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
