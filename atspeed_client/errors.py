"""The exceptions of the Python client.

RecommenderError              everything that the client raises
+-- CallError                 a call that failed, at the service or on the way there
+-- UsageError                a mistake in the calling program; nothing was sent
    +-- ArgumentTypeError     a TypeError too: an argument of the wrong type, or one that does not exist
    +-- ArgumentValueError    a ValueError too: an argument that no service accepts
    |   +-- CertificateError  files that TLS cannot use
    +-- ClientStateError      a RuntimeError too: a client that is closed, or used outside of an event loop
"""

from __future__ import annotations

from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

REQUEST_ID_HEADER = "x-request-id"
_STATUS_HEADER = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Violation(NamedTuple):
    """Field of a request at fault, and the problem with it. The field is empty where a long list of them ends."""

    field: str
    problem: str


class RecommenderError(Exception):
    """The base of all errors that the client raises.

    Attributes:
        code: the gRPC status of the call. For a mistake that the client found, the status that the service would return.
        message: the problem in words.
        reason: the reason as the contract's `ErrorReason` names it, such as HISTORY_NOT_FOUND; empty if none is known.
        violations: all arguments or fields of the request at fault.
        retry_after_seconds: the retry hint of a busy service; None without one.
        request_id: the id of the call in the service's logs; empty if nothing was sent.
        attempts: how often the call was made.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        violations: tuple[Violation, ...] = (),
        retry_after_seconds: float | None = None,
        request_id: str = "",
        attempts: int = 0,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.violations = violations
        self.retry_after_seconds = retry_after_seconds
        self.request_id = request_id
        self.attempts = attempts

    @property
    def field(self) -> str:
        """Return the first field at fault; empty if none is named."""
        return self.violations[0].field if self.violations else ""

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class CallError(RecommenderError):
    """A call that failed, at the service or on the way there."""


class UsageError(RecommenderError):
    """A mistake in the calling program, found before anything was sent."""

    def __init__(self, field: str, problem: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT) -> None:
        violations = (Violation(field, problem),) if field else ()
        super().__init__(code, f"{field}: {problem}" if field else problem, violations=violations)

    def __str__(self) -> str:
        return self.message


class ArgumentTypeError(UsageError, TypeError):
    """An argument of the wrong type, or one that does not exist."""


class ArgumentValueError(UsageError, ValueError):
    """An argument of the right type that no service accepts."""


class CertificateError(ArgumentValueError):
    """Files that TLS cannot use."""


class ClientStateError(UsageError, RuntimeError):
    """A client that is closed, or used outside of an event loop."""

    def __init__(self, problem: str) -> None:
        super().__init__("", problem, grpc.StatusCode.FAILED_PRECONDITION)


def call_error(error: Any, request_id: str, attempts: int) -> CallError:
    """Build the error of a failed call. error: a grpc.RpcError with a status."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status(code=error.code().value[0], message=error.details() or "")
    if isinstance(encoded := trailers.get(_STATUS_HEADER), bytes):
        status.details.extend(_parsed(encoded).details)
    return status_error(status, str(trailers.get(REQUEST_ID_HEADER, request_id)), attempts)


def status_error(status: Any, request_id: str, attempts: int) -> CallError:
    """Build the error of a google.rpc.Status with its details."""
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    after = None
    for detail in status.details:
        if detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            after = retry.retry_delay.ToNanoseconds() / 1e9
        for message in (info, request):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    return CallError(
        _CODES.get(status.code, grpc.StatusCode.UNKNOWN),
        status.message,
        reason=info.reason,
        violations=tuple(Violation(one.field, one.description) for one in request.field_violations),
        retry_after_seconds=after,
        request_id=request_id,
        attempts=attempts,
    )


def _parsed(encoded: bytes) -> Any:
    try:
        return status_pb2.Status.FromString(encoded)
    except DecodeError:  # of something between the service and the client
        return status_pb2.Status()
