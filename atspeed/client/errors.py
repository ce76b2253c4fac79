"""The exceptions of the Python client.

RecommenderError              everything that the client raises
+-- CallError                 a call that failed, at the service or on the way there
+-- UsageError                a mistake in the calling program; nothing was sent
    +-- ArgumentTypeError     a TypeError too: an argument of the wrong type, or one that does not exist
    +-- ArgumentValueError    a ValueError too: an argument that no service accepts
    |   +-- CertificateError  a TlsError too: files that TLS cannot work with
    +-- ClientStateError      a RuntimeError too: a client that is closed, or used outside of its event loop
"""

from __future__ import annotations

import re

import grpc

from atspeed.observability.logs import REQUEST_ID_HEADER
from atspeed.rpc.grpc_status import retry_after_seconds
from atspeed.security.tls import TlsError

# Statuses whose message begins with the field at fault, see `atspeed.errors.FieldError`.
_NAMING_A_FIELD = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
_FIELD = re.compile(r"([a-z][a-z0-9_-]*(?:\[\d+\])?(?:\.[a-z][a-z0-9_]*(?:\[\d+\])?)*): ")


class RecommenderError(Exception):
    """Anything that the client raises.

    code: the gRPC status of the call; of a mistake that the client found, the one that the service would have answered.
    message: the problem in words.
    field: the argument or the request's field at fault; empty where none is named.
    retry_after_seconds: when another try may succeed, where a busy service said so.
    request_id: the id of the call in the service's logs; empty where no service answered.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        retry_after_seconds: float | None = None,
        *,
        field: str = "",
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.field = field
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class CallError(RecommenderError):
    """A call that failed, at the service or on the way there."""


class UsageError(RecommenderError):
    """A mistake in the calling program, found before anything was sent."""

    def __init__(self, field: str, problem: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT) -> None:
        super().__init__(code, f"{field}: {problem}" if field else problem, field=field)

    def __str__(self) -> str:
        return self.message


class ArgumentTypeError(UsageError, TypeError):
    """An argument of the wrong type, or one that does not exist."""


class ArgumentValueError(UsageError, ValueError):
    """An argument of the right type that no service accepts."""


class CertificateError(ArgumentValueError, TlsError):
    """Files that TLS cannot work with."""


class ClientStateError(UsageError, RuntimeError):
    """A client that is closed, or used outside of the event loop that it was made in."""

    def __init__(self, problem: str) -> None:
        super().__init__("", problem, grpc.StatusCode.FAILED_PRECONDITION)


def call_error(error: grpc.aio.AioRpcError) -> CallError:
    """The failure of a call, with all that its trailers say."""
    message = error.details() or ""
    trailers = [value for key, value in error.trailing_metadata() or () if key == REQUEST_ID_HEADER]
    return CallError(
        error.code(),
        message,
        retry_after_seconds(error),
        field=field_at_fault(error.code(), message),
        request_id=str(trailers[0]) if trailers else "",
    )


def field_at_fault(code: grpc.StatusCode, message: str) -> str:
    """The field that a service's message names; empty where it names none."""
    named = _FIELD.match(message) if code in _NAMING_A_FIELD else None
    return named[1] if named else ""
