"""Write docs/metrics.md from what the services declare to measure; `--check` exits 1 when the file is not what they give."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from atspeed.observability.metrics import Declared, HistogramOf

# By name: this package knows no service.
SECTIONS = {
    "every service": (
        "atspeed.observability.metrics",
        "atspeed.observability.admission_metrics",
        "atspeed.observability.bundle_metrics",
    ),
    "orchestrator": ("orchestrator.metrics",),
    "target and draft": ("atspeed.model_host.model_metrics",),
    "draft": ("draft_service.metrics",),
}
PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

INTRODUCTION = """\
# Metrics

Written by `make metrics-docs` from each service's `metrics.py`; do not edit. A service exposes them for Prometheus on
`--metrics-port`. Label values come from closed sets: no user, no item, no text of a client or a model.
Counters count from the start of a process.
"""


def declared() -> dict[str, Sequence[Declared]]:
    """What is measured, by the title of its section."""
    return {
        title: [metric for module in modules for metric in importlib.import_module(module).METRICS]
        for title, modules in SECTIONS.items()
    }


def page(sections: Mapping[str, Sequence[Declared]]) -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(_section(title, metrics) for title, metrics in sections.items())])


def _section(title: str, metrics: Sequence[Declared]) -> str:
    head = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([f"## {title}", "", *head, *map(_row, metrics), ""])


def _row(metric: Declared) -> str:
    kind = metric.kind
    if isinstance(metric, HistogramOf):
        kind += f", {metric.buckets[0]:g} to {metric.buckets[-1]:g}"
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {kind} | {labels} | {metric.meaning} |"


def main(arguments: Sequence[str] | None = None, path: Path = PAGE) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check, text = parser.parse_args(arguments).check, page(declared())
    if not check:
        path.write_text(text, encoding="utf-8")
        return 0
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{path.name} is stale, run `make metrics-docs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
