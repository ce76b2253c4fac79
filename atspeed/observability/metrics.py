"""Metrics for Prometheus, declared once, as data: the exposition and docs/metrics.md both come from the declarations.

    PASSES = HistogramOf("atspeed_target_passes", "Target passes of a list.", ("track", "mode"), buckets=WHOLE)
    TREES = ReadGauge("atspeed_open_trees", "Token trees that requests hold.")

    class TargetMetrics:
        def __init__(self, trees: OpenTrees) -> None:
            self.registry = CollectorRegistry()
            self.passes = PASSES.build(self.registry)
            self.registry.register(Readings({TREES: lambda: len(trees)}))

What another object counts already is read from it when Prometheus asks, in the exporter's thread: so a reader takes one
look at a number and never walks through what the event loop changes. Label values come from closed sets; no user, no item
and no text of a client or a model is ever one.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import ClassVar
from wsgiref.simple_server import WSGIServer

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

# Upper ends of buckets: of seconds from 1 ms to 10 s, of tokens and nodes, of passes and levels.
SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 1, 2.5, 5, 10)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
WHOLE = tuple(range(9))

Labels = tuple[str, ...]
Read = Callable[[], float | Mapping[Labels, float]]
"""A number, or one for each set of label values."""


@dataclass(frozen=True)
class Declared:
    """A family of series. name: as it is exposed. labels: their names."""

    name: str
    meaning: str
    labels: Labels = ()
    kind: ClassVar[str]


@dataclass(frozen=True)
class CounterOf(Declared):
    """Something that is counted where it happens."""

    kind = "counter"

    def build(self, registry: CollectorRegistry) -> Counter:
        """The counter, in a registry."""
        return Counter(self.name, self.meaning, self.labels, registry=registry)


@dataclass(frozen=True)
class GaugeOf(Declared):
    """A level that is set where it changes."""

    kind = "gauge"

    def build(self, registry: CollectorRegistry) -> Gauge:
        """The gauge, in a registry."""
        return Gauge(self.name, self.meaning, self.labels, registry=registry)


@dataclass(frozen=True)
class HistogramOf(Declared):
    """A distribution. buckets: their upper ends."""

    buckets: Sequence[float] = SECONDS
    kind = "histogram"

    def build(self, registry: CollectorRegistry) -> Histogram:
        """The histogram, in a registry."""
        return Histogram(self.name, self.meaning, self.labels, registry=registry, buckets=self.buckets)


@dataclass(frozen=True)
class ReadCounter(Declared):
    """A count that another object keeps."""

    kind = "counter"


@dataclass(frozen=True)
class ReadGauge(Declared):
    """A level that another object knows."""

    kind = "gauge"


class Readings(Collector):
    """Numbers that other objects own, read whenever somebody asks."""

    def __init__(self, reads: Mapping[ReadCounter | ReadGauge, Read]) -> None:
        self._reads = dict(reads)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """All of them as they stand now."""
        for declared, read in self._reads.items():
            family = CounterMetricFamily if declared.kind == "counter" else GaugeMetricFamily
            series = family(declared.name, declared.meaning, labels=declared.labels)
            for labels, number in _series(read()).items():
                series.add_metric(labels, number)
            yield series


Reads = Mapping[ReadCounter | ReadGauge, Read]
"""Numbers by what they are of."""


class SummedReadings(Collector):
    """The sums of what several objects count of which some come and go. What the counters of those that went had come to stays
    in the sums: a counter that falls reads like a restart.
    """

    def __init__(self, declared: Sequence[ReadCounter | ReadGauge]) -> None:
        self._declared = declared
        # One value, as the exporter's thread may look at any time.
        self._parts: tuple[Reads, ...] = ()

    def add(self, reads: Reads) -> None:
        """One more that counts."""
        self._parts = (*self._parts, reads)

    def remove(self, reads: Reads) -> None:
        """One that was added has gone."""
        counted = {declared: _frozen(_series(read())) for declared, read in reads.items() if declared.kind == "counter"}
        gone: Reads = counted
        self._parts = (*(part for part in self._parts if part is not reads), gone)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """All sums as they stand now."""
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


CALLS = CounterOf("atspeed_calls_total", "Calls that ended, by method and gRPC status.", ("method", "code"))
CALL_SECONDS = HistogramOf("atspeed_call_seconds", "How long calls took, streams from first to last.", ("method",))
IN_FLIGHT = GaugeOf("atspeed_calls_in_flight", "Calls that are being served; an open stream is one.", ("method",))
BUILD = ReadGauge("atspeed_build_info", "1, with the versions of the software.", ("service", "version", "python"))
METRICS = (CALLS, CALL_SECONDS, IN_FLIGHT, BUILD)


class ServerMetrics:
    """What every server counts of its calls, beside what its application measures and the process's own numbers."""

    def __init__(self, service: str, application: Sequence[CollectorRegistry]) -> None:
        self.registry = CollectorRegistry()
        self.calls = CALLS.build(self.registry)
        self.seconds = CALL_SECONDS.build(self.registry)
        self.in_flight = IN_FLIGHT.build(self.registry)
        build = (service, version("atspeed-serving"), platform.python_version())
        self.registry.register(Readings({BUILD: lambda: {build: 1}}))
        for part in application:
            self.registry.register(part)
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.GCCollector(registry=self.registry)


@contextmanager
def exposed(registry: CollectorRegistry, host: str, port: int) -> Iterator[int]:
    """Serve a registry over HTTP from a thread of its own; the port. Raises OSError when it cannot listen there."""
    # Else every series has a second one, of when it was made.
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
