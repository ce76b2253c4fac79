"""Write dashboards/atspeed.json from the panels below; `--check` exits 1 when the file is not what they give."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atspeed.configuration.generated_page import write_or_check

FILE = Path(__file__).parent / "dashboards" / "atspeed.json"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
ACROSS, WIDTH, HEIGHT = 3, 8, 8  # panels in a row, and their size in Grafana's grid of 24 columns

Queries = dict[str, str]
"""Legend -> query."""


@dataclass(frozen=True)
class Panel:
    """One graph. unit: Grafana's name of it."""

    title: str
    queries: Queries
    unit: str = "short"


def rate(counter: str, by: str, where: str = "") -> Queries:
    """How often something happens, for each value of some labels."""
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))
    return {legend: f"sum by ({by}) (rate({counter}{{{where}}}[$__rate_interval]))"}


def share(counter: str, by: str) -> Queries:
    """What part of all each value of a label has."""
    total = f"sum(rate({counter}[$__rate_interval]))"
    return {f"{{{{{by}}}}}": f"sum by ({by}) (rate({counter}[$__rate_interval])) / ignoring ({by}) group_left {total}"}


def quantiles(histogram: str, by: str, where: str = "") -> Queries:
    """p50 and p99 for each value of a label."""
    buckets = f"sum by (le, {by}) (rate({histogram}_bucket{{{where}}}[$__rate_interval]))"
    return {f"{{{{{by}}}}} p{level}": f"histogram_quantile(0.{level}, {buckets})" for level in (50, 99)}


def mean(histogram: str, by: str, where: str = "") -> Queries:
    """The mean for each value of a label."""
    total, count = (
        f"sum by ({by}) (rate({histogram}_{part}{{{where}}}[$__rate_interval]))" for part in ("sum", "count")
    )
    return {f"{{{{{by}}}}}": f"{total} / {count}"}


def level(gauge: str) -> Queries:
    """A gauge of each replica."""
    return {"{{job}} {{instance}}": gauge}


LISTS, STRICT = "atspeed_recommendations_total", 'mode="strict"'
PENDING_CANARY = 'atspeed_bundle_pending{track="canary"}'
FAILED = 'code=~"INTERNAL|UNKNOWN|UNAVAILABLE|DEADLINE_EXCEEDED|FAILED_PRECONDITION"'


def part(counter: str, by: str, where: str, of: str) -> Queries:
    """What part of one counter, for each value of a label, another one or some of its series are."""
    some, all_of = (f"sum by ({by}) (rate({name}[$__rate_interval]))" for name in (f"{counter}{{{where}}}", of))
    return {f"{{{{{by}}}}}": f"{some} / {all_of}"}


