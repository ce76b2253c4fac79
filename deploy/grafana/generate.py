"""Write dashboards/atspeed.json from panels.py; `--check` exits 1 when the file is not what they give."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from panels import HEADLINES, ROWS, Headline, Panel  # beside this file

from atspeed.configuration.generated_page import write_or_check
from atspeed.observability.metrics_docs import declared

FILE = Path(__file__).parent / "dashboards" / "atspeed.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
ACROSS, WIDTH, HEIGHT = 3, 8, 8  # panels in a row, and their size in Grafana's grid of 24 columns
HEADLINE_WIDTH, HEADLINE_HEIGHT = 4, 4
RUNBOOK = "${runbooks}/operations.md#"
TRACKED = {metric.name for metrics in declared().values() for metric in metrics if "track" in metric.labels}

# Requests of the orchestrator in the panel's time that took at least as long as the value, in Grafana's explorer.
TRACES = {
    "t": {
        "datasource": "${traces}",
        "queries": [
            {
                "refId": "A",
                "queryType": "search",
                "service": "orchestrator",
                "minDuration": "${__value.raw}s",
                "datasource": {"type": "jaeger", "uid": "${traces}"},
            }
        ],
        "range": {"from": "${__from}", "to": "${__to}"},
    }
}


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    return {
        "uid": "atspeed",
        "title": "atspeed",
        "tags": ["atspeed"],
        "schemaVersion": 41,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "editable": False,
        "templating": {"list": list(_variables())},
        "links": [_link("Alerts and what to do", f"{RUNBOOK}alerts") | {"type": "link", "icon": "doc", "tags": []}],
        "panels": [{"id": number, **panel} for number, panel in enumerate(_panels(), start=1)],
    }


def _variables() -> Iterator[dict[str, Any]]:
    """Variables of the dashboard: sources, services, replicas, tracks, and the address of the runbooks as in Prometheus."""
    for name, kind, label in (("datasource", "prometheus", "Metrics"), ("traces", "jaeger", "Traces")):
        chosen = {"text": kind.capitalize(), "value": kind}
        yield {"name": name, "label": label, "type": "datasource", "query": kind, "current": chosen}
    yield _values("job", "Service", "label_values(atspeed_calls_in_flight, job)")
    yield _values("instance", "Replica", 'label_values(atspeed_calls_in_flight{job=~"$job"}, instance)')
    yield _values("track", "Track", "label_values(atspeed_recommendations_total, track)")
    runbooks = {"text": "docs", "value": "docs"}
    yield {"name": "runbooks", "label": "Runbooks", "type": "textbox", "query": "docs", "current": runbooks}


def _values(name: str, label: str, query: str) -> dict[str, Any]:
    """A variable with the values of a label, by default all of them."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _chosen(query: str) -> str:
    """The query about the chosen services, replicas and tracks."""

    def selected(found: re.Match[str]) -> str:
        name, where = found[1], found[2] or ""
        family = re.sub("_(bucket|sum|count)$", "", name)
        labels = ["job", "instance", *(["track"] if TRACKED & {name, family} else [])]
        wanted = [where, *(f'{label}=~"${label}"' for label in labels if not re.search(rf"\b{label}=", where))]
        return f"{name}{{{', '.join(part for part in wanted if part)}}}"

    return re.sub(r"\b((?:atspeed|process)_\w+)(?:\{([^}]*)\})?", selected, query)


def _panels() -> Iterator[dict[str, Any]]:
    yield _row("Now", 0)
    for place, headline in enumerate(HEADLINES):
        yield _stat(headline, {"x": place * HEADLINE_WIDTH, "y": 1, "w": HEADLINE_WIDTH, "h": HEADLINE_HEIGHT})
    top = 1 + HEADLINE_HEIGHT
    for title, panels in ROWS.items():
        yield _row(title, top)
        top += 1
        for place, panel in enumerate(panels):
            row, column = divmod(place, ACROSS)
            yield _graph(panel, {"x": column * WIDTH, "y": top + row * HEIGHT, "w": WIDTH, "h": HEIGHT})
        top += -(-len(panels) // ACROSS) * HEIGHT


def _row(title: str, top: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": 24, "h": 1}
    return {"type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _stat(headline: Headline, place: dict[str, int]) -> dict[str, Any]:
    colours = zip(("green", "yellow", "red"), (None, *headline.steps), strict=False)
    steps = [{"color": colour, "value": value} for colour, value in colours]
    defaults = {"unit": headline.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    links = [_link(headline.alert, RUNBOOK + headline.alert.lower())] if headline.alert else []
    return {
        "type": "stat",
        "title": headline.title,
        "datasource": SOURCE,
        "gridPos": place,
        "links": links,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"},
        "targets": [_target(0, headline.query, "")],
    }


def _graph(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    panes = json.dumps(TRACES, separators=(",", ":"))
    links = [_link("Traces at least as long", f"/explore?schemaVersion=1&panes={panes}")] if panel.traced else []
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "links": links}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [_target(number, query, legend) for number, (legend, query) in enumerate(panel.queries.items())],
    }


def _target(number: int, query: str, legend: str) -> dict[str, Any]:
    return {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": _chosen(query), "legendFormat": legend}


def _link(title: str, url: str) -> dict[str, Any]:
    return {"title": title, "url": url, "targetBlank": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file, or check it."""
    return write_or_check(FILE, json.dumps(dashboard(), indent=1) + "\n", "make dashboard", arguments)


if __name__ == "__main__":
    sys.exit(main())
