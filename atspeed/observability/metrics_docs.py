"""Writes docs/metrics.md from the declared metrics. `--check` compares."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from atspeed.configuration.generated_page import write_or_check
from atspeed.observability.metrics import Declared, HistogramOf

# Names instead of imports: this package must not import a service.
SECTIONS = {
    "every service": (
        "atspeed.observability.metrics",
        "atspeed.observability.admission_metrics",
        "atspeed.observability.bundle_metrics",
    ),
    "orchestrator": ("orchestrator.metrics",),
    "target and draft": ("atspeed.model_host.model_metrics",),
    "draft": ("draft_service.metrics",),
    "consumer of events": ("atspeed.event_consumer.metrics",),
}
PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

INTRODUCTION = """\
# Metrics

`make metrics-docs` writes this page from each service's `metrics.py`; do not edit it.
A service exposes its metrics for Prometheus on `--metrics-port`.
Label values come from closed sets, without users, items, or texts of a client or a model.
Counters count from the start of a process.
The essential metrics are those that operators watch. The advanced ones explain them.
"""


_HEAD = ("| metric | kind | labels | meaning |", "| --- | --- | --- | --- |")


def declared() -> dict[str, Sequence[Declared]]:
    """Return the declared metrics by section."""
    return {
        title: [metric for module in modules for metric in importlib.import_module(module).METRICS]
        for title, modules in SECTIONS.items()
    }


def page(sections: Mapping[str, Sequence[Declared]]) -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    for title, essential in (("Essential metrics", True), ("Advanced metrics", False)):
        parts.append(f"## {title}\n")
        for section, metrics in sections.items():
            if rows := [_row(metric) for metric in metrics if metric.essential is essential]:
                parts.append("\n".join([f"### {section}", "", *_HEAD, *rows, ""]))
    return "\n".join(parts)


def _row(metric: Declared) -> str:
    kind = metric.kind
    if isinstance(metric, HistogramOf):
        kind += f", {metric.buckets[0]:g} to {metric.buckets[-1]:g}"
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {kind} | {labels} | {metric.meaning} |"


def main(arguments: Sequence[str] | None = None, path: Path = PAGE) -> int:
    """Write the page, or check it."""
    return write_or_check(path, page(declared()), "make metrics-docs", arguments)


if __name__ == "__main__":
    sys.exit(main())