ROWS: Mapping[str, Sequence[Panel]] = {
    "Lists": [
        Panel("Lists per second", rate("atspeed_recommendations_total", "mode, code"), "reqps"),
        Panel("Latency of a list", quantiles("atspeed_stage_seconds", "mode", 'stage="total"'), "s"),
        Panel("Latency of a strict list by stage, mean", mean("atspeed_stage_seconds", "stage", 'mode="strict"'), "s"),
        Panel("Degraded lists by reason", rate("atspeed_degraded_total", "reason"), "reqps"),
        Panel("Target passes of a list, mean", mean("atspeed_target_passes", "mode")),
        Panel("Levels without a target pass, mean", mean("atspeed_accepted_levels", "mode")),
        Panel("Nodes of strict lists", rate("atspeed_nodes_total", "kind", 'mode="strict"'), "ops"),
        Panel("Short lists", rate("atspeed_short_lists_total", "instance"), "reqps"),
        Panel("Retried target streams", rate("atspeed_target_retries_total", "instance"), "ops"),
    ],
    "Exactness": [
        Panel("Shadow checks", rate("atspeed_shadow_checks_total", "outcome"), "ops"),
        Panel("Largest score gap", {"{{track}} {{instance}}": "atspeed_shadow_largest_gap"}),
        Panel(
            "Circuit breakers: speculation and draft",
            {
                "on {{track}} {{instance}}": "atspeed_speculation_enabled",
                "rests {{track}} {{instance}}": "atspeed_draft_circuit_open",
            },
        ),
    ],
    "Canary beside stable": [
        Panel(
            "Canary share of users",
            {"{{instance}}": "atspeed_canary_share", "being loaded {{job}} {{instance}}": PENDING_CANARY},
            "percentunit",
        ),
        Panel("Lists per second by track", rate(LISTS, "track, code"), "reqps"),
        Panel("Share of failed lists", part(LISTS, "track", FAILED, LISTS), "percentunit"),
        Panel("Latency of a strict list", quantiles("atspeed_stage_seconds", "track", f'{STRICT}, stage="total"'), "s"),
        Panel("Target passes of a strict list, mean", mean("atspeed_target_passes", "track", STRICT)),
        Panel(
            "Share of degraded lists",
            part("atspeed_degraded_total", "track", "", f'{LISTS}{{code="OK"}}'),
            "percentunit",
        ),
        Panel("Shadow checks by track", rate("atspeed_shadow_checks_total", "track, outcome"), "ops"),
    ],
    "Load": [
        Panel(
            "Running calls",
            {"{{job}} {{instance}}": "atspeed_admission_running / atspeed_admission_slots"},
            "percentunit",
        ),
        Panel(
            "Queued calls",
            {"{{job}} {{instance}}": "atspeed_admission_queued / atspeed_admission_queue_limit"},
            "percentunit",
        ),
        Panel("Calls in flight", {"{{method}}": "sum by (method) (atspeed_calls_in_flight)"}),
        Panel("Calls by status", rate("atspeed_calls_total", "method, code"), "reqps"),
        Panel("Latency of a call", quantiles("atspeed_call_seconds", "method"), "s"),
        Panel("Memory", level("process_resident_memory_bytes"), "bytes"),
    ],
    "Models": [
        Panel("Time of a pass", quantiles("atspeed_pass_seconds", "job", 'stage="forward"'), "s"),
        Panel("Queue time of a pass", quantiles("atspeed_pass_seconds", "job", 'stage="queue"'), "s"),
        Panel("Tokens of a pass", quantiles("atspeed_pass_tokens", "job")),
        Panel("Nodes of a pass", quantiles("atspeed_pass_nodes", "job")),
        Panel("Co-batched requests", quantiles("atspeed_pass_requests", "job")),
        Panel("Queued passes", level("atspeed_waiting_passes")),
        Panel("Measured over predicted time of a pass", quantiles("atspeed_pass_prediction_ratio", "model")),
        Panel("Requested plan size", quantiles("atspeed_plan_nodes_requested", "mode")),
        Panel("Nodes of a plan", quantiles("atspeed_plan_nodes", "proposal")),
        Panel("Draft passes of a plan, mean", mean("atspeed_plan_passes", "proposal")),
    ],
    "Prefix cache": [
        Panel("Prompt tokens by source of their KV", share("atspeed_prompt_tokens_total", "source"), "percentunit"),
        Panel(
            "Memory tier",
            {"{{job}} {{instance}}": "atspeed_kv_memory_bytes / atspeed_kv_memory_limit_bytes"},
            "percentunit",
        ),
        Panel("KV of open requests", level("atspeed_open_tree_kv_bytes"), "bytes"),
        Panel("Block lookups", rate("atspeed_kv_block_lookups_total", "tier, result"), "ops"),
        Panel("Evictions", rate("atspeed_kv_evictions_total", "job"), "ops"),
        Panel(
            "Redis",
            {
                f"{name} {{{{job}}}}": f"sum by (job) (rate(atspeed_kv_{name}_total[$__rate_interval]))"
                for name in ("redis_failures", "redis_skipped", "redis_invalid", "writes_dropped")
            },
            "ops",
        ),
        Panel("Reads below memory by decision", rate("atspeed_kv_redis_reads_total", "decision"), "ops"),
        Panel("Skipped writes", rate("atspeed_kv_redis_writes_skipped_total", "job"), "ops"),
        Panel("Open requests", level("atspeed_open_trees")),
        Panel("Pending writes", level("atspeed_kv_writes_pending")),
        Panel("Versions", {"{{job}} {{model_version}}": "count by (job, model_version) (atspeed_model_info)"}),
    ],
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
        "panels": [{"id": number, **panel} for number, panel in enumerate(_panels(), start=1)],
    }


def _panels() -> Iterator[dict[str, Any]]:
    top = 0
    for title, panels in ROWS.items():
        yield {
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
            "panels": [],
        }
        top += 1
        for place, panel in enumerate(panels):
            row, column = divmod(place, ACROSS)
            yield _graph(panel, {"x": column * WIDTH, "y": top + row * HEIGHT, "w": WIDTH, "h": HEIGHT})
        top += -(-len(panels) // ACROSS) * HEIGHT


def _graph(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": query, "legendFormat": legend}
        for number, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file, or check it."""
    return write_or_check(FILE, json.dumps(dashboard(), indent=1) + "\n", "make dashboard", arguments)


if __name__ == "__main__":
    sys.exit(main())
