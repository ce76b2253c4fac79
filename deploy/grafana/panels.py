"""The rows and panels of the dashboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Queries = dict[str, str]
"""Legend -> query."""


@dataclass(frozen=True)
class Panel:
    """One graph. unit: Grafana's name of it. traced: whether its values lead to traces of requests that took as long."""

    title: str
    queries: Queries
    unit: str = "short"
    traced: bool = False


@dataclass(frozen=True)
class Headline:
    """One number. unit: Grafana's name of it. steps: values from which it is yellow, then red. alert: the alert about it."""

    title: str
    query: str
    unit: str
    steps: Sequence[float] = ()
    alert: str = ""


def rate(counter: str, by: str, where: str = "") -> Queries:
    """Rate of a counter, for each value of some labels."""
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))
    return {legend: f"sum by ({by}) (rate({counter}{{{where}}}[$__rate_interval]))"}


def share(counter: str, by: str) -> Queries:
    """Share of each value of a label in the rate of a counter."""
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
    """Rate of some series of a counter over the rate of `of`, for each value of a label."""
    some, all_of = (f"sum by ({by}) (rate({name}[$__rate_interval]))" for name in (f"{counter}{{{where}}}", of))
    return {f"{{{{{by}}}}}": f"{some} / {all_of}"}


TOTAL = f'{STRICT}, stage="total"'
OK_LISTS = f'sum(rate({LISTS}{{code="OK"}}[$__rate_interval]))'


def summed(counter: str, where: str = "") -> str:
    """Rate of all series of a counter."""
    return f"sum(rate({counter}{{{where}}}[$__rate_interval]))"


# The steps are those of the alerts, deploy/prometheus/alerts.yml; the first one is where its error budget begins to shrink.
HEADLINES: Sequence[Headline] = [
    Headline("Lists per second", OK_LISTS, "reqps", alert="AtspeedNoOrchestrator"),
    Headline(
        "p99 of a strict list",
        f"histogram_quantile(0.99, sum by (le) (rate(atspeed_stage_seconds_bucket{{{TOTAL}}}[$__rate_interval])))",
        "s",
        (0.5, 1.0),
        "AtspeedSlow",
    ),
    Headline(
        "Failed lists", f"{summed(LISTS, FAILED)} / {summed(LISTS)}", "percentunit", (0.001, 0.01), "AtspeedFailures"
    ),
    Headline(
        "Target passes of a strict list",
        f"{summed('atspeed_target_passes_sum', STRICT)} / {summed('atspeed_target_passes_count', STRICT)}",
        "short",
    ),
    Headline(
        "Drafted nodes that became beams",
        f"""{summed("atspeed_nodes_total", 'kind="used"')} / {summed("atspeed_nodes_total", 'kind="drafted"')}""",
        "percentunit",
    ),
    Headline(
        "Degraded lists",
        f"{summed('atspeed_degraded_total')} / {OK_LISTS}",
        "percentunit",
        (0.01, 0.05),
        "AtspeedDegraded",
    ),
]

ROWS: Mapping[str, Sequence[Panel]] = {
    "Lists": [
        Panel("Lists per second", rate("atspeed_recommendations_total", "mode, code"), "reqps"),
        Panel("Latency of a list", quantiles("atspeed_stage_seconds", "mode", 'stage="total"'), "s", traced=True),
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
                "speculation enabled {{track}} {{instance}}": "atspeed_speculation_enabled",
                "draft circuit open {{track}} {{instance}}": "atspeed_draft_circuit_open",
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
        Panel(
            "Latency of a strict list by track",
            quantiles("atspeed_stage_seconds", "track", f'{STRICT}, stage="total"'),
            "s",
            traced=True,
        ),
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
