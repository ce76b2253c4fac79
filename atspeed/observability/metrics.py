"""Declares Prometheus metrics; docs/metrics.md comes from the declarations too.

    PASSES = HistogramOf("atspeed_target_passes", "Target passes of a list.", ("track", "mode"), buckets=WHOLE)
    TREES = ReadGauge("atspeed_open_trees", "Token trees that requests hold.")

    class TargetMetrics:
        def __init__(self, trees: OpenTrees) -> None:
            self.registry = CollectorRegistry()
            self.passes = PASSES.build(self.registry)
            self.registry.register(Readings({TREES: lambda: len(trees)}))

A number that another object counts already is read from it at a scrape, in the exporter's thread. So a reading takes one number
and never iterates over what the event loop changes. Label values come from closed sets, without users, items, or texts of a
client or a model.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import ClassVar
from wsgiref.simple_server import WSGIServer

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

# Upper bounds of histogram buckets. SECONDS: from a small model's pass to a request's default deadline of 10 s. SIZES: tokens and
# nodes, up to the largest plan. WHOLE: passes and levels of a list.
SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 1, 2.5, 5, 10)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
WHOLE = tuple(range(9))

Labels = tuple[str, ...]
Read = Callable[[], float | Mapping[Labels, float]]
"""Returns a number, or one for each set of label values."""


@dataclass(frozen=True)
class Declared:
    """A declared metric.

    Attributes:
        name: exposed name.
        meaning: help text.
        labels: names of the labels.
        essential: True for a metric that operators watch. docs/metrics.md lists it first.
        kind: Prometheus type.
    """

    name: str
    meaning: str
    labels: Labels = ()
    essential: bool = field(default=False, kw_only=True)
    kind: ClassVar[str]


@dataclass(frozen=True)
class CounterOf(Declared):
    """A counter that is incremented where events happen."""

    kind = "counter"

    def build(self, registry: CollectorRegistry) -> Counter:
        """Make the counter in a registry."""
        return Counter(self.name, self.meaning, self.labels, registry=registry)


@dataclass(frozen=True)
class GaugeOf(Declared):
    """A gauge that is set where it changes."""

    kind = "gauge"

    def build(self, registry: CollectorRegistry) -> Gauge:
        """Make the gauge in a registry."""
        return Gauge(self.name, self.meaning, self.labels, registry=registry)


@dataclass(frozen=True)
class HistogramOf(Declared):
    """A histogram.

    Attributes:
        buckets: upper bounds of the buckets.
    """

    buckets: Sequence[float] = SECONDS
    kind = "histogram"

    def build(self, registry: CollectorRegistry) -> Histogram:
        """Make the histogram in a registry."""
        return Histogram(self.name, self.meaning, self.labels, registry=registry, buckets=self.buckets)


@dataclass(frozen=True)
class ReadCounter(Declared):
    """A counter that another object keeps."""

    kind = "counter"


@dataclass(frozen=True)
class ReadGauge(Declared):
    """A gauge that another object keeps."""

    kind = "gauge"


class Readings(Collector):
    """Numbers of other objects, read at each scrape."""

    def __init__(self, reads: Mapping[ReadCounter | ReadGauge, Read]) -> None:
        self._reads = dict(reads)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the current numbers."""
        for declared, read in self._reads.items():
            family = CounterMetricFamily if declared.kind == "counter" else GaugeMetricFamily
            series = family(declared.name, declared.meaning, labels=declared.labels)
            for labels, number in _series(read()).items():
                series.add_metric(labels, number)
            yield series


Reads = Mapping[ReadCounter | ReadGauge, Read]
"""Readings by declared metric."""


class SummedReadings(Collector):
    """Sums over several objects that come and go.

    The counts of a removed object stay in the sums, since Prometheus takes a falling counter for a restart.
    """

    def __init__(self, declared: Sequence[ReadCounter | ReadGauge]) -> None:
        self._declared = declared
        # An immutable value, as the exporter's thread may read it at any time.
        self._parts: tuple[Reads, ...] = ()

    def add(self, reads: Reads) -> None:
        """Add the readings of an object."""
        self._parts = (*self._parts, reads)

    def remove(self, reads: Reads) -> None:
        """Remove the readings of an object, and keep its counts."""
        counted = {declared: _frozen(_series(read())) for declared, read in reads.items() if declared.kind == "counter"}
        gone: Reads = counted
        self._parts = (*(part for part in self._parts if part is not reads), gone)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Return the current sums."""
        parts = self._parts
        reads: dict[ReadCounter | ReadGauge, Read] = {
            declared: partial(_sum, declared, parts) for declared in self._declared
        }
        return Readings(reads).collect()


def _series(value: float | Mapping[Labels, float]) -> Mapping[Labels, float]:
    return value if isinstance(value, Mapping) else {(): value}


def _frozen(series: Mapping[Labels, float]) -> Read:
    return lambda: series


def _sum(declared: ReadCounter | ReadGauge, parts: Sequence[Reads]) -> Mapping[Labels, float]:
    total: dict[Labels, float] = {}
    for part in parts:
        for labels, number in _series(part[declared]()).items() if declared in part else ():
            total[labels] = total.get(labels, 0) + number
    return total


CALLS = CounterOf(
    "atspeed_calls_total", "Finished calls by method and gRPC status.", ("method", "code"), essential=True
)
CALL_SECONDS = HistogramOf(
    "atspeed_call_seconds", "Duration of calls; of a stream as a whole.", ("method",), essential=True
)
IN_FLIGHT = GaugeOf("atspeed_calls_in_flight", "Running calls and open streams.", ("method",))
BUILD = ReadGauge(
    "atspeed_build_info", "1, with the versions of the software as labels.", ("service", "version", "python")
)
CALLER_CALLS = CounterOf(
    "atspeed_caller_calls_total",
    "Calls with a valid token, by the token's name in the token file; `jwt` for all callers with a JSON Web Token.",
    ("caller", "method"),
)
CERTIFICATE_EXPIRY = ReadGauge(
    "atspeed_certificate_expiry_timestamp_seconds",
    "End of validity of a certificate that the service uses, as Unix time; read from its file.",
    ("setting",),
    essential=True,
)
METRICS = (CALLS, CALL_SECONDS, IN_FLIGHT, BUILD, CALLER_CALLS, CERTIFICATE_EXPIRY)


class ServerMetrics:
    """The metrics of a server: its calls, its application and its process."""

    def __init__(self, service: str, application: Sequence[CollectorRegistry]) -> None:
        self.registry = CollectorRegistry()
        self.calls = CALLS.build(self.registry)
        self.seconds = CALL_SECONDS.build(self.registry)
        self.in_flight = IN_FLIGHT.build(self.registry)
        self.caller_calls = CALLER_CALLS.build(self.registry)
        build = (service, version("atspeed-serving"), platform.python_version())
        self.registry.register(Readings({BUILD: lambda: {build: 1}}))
        for part in application:
            self.registry.register(part)
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.GCCollector(registry=self.registry)


@contextmanager
def exposed(registry: CollectorRegistry, host: str, port: int) -> Iterator[int]:
    """Expose a registry over HTTP, from a thread of its own. Yields the port. Raises OSError if it cannot listen."""
    # Without this every series has a second one, with the time of its creation.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    server: WSGIServer
    thread: threading.Thread
    server, thread = prometheus_client.start_http_server(port, host, registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
