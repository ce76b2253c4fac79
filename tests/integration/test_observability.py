"""Metrics, traces and logs of real services: operators find a request in them, and no history."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from atspeed.observability.metrics_docs import declared
from atspeed.rpc import wire
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import target_pb2
from tests.bundles import random_history
from tests.observed import Collector, ReceivedSpan, panels, scrape
from tests.serving import (
    LEVELS,
    LIVENESS_SECONDS,
    Client,
    EvaluateStream,
    models,
    request_of,
    resume,
    storm,
    suspend,
    until,
)

ROOT = Path(__file__).parents[2]
USER, TENANT = "a-user-whom-nobody-may-see", "a-tenant-too"
SEEN: dict[str, object] = {"metrics-port": 0, "tracing": True, "redis-timeout-seconds": 10}


@dataclass(frozen=True)
class Watched:
    """A stack whose spans arrive at a collector in this process."""

    stack: LocalStack
    collector: Collector

    def logged(self, name: str) -> list[dict[str, Any]]:
        """The lines of a service's log."""
        text = (self.stack.log_folder / f"{name}-0.log").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def watched(bundle: Path, redis_server: LocalRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    flags: dict[str, dict[str, object]] = {
        "draft": SEEN | {"kv-redis": "always"},
        "target": SEEN | {"kv-redis": "always", "threads": 1},
        "orchestrator": SEEN
        | {"draft-timeout-seconds": 30, "planner": "fixed", "shadow-share": 1, "shadow-concurrency": 64},
    }
    with Collector() as collector, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        folder = tmp_path_factory.mktemp("watched")
        with LocalStack(bundle, redis_url=redis_server.url, log_folder=folder, flags=flags) as stack:
            yield Watched(stack, collector)


@pytest.fixture
def client(watched: Watched, redis_url: str) -> Iterator[Client]:
    with Client(watched.stack.address) as client:
        yield client


def traced(client: Client, request_id: str = "", **fields: Any) -> tuple[str, pb.RecommendResponse]:
    """A list that the caller asks for inside a trace of its own, and the trace's id."""
    trace_id = secrets.token_hex(16)
    parent = f"00-{trace_id}-{secrets.token_hex(8)}-01"
    metadata = (("traceparent", parent), ("x-request-id", request_id or trace_id))
    request = pb.RecommendRequest(**{"k": 5, **fields})
    return trace_id, client.stub.Recommend(request, timeout=LIVENESS_SECONDS, wait_for_ready=True, metadata=metadata)


def roots(spans: Sequence[ReceivedSpan]) -> list[ReceivedSpan]:
    """Spans whose parent is not among them."""
    here = {span.span_id for span in spans}
    return [span for span in spans if span.parent_id not in here]


def whole(spans: Sequence[ReceivedSpan]) -> bool:
    """Return true if the whole trace is there: the call, the calls that it made, and the shadow check after it."""
    names = {span.name.split()[0] for span in spans}
    written = {"SET", "EVAL"} & names
    return {"Recommend", "Plan", "Evaluate", "shadow"} <= names and bool(written) and len(roots(spans)) == 1


def test_one_request_is_one_trace_through_three_services_and_redis(
    watched: Watched, client: Client, catalogue: Catalogue
) -> None:
    client.record(USER, random_history(catalogue, 20, seed=4))
    trace_id, reply = traced(client, user_id=USER)
    until(lambda: whole(watched.collector.of(trace_id)))
    spans = watched.collector.of(trace_id)
    assert {(span.service.removeprefix("atspeed-"), span.name) for span in spans} >= {
        *(("orchestrator", name) for name in ("Recommend", "recommend", "history", "plan", "evaluate", "select")),
        *(("draft", name) for name in ("Plan", "cache lookup", "pass")),
        *(("target", name) for name in ("Evaluate", "cache lookup", "pass")),
    }
    redis = {span.service.removeprefix("atspeed-") for span in spans if span.attributes.get("db.system") == "redis"}
    assert redis == {"orchestrator", "draft", "target"}
    assert [span.name for span in roots(spans)] == ["Recommend"]
    (own,) = (span.attributes for span in spans if span.name == "recommend")
    statistics = reply.statistics
    assert (own["atspeed.k"], own["atspeed.mode"], own["atspeed.degraded"]) == (5, "strict", False)
    assert own["atspeed.target_passes"] == statistics.target_passes
    assert own["atspeed.nodes_drafted"] == statistics.nodes_drafted
    assert own["atspeed.cached_tokens"] == sum(statistics.cached_tokens.values())
    drafted = {span.span_id for span in spans if span.name == "Plan"}
    passes = [span for span in spans if span.name == "pass" and span.parent_id in drafted]
    assert len(passes) == statistics.draft_passes


def test_every_log_line_of_a_request_carries_its_trace_and_its_request_id(
    watched: Watched, client: Client, catalogue: Catalogue
) -> None:
    """In all three services, whichever of the two one looks for; and each names the span that it belongs to."""
    client.record(USER, random_history(catalogue, 20, seed=5))
    request_id = secrets.token_hex(8)
    trace_id, _ = traced(client, request_id, user_id=USER)
    ids = {"trace_id": trace_id, "request_id": request_id}

    def lines() -> dict[str, list[dict[str, Any]]]:
        found = {name: watched.logged(name) for name in ("orchestrator", "draft", "target")}
        return {name: [line for line in logged if ids.items() & line.items()] for name, logged in found.items()}

    def spans() -> dict[str, str]:
        return {span.span_id: span.service.removeprefix("atspeed-") for span in watched.collector.of(trace_id)}

    until(lambda: all(lines().values()) and whole(watched.collector.of(trace_id)))
    until(lambda: all(line["span_id"] in spans() for logged in lines().values() for line in logged))
    found = [line for logged in lines().values() for line in logged]
    assert all(ids.items() <= line.items() for line in found)
    assert {line["method"].rpartition("/")[2] for line in found if line["event"] == "call"} == {
        "Recommend",
        "Plan",
        "Evaluate",
    }
    for name, logged in lines().items():
        assert {spans()[line["span_id"]] for line in logged} == {name}


def test_neither_traces_nor_metrics_nor_logs_name_a_user_or_an_item(
    watched: Watched, client: Client, catalogue: Catalogue
) -> None:
    history = random_history(catalogue, 20, seed=6)
    events = [pb.Event(item_id=item) for item in history]
    client.stub.RecordEvents(pb.RecordEventsRequest(user_id=USER, tenant=TENANT, events=events))
    trace_id, reply = traced(client, user_id=USER, tenant=TENANT, excluded_item_ids=history)
    with pytest.raises(grpc.RpcError):
        client.recommend(user_id=f"{USER}-unknown")
    until(lambda: whole(watched.collector.of(trace_id)))
    told = [watched.collector.raw.decode("utf-8", "replace")]
    for service in watched.stack.services:
        told += [service.log.read_text(encoding="utf-8"), scrape(service).text]
    for name in (USER, TENANT, "item-", *history, *(item.item_id for item in reply.items)):
        assert not any(name in text for text in told)


def test_metrics_are_what_the_services_declare(watched: Watched) -> None:
    sections = declared()
    for service, titles in {
        "orchestrator": ["every service", "orchestrator"],
        "target": ["every service", "target and draft"],
        "draft": ["every service", "target and draft", "draft"],
    }.items():
        (process, *_) = getattr(watched.stack, f"{service}s")
        kinds = scrape(process).kinds
        expected = {metric.name: metric.kind for title in titles for metric in sections[title]}
        ours = {name: kind for name, kind in kinds.items() if name.startswith("atspeed_")}
        assert ours == expected
        assert "process_resident_memory_bytes" in kinds


def test_a_list_is_counted_with_all_it_took(watched: Watched, client: Client, catalogue: Catalogue) -> None:
    (orchestrator,), (target,), (draft,) = watched.stack.orchestrators, watched.stack.targets, watched.stack.drafts
    before = [scrape(service) for service in (orchestrator, target, draft)]
    _, reply = traced(client, history=pb.History(item_ids=random_history(catalogue, 7, seed=7)), k=9)
    until(
        lambda: (
            scrape(orchestrator).total("atspeed_shadow_checks_total") > before[0].total("atspeed_shadow_checks_total")
        )
    )
    after = [scrape(service) for service in (orchestrator, target, draft)]

    def rise(service: int, name: str, **labels: str) -> float:
        return after[service].total(name, **labels) - before[service].total(name, **labels)

    statistics, strict = reply.statistics, {"mode": "strict"}
    assert rise(0, "atspeed_recommendations_total", code="OK", **strict) == 1
    assert rise(0, "atspeed_calls_total", method="Recommend", code="OK") == 1
    assert rise(0, "atspeed_target_passes_sum", **strict) == statistics.target_passes
    assert rise(0, "atspeed_accepted_levels_sum", **strict) == statistics.accepted_levels
    assert rise(0, "atspeed_nodes_total", kind="drafted", **strict) == statistics.nodes_drafted
    assert rise(0, "atspeed_nodes_total", kind="used", **strict) == statistics.nodes_used
    assert rise(0, "atspeed_stage_seconds_sum", stage="total", **strict) == pytest.approx(
        statistics.stage_times.total_ms / 1e3
    )
    assert rise(0, "atspeed_shadow_checks_total", outcome="identical") == 1
    assert rise(2, "atspeed_plan_passes_sum", proposal="top") == statistics.draft_passes
    assert rise(2, "atspeed_pass_seconds_count", stage="forward") == statistics.draft_passes
    # The list's own passes and those of its shadow check, which has the prompt in memory.
    assert rise(1, "atspeed_pass_seconds_count", stage="forward") == statistics.target_passes + LEVELS
    assert rise(1, "atspeed_pass_seconds_count", stage="lookup") == 2
    assert rise(1, "atspeed_prompt_tokens_total") == 2 * statistics.prompt_tokens
    assert after[1].value("atspeed_open_trees") == 0
    assert 0 < after[1].value("atspeed_kv_memory_bytes") <= after[1].value("atspeed_kv_memory_limit_bytes")


def test_refusals_are_counted_by_their_status(watched: Watched, client: Client) -> None:
    (orchestrator,) = watched.stack.orchestrators
    before = scrape(orchestrator)
    with pytest.raises(grpc.RpcError):
        client.recommend(user_id=f"{USER}-unknown")
    with pytest.raises(grpc.RpcError):
        client.recommend(["x"], k=100_000)

    def rise(name: str, code: str) -> float:
        return scrape(orchestrator).total(name, code=code) - before.total(name, code=code)

    # A refusal is sent before it is counted.
    until(lambda: rise("atspeed_calls_total", "INVALID_ARGUMENT") == 1)
    assert rise("atspeed_recommendations_total", "NOT_FOUND") == 1
    assert rise("atspeed_calls_total", "NOT_FOUND") == 1


def test_lists_that_a_hanging_target_makes_late_are_counted_as_late(watched: Watched, client: Client) -> None:
    """gRPC cancels the handler at the deadline: they were counted as CANCELLED, and no alert looks at that."""
    (orchestrator,), (target,) = watched.stack.orchestrators, watched.stack.targets
    client.recommend(["item-1"])
    before = scrape(orchestrator)

    def rise(name: str) -> float:
        return scrape(orchestrator).total(name, code="DEADLINE_EXCEEDED") - before.total(name, code="DEADLINE_EXCEEDED")

    suspend(target)
    try:
        with pytest.raises(grpc.RpcError) as late:
            client.stub.Recommend(request_of(["item-1"]), timeout=1.0)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: rise("atspeed_recommendations_total") == 1)
        until(lambda: rise("atspeed_calls_total") >= 1)
    finally:
        resume(target)


