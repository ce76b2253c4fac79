"""Logs with structlog on stderr: one line per event, as JSON or for the console.

Records of the standard library's logging take the same way. A log line shows the types and the traceback of an exception, never
its text or variables: libraries quote values in texts, and a value may be a user's history or a password. The setting
`log_error_texts` adds the texts.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from atspeed.observability import tracing

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "console"]

REQUEST_ID_HEADER = "x-request-id"
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_describe_peer: ContextVar[Callable[[], Mapping[str, str]]] = ContextVar("describe_peer", default=dict)


def configure(service: str, level: LogLevel, style: LogFormat, *, error_texts: bool = False) -> None:
    """Configure the logs of this process. error_texts: log the texts of exceptions too."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _named(service),
        _traced,
        _with_peer,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(shared, style, error_texts=error_texts))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)  # Python would print them unformatted


def log_uncaught_exceptions() -> None:
    """Log uncaught exceptions of all threads. Python would print them with their texts."""
    sys.excepthook = lambda kind, error, traceback: _log_uncaught("uncaught_exception", (kind, error, traceback))
    threading.excepthook = lambda caught: _log_uncaught(
        "uncaught_exception_in_thread", (caught.exc_type, caught.exc_value, caught.exc_traceback)
    )
    sys.unraisablehook = lambda caught: _log_uncaught(
        "uncaught_exception_in_finalizer", (caught.exc_type, caught.exc_value, caught.exc_traceback)
    )


def log_loop_failure(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle an exception of an event loop. asyncio's own handler prints the task with the exception's text."""
    error = context.get("exception")
    _log.error("event_loop_failure", exc_info=error if isinstance(error, BaseException) else None)


def bind_request_id(offered: str | None) -> str:
    """Give the running call an id for its log lines. A short, plain id of the client is kept."""
    request_id = offered if offered and _REQUEST_ID.fullmatch(offered) else secrets.token_hex(8)
    structlog.contextvars.bind_contextvars(request_id=request_id)
    return request_id


def bind_peer(describe: Callable[[], Mapping[str, str]]) -> None:
    """Set the function that describes the caller of the running call. Warnings and errors of the call have its fields."""
    _describe_peer.set(describe)


def peer() -> Mapping[str, str]:
    """Return the fields that describe the caller of the running call; empty outside a call."""
    return _describe_peer.get()()


def request_metadata() -> tuple[tuple[str, str], ...]:
    """Return metadata with the running call's id and trace for the next service; empty outside a call."""
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return (((REQUEST_ID_HEADER, request_id),) if request_id else ()) + tracing.outgoing()


def traceback_without_texts(exc_info: Any) -> str:
    """Return the tracebacks and types of an exception and its causes, in the order in which they arose."""
    lines: list[str] = []
    error: BaseException | None = exc_info[1]
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        lines.append("".join([*traceback.format_tb(error.__traceback__), _type_name(error)]))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\nled to\n".join(reversed(lines))


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _named(service: str) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {"service": service, **event}

    return add


def _log_uncaught(event: str, exc_info: Any) -> None:
    if exc_info[0] is not None and issubclass(exc_info[0], KeyboardInterrupt):
        return
    _log.error(event, exc_info=exc_info)


def _traced(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {**event, **tracing.ids()}


def _with_peer(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {**event, **peer()} if event["level"] in {"warning", "error", "critical"} else event


def _formatter(shared: list[Processor], style: LogFormat, *, error_texts: bool) -> logging.Formatter:
    # Plain tracebacks, since the renderers' own ones print local variables with histories and passwords.
    render: list[Processor] = [
        structlog.processors.format_exc_info
        if error_texts
        else structlog.processors.ExceptionRenderer(traceback_without_texts),
        structlog.processors.JSONRenderer()
        if style == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        ),
    ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
    )
