"""Logs: structlog on stderr, one line per event, JSON or for people. The standard library's records go the same way."""

from __future__ import annotations

import logging
import re
import secrets
import sys
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "console"]

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def configure(service: str, level: LogLevel, style: LogFormat) -> None:
    """Send every log line of this process to stderr, with the service's name."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _named(service),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(shared, style))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


def bind_request_id(offered: str | None) -> str:
    """Give the running call an id, the client's where that is short and plain; it stands on each of its log lines."""
    request_id = offered if offered and _REQUEST_ID.fullmatch(offered) else secrets.token_hex(8)
    structlog.contextvars.bind_contextvars(request_id=request_id)
    return request_id


def request_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata that carries the running call's id on to the next service; empty outside a call."""
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return ((REQUEST_ID_HEADER, request_id),) if request_id else ()


def _named(service: str) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {"service": service, **event}

    return add


def _formatter(shared: list[Processor], style: LogFormat) -> logging.Formatter:
    # Plain tracebacks: the renderers' own ones print local variables, and with them histories and passwords.
    render: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if style == "json"
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
    )