def test_an_open_stream_is_seen_with_its_keys_and_values(watched: Watched, client: Client) -> None:
    (target,) = watched.stack.targets
    version = client.info().versions.target_model
    with models(target.address) as channel, EvaluateStream(channel) as stream:
        prompt = np.arange(1, 6, dtype=np.int64)
        start = target_pb2.EvaluateStart(model_version=version, prompt=wire.to_array(prompt))
        stream.ask(target_pb2.EvaluateRequest(start=start, nodes=wire.to_array(np.array([0], dtype=np.int32))))
        seen = scrape(target)
        assert seen.value("atspeed_open_trees") == 1
        assert seen.value("atspeed_open_tree_kv_bytes") > 0
        assert seen.value("atspeed_calls_in_flight", method="Evaluate") == 1
    until(lambda: scrape(target).value("atspeed_open_trees") == 0)
    until(lambda: scrape(target).value("atspeed_calls_in_flight", method="Evaluate") == 0)


def test_hundreds_of_random_lists_are_never_suspected(watched: Watched, client: Client, catalogue: Catalogue) -> None:
    (orchestrator,) = watched.stack.orchestrators
    lists = 120
    histories = [random_history(catalogue, 1 + seed % 12, seed) for seed in range(lists)]
    before = client.info().shadow_checks
    storm([partial(client.recommend, history, k=1 + seed % 20) for seed, history in enumerate(histories)], {})

    def checked() -> int:
        now = client.info().shadow_checks
        return now.identical - before.identical

    until(
        lambda: (
            checked() + scrape(orchestrator).value("atspeed_shadow_checks_total", track="stable", outcome="dropped")
            >= lists
        )
    )
    checks = client.info().shadow_checks
    assert checked() > lists // 2
    assert checks.different == 0
    assert not checks.speculation_off
    assert scrape(orchestrator).value("atspeed_speculation_enabled", track="stable") == 1


