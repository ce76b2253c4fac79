"""Sends OpenTelemetry spans over OTLP/gRPC. Needs the extra `otel`.

The standard OTEL_* variables name the collector. The spans of calls are our own: opentelemetry-instrumentation-grpc takes every
method with a response stream for an async generator, and leaks its context when such a generator is closed. The Redis package is
used; it sends the names of commands without arguments. The trace travels as W3C `traceparent`. Baggage does not travel, as it may
hold anything.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.redis import RedisInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from atspeed.observability.otlp_variables import check_otlp_variables
from atspeed.observability.tracing import Metadata, Value

# Chosen: a collector that does not answer must not delay the end of a process for longer.
_SHUTDOWN_SECONDS = 3.0
_PROPAGATOR = TraceContextTextMapPropagator()


class OpenTelemetry:
    """Makes the spans of this process. `tracing` calls it."""

    def __init__(self, service: str) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME") or f"atspeed-{service}"
        release = version("atspeed-serving")
        check_otlp_variables()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": name, "service.version": release}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(_WithoutTexts(OTLPSpanExporter())))
        self._tracer = self._provider.get_tracer("atspeed", release)
        self._redis = RedisInstrumentor()
        self._redis.instrument(tracer_provider=self._provider)

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, Value]) -> Iterator[_Active]:
        """Start a span inside the current one."""
        with self._recorded(name, SpanKind.INTERNAL, None) as active:
            active.set(**attributes)
            yield active

    def past_span(self, name: str, begun_ns: int, ended_ns: int, attributes: Mapping[str, Value]) -> None:
        """Record a finished span inside the current one. Times are those of `time.perf_counter_ns`."""
        epoch_ns = time.time_ns() - time.perf_counter_ns()
        span = self._tracer.start_span(name, kind=SpanKind.INTERNAL, start_time=epoch_ns + begun_ns)
        _Active(span).set(**attributes)
        span.end(epoch_ns + ended_ns)

    @contextmanager
    def call(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> Iterator[_Active]:
        """Start the span of a served call."""
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        service, _, name = method.strip("/").rpartition("/")
        with self._recorded(name, SpanKind.SERVER, _PROPAGATOR.extract(carrier, context=Context())) as active:
            active.span.set_attributes({"rpc.system": "grpc", "rpc.service": service, "rpc.method": name})
            yield active

    def metadata(self) -> Metadata:
        """Return `traceparent`, and `tracestate` if there is one."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return tuple(carrier.items())

    def ids(self) -> Mapping[str, str]:
        """Return trace_id and span_id of the current span."""
        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            return {}
        return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}

    def stop(self) -> None:
        """Send the remaining spans."""
        self._redis.uninstrument()
        shutdown = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        shutdown.start()
        shutdown.join(_SHUTDOWN_SECONDS)

    @contextmanager
    def _recorded(self, name: str, kind: SpanKind, context: Context | None) -> Iterator[_Active]:
        """Start a span that records the type of an exception."""
        with self._tracer.start_as_current_span(
            name, context, kind, record_exception=False, set_status_on_exception=False
        ) as started:
            try:
                yield _Active(started)
            except BaseException as error:
                started.set_status(StatusCode.ERROR)
                started.set_attribute("error.type", type(error).__name__)
                raise


class _Active:
    def __init__(self, span: trace.Span) -> None:
        self.span = span

    def set(self, **attributes: Value) -> None:
        """Add attributes named `atspeed.<name>`."""
        self.span.set_attributes({f"atspeed.{name}": value for name, value in attributes.items()})


class _WithoutTexts(SpanExporter):
    """Exports spans without the texts of exceptions: without events, and with a status code only."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export the spans without texts."""
        return self._exporter.export([_without_texts(span) for span in spans])

    def shutdown(self) -> None:
        """Shut down the exporter."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Flush the exporter."""
        return self._exporter.force_flush(timeout_millis)


def _without_texts(span: ReadableSpan) -> ReadableSpan:
    types = [
        str(event.attributes["exception.type"])
        for event in span.events
        if event.name == "exception" and event.attributes
    ]
    kind = {"error.type": types[-1].rpartition(".")[2]} if types else {}
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes={**(span.attributes or {}), **kind},
        links=span.links,
        kind=span.kind,
        instrumentation_scope=span.instrumentation_scope,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
    )
