"""Distributed traces: spans, metadata of outgoing calls, ids for log lines.

Tracing is off by default, and a span then costs one comparison. Spans carry sizes and counts, never a user, an item or a token.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from atspeed.errors import StartupError

if TYPE_CHECKING:  # its packages are an extra
    from atspeed.observability.otel import OpenTelemetry

Value = str | bool | int | float
Metadata = tuple[tuple[str, str], ...]


class Span(Protocol):
    """A running span."""

    def set(self, **attributes: Value) -> None:
        """Add attributes."""


class _NoSpan:
    def set(self, **attributes: Value) -> None:
        """Ignore the attributes."""


class _Process:
    backend: OpenTelemetry | None = None


_NO_SPAN: AbstractContextManager[Span] = nullcontext(_NoSpan())


@contextmanager
def started(service: str, *, on: bool) -> Iterator[None]:
    """Trace this process for the length of the block, if `on`. Raises StartupError without the extra `otel`."""
    if not on:
        yield
        return
    try:
        otel = importlib.import_module("atspeed.observability.otel")
    except ImportError as error:
        raise StartupError(f"tracing needs the extra `otel`: {error}") from error
    _Process.backend = backend = otel.OpenTelemetry(service)
    try:
        yield
    finally:
        _Process.backend = None
        backend.stop()


def on() -> bool:
    """Return whether spans are recorded, for work that only a span needs."""
    return _Process.backend is not None


def span(name: str, **attributes: Value) -> AbstractContextManager[Span]:
    """Start a span inside the current one. Its block must not contain a `yield` of an async generator: context leaks."""
    return _Process.backend.span(name, attributes) if _Process.backend else _NO_SPAN


def past_span(name: str, begun_ns: int, ended_ns: int, **attributes: Value) -> None:
    """Record a finished span inside the current one. Times are those of `time.perf_counter_ns`."""
    if _Process.backend:
        _Process.backend.past_span(name, begun_ns, ended_ns, attributes)


def call(method: str, metadata: Sequence[tuple[str, str | bytes]]) -> AbstractContextManager[Span]:
    """Start the span of a served call, inside the caller's span."""
    return _Process.backend.call(method, metadata) if _Process.backend else _NO_SPAN


def outgoing() -> Metadata:
    """Return the metadata that connect the next service's spans to the current trace."""
    return _Process.backend.metadata() if _Process.backend else ()


def ids() -> Mapping[str, str]:
    """Return trace_id and span_id for a log line; empty without a trace."""
    return _Process.backend.ids() if _Process.backend else {}
