"""Traces through all services: spans around calls and their parts, the trace on outgoing calls, its id for log lines.

Off by default, and then a span costs a comparison. Spans carry sizes and counts; never a user, an item or a token.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast

from atspeed.errors import StartupError

Value = str | bool | int | float
Metadata = tuple[tuple[str, str], ...]


class Span(Protocol):
    """A span that lasts."""

    def set(self, **attributes: Value) -> None:
        """Add attributes."""


class Backend(Protocol):
    """What makes the spans: `atspeed.observability.otel`."""

    def span(self, name: str, attributes: Mapping[str, Value]) -> AbstractContextManager[Span]:
        """A span inside the running one."""

    def past_span(self, name: str, begun_ns: int, ended_ns: int, attributes: Mapping[str, Value]) -> None:
        """A span inside the running one that has ended, by `time.perf_counter_ns`."""

    def call(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> AbstractContextManager[Span]:
        """The span of a call that is served, inside the caller's, whom its metadata name."""

    def metadata(self) -> Metadata:
        """What a call to another service has to carry."""

    def ids(self) -> Mapping[str, str]:
        """trace_id and span_id of the running span; empty outside of one."""

    def stop(self) -> None:
        """Send what is not sent yet. Blocks for some seconds at most."""


class _NoSpan:
    def set(self, **attributes: Value) -> None:
        """Nothing to add to."""


class _Process:
    backend: Backend | None = None


_NO_SPAN: AbstractContextManager[Span] = nullcontext(_NoSpan())


@contextmanager
def started(service: str, *, on: bool) -> Iterator[None]:
    """Trace this process while the block lasts, if `on`. Raises StartupError without the extra `otel`."""
    if not on:
        yield
        return
    try:
        otel = importlib.import_module("atspeed.observability.otel")
    except ImportError as error:
        raise StartupError(f"tracing needs the extra `otel`: {error}") from error
    _Process.backend = backend = cast("Backend", otel.OpenTelemetry(service))
    try:
        yield
    finally:
        _Process.backend = None
        backend.stop()


def on() -> bool:
    """Whether spans go anywhere: for what would be worked out for a span alone."""
    return _Process.backend is not None


def span(name: str, **attributes: Value) -> AbstractContextManager[Span]:
    """A span inside the running one. In an async generator no `yield` may stand in its block: the context would leak."""
    return _Process.backend.span(name, attributes) if _Process.backend else _NO_SPAN


def past_span(name: str, begun_ns: int, ended_ns: int, **attributes: Value) -> None:
    """A span inside the running one for what is over already, as it was timed by `time.perf_counter_ns`."""
    if _Process.backend:
        _Process.backend.past_span(name, begun_ns, ended_ns, attributes)


def call(method: str, metadata: Sequence[tuple[str, str | bytes]]) -> AbstractContextManager[Span]:
    """The span of a call that is served, inside the caller's."""
    return _Process.backend.call(method, metadata) if _Process.backend else _NO_SPAN


def outgoing() -> Metadata:
    """Metadata by which the next service's spans join the running trace."""
    return _Process.backend.metadata() if _Process.backend else ()


def ids() -> Mapping[str, str]:
    """trace_id and span_id for a log line; empty without a trace."""
    return _Process.backend.ids() if _Process.backend else {}
