"""Services seen from outside: their metrics, and an OTLP collector that keeps the spans they send."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc
from prometheus_client.parser import text_string_to_metric_families

from atspeed.local.stack import ServiceProcess
from tests.serving import LIVENESS_SECONDS, until

DASHBOARD = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards" / "atspeed.json"


@dataclass(frozen=True)
class Scrape:
    """Metrics of a service at one time. kinds: type of each family, by the name of its series in Prometheus."""

    text: str
    kinds: Mapping[str, str]
    samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, **labels: str) -> float:
        """One series; 0 where it is not there yet."""
        return self.samples.get((name, frozenset(labels.items())), 0.0)

    def total(self, name: str, **labels: str) -> float:
        """The sum of all series that have these labels among theirs."""
        wanted = labels.items()
        return sum(
            value for (found, has), value in self.samples.items() if found == name and wanted <= dict(has).items()
        )


def scrape(service: ServiceProcess) -> Scrape:
    """Return the metrics of a service."""
    assert service.metrics_port is not None
    return scrape_port(service.metrics_port)


def lines_of(log: Path, request_id: str) -> list[dict[str, Any]]:
    """The lines of a request, once the one of its call's end is there; it is written after the reply."""

    def found() -> list[dict[str, Any]]:
        lines = (json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n"))
        return [line for line in lines if line.get("request_id") == request_id]

    until(lambda: any(line["event"] == "call" for line in found()))
    return found()


def scrape_port(port: int) -> Scrape:
    """Return the metrics of a port."""
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=LIVENESS_SECONDS) as reply:
        text = reply.read().decode()
    families = list(text_string_to_metric_families(text))
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    return Scrape(text, {exposed_name(family.name, family.type): family.type for family in families}, samples)


def exposed_name(name: str, kind: str) -> str:
    """The name of a family as it stands in the exposition: the parser takes `_total` off."""
    return f"{name}_total" if kind == "counter" and not name.endswith("_total") else name


@dataclass(frozen=True)
class DashboardPanel:
    """A graph of the dashboard and what it asks Prometheus for."""

    title: str
    queries: Sequence[str]


def panels() -> list[DashboardPanel]:
    """The graphs and numbers of deploy/grafana, with everything chosen that its variables let choose."""
    found = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [
        DashboardPanel(panel["title"], [_with_all(target["expr"]) for target in panel["targets"]])
        for panel in found
        if panel["type"] != "row"
    ]


def _with_all(query: str) -> str:
    for variable, every in {"job": "orchestrator|target|draft", "instance": ".*", "track": ".*"}.items():
        query = query.replace(f'{variable}=~"${variable}"', f'{variable}=~"{every}"')
    return query


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as the collector got it."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    begun_ns: int
    ended_ns: int
    attributes: Mapping[str, Any]


class Collector(otlp_grpc.TraceServiceServicer):
    """An OTLP/gRPC collector in this process. raw: every byte that it got."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self.raw = b""
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(4))
        otlp_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def Export(  # noqa: N802 - gRPC's name
        self, request: otlp.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> otlp.ExportTraceServiceResponse:
        """Keep a batch."""
        with self._lock:
            self.raw += request.SerializeToString()
            self.spans.extend(_spans(request))
        return otlp.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> list[ReceivedSpan]:
        """Return the spans of a trace so far."""
        with self._lock:
            return [span for span in self.spans if span.trace_id == trace_id]

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()


def _spans(request: otlp.ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for resource in request.resource_spans:
        service = _plain(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(
                    service=service,
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    begun_ns=span.start_time_unix_nano,
                    ended_ns=span.end_time_unix_nano,
                    attributes=_plain(span.attributes),
                )


def _plain(attributes: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in attributes}
