"""Traces that are off cost nothing; what is in those that are on, and what never is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

from atspeed.errors import StartupError
from atspeed.observability import tracing
from tests.observed import Collector
from tests.serving import LIVENESS_SECONDS

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
        yield collector


def test_without_tracing_every_span_is_the_same_nothing() -> None:
    with tracing.started("target", on=False):
        assert not tracing.on()
        assert tracing.span("pass", nodes=3) is tracing.span("plan")
        assert tracing.call("/atspeed.v1.TargetService/Evaluate", (("traceparent", CALLER),)) is tracing.span("plan")
        with tracing.span("pass") as span:
            span.set(tokens=1)
        tracing.past_span("pass", 0, 1, nodes=3)
        assert tracing.outgoing() == ()
        assert tracing.ids() == {}


def test_tracing_without_its_packages_is_a_reason_not_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "atspeed.observability.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(StartupError, match="tracing needs the extra `otel`"), tracing.started("target", on=True):
        pass


def test_a_span_hangs_below_the_call_that_it_serves_and_that_below_its_caller(collector: Collector) -> None:
    with tracing.started("target", on=True):
        assert tracing.on()
        metadata = (("traceparent", CALLER), ("baggage", "user=alice"), ("grpc-bin", b"\x00"))
        with tracing.call("/atspeed.v1.TargetService/Evaluate", metadata), tracing.span("pass", nodes=3) as span:
            span.set(tokens=7)
            ids, outgoing = tracing.ids(), dict(tracing.outgoing())
        assert tracing.ids() == {}
    inner, outer = sorted(collector.spans, key=lambda span: span.name != "pass")
    assert (outer.name, outer.parent_id, outer.service) == ("Evaluate", "b7ad6b7169203331", "atspeed-target")
    assert (outer.attributes["rpc.service"], outer.attributes["rpc.method"]) == ("atspeed.v1.TargetService", "Evaluate")
    assert (inner.parent_id, inner.attributes) == (outer.span_id, {"atspeed.nodes": 3, "atspeed.tokens": 7})
    assert ids == {"trace_id": inner.trace_id, "span_id": inner.span_id}
    assert inner.trace_id == outer.trace_id == CALLER.split("-")[1]
    assert outgoing == {"traceparent": f"00-{inner.trace_id}-{inner.span_id}-01"}
    assert b"alice" not in collector.raw


def test_a_span_may_be_made_when_it_is_over(collector: Collector) -> None:
    with tracing.started("target", on=True), tracing.call("/a.B/C", ()):
        begun_ns = time.perf_counter_ns()
        tracing.past_span("pass", begun_ns, begun_ns + 5_000_000, nodes=3)
    inner, outer = sorted(collector.spans, key=lambda span: span.name != "pass")
    assert (inner.name, inner.parent_id, inner.attributes) == ("pass", outer.span_id, {"atspeed.nodes": 3})
    assert inner.ended_ns - inner.begun_ns == 5_000_000
    assert abs(inner.begun_ns - outer.begun_ns) < 1e9 * LIVENESS_SECONDS


def test_an_exception_leaves_its_type_and_not_its_text(collector: Collector) -> None:
    with (
        tracing.started("target", on=True),
        pytest.raises(ValueError, match="hunter2"),
        tracing.call("/a.B/C", ()),
        tracing.span("pass"),
    ):
        raise ValueError("the password is hunter2")
    assert {span.attributes["error.type"] for span in collector.spans} == {"ValueError"}
    assert len(collector.spans) == 2
    assert b"hunter2" not in collector.raw