@pytest.fixture
def prometheus(watched: Watched, client: Client, catalogue: Catalogue, tmp_path: Path) -> Iterator[str]:
    """A real Prometheus with the rules of deploy/, before these services, which have made a list; its address."""
    if (binary := shutil.which("prometheus")) is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    client.recommend(random_history(catalogue, 5, seed=1))
    jobs = {"orchestrator": watched.stack.orchestrators, "target": watched.stack.targets, "draft": watched.stack.drafts}
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "deploy" / "prometheus" / "alerts.yml")],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{one.metrics_port}" for one in services]}]}
            for job, services in jobs.items()
        ],
    }
    (tmp_path / "prometheus.json").write_text(json.dumps(configuration))  # JSON is YAML
    command = [
        binary,
        f"--config.file={tmp_path / 'prometheus.json'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        "--web.listen-address=127.0.0.1:0",
        "--log.format=json",
    ]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            until(lambda: bool(listening(process, tmp_path / "log")))
            yield listening(process, tmp_path / "log")
        finally:
            process.terminate()


def listening(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the address of Prometheus's port 0, from its log; empty before it is logged."""
    text = log.read_text(encoding="utf-8")
    assert process.poll() is None, text
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return next((told["address"] for told in map(json.loads, whole) if told.get("msg") == "Listening on"), "")


def asked(address: str, path: str, **parameters: str) -> Any:
    """Return Prometheus's answer; None while there is none."""
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=LIVENESS_SECONDS) as reply:
            return json.load(reply)["data"]
    except urllib.error.HTTPError as refusal:
        if refusal.code == 503:  # it listens, but is not ready yet
            return None
        raise AssertionError(f"{parameters}: {refusal.read().decode()}") from None
    except urllib.error.URLError:
        return None


def test_a_real_prometheus_takes_dashboard_and_rules(prometheus: str) -> None:
    """Every query of the dashboard is one, every rule is healthy, all services are up, nothing fires or is about to."""
    until(lambda: len((asked(prometheus, "query", query="up == 1") or {}).get("result", ())) == 3)
    for panel in panels():
        for query in panel.queries:
            assert asked(prometheus, "query", query=query.replace("$__rate_interval", "1m"))["resultType"] == "vector"

    def rules(what: str) -> set[str]:
        return {rule[what] for group in asked(prometheus, "rules")["groups"] for rule in group["rules"]}

    until(lambda: rules("health") == {"ok"})
    # Before the first scrape no target is known. Lists were made before that, so how long they took is not seen.
    until(lambda: rules("state") == {"inactive"})
    until(lambda: bool(asked(prometheus, "query", query="sum(rate(atspeed_pass_nodes_count[1m])) >= 0")["result"]))
    assert rules("state") == {"inactive"}
    assert asked(prometheus, "query", query='count_over_time(ALERTS{alertstate="firing"}[1h])')["result"] == []
