"""The exceptions of a call, and the status that each becomes.

    ServiceError                  a call ends with the status `code`; the text is for the client
    +-- FieldError                names the request's field at fault
    |   +-- InvalidArgumentError  INVALID_ARGUMENT
    |   +-- NotFoundError         NOT_FOUND
    +-- UnauthenticatedError      UNAUTHENTICATED: it is not known who calls
    +-- PermissionDeniedError     PERMISSION_DENIED: the caller may not do this
    +-- FailedPreconditionError   FAILED_PRECONDITION: the caller must change something else first
    +-- UnimplementedError        UNIMPLEMENTED: this service does not do that, as it is set up
    +-- ResourceExhaustedError    RESOURCE_EXHAUSTED: a limit of this replica, with a hint when to try again
    +-- UnavailableError          UNAVAILABLE: try again, or another replica
    +-- DeadlineExceededError     DEADLINE_EXCEEDED
    StartupError                  a server cannot start; not for calls

`atspeed.engine.errors.PromptError` and `CapacityError` are the client's to mend and become INVALID_ARGUMENT; `OverloadedError`
becomes RESOURCE_EXHAUSTED. Every other exception is ours: INTERNAL with an error id, under which the log has the traceback.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import ClassVar

import grpc
import structlog
from google.rpc import error_details_pb2, status_pb2

from atspeed.engine.errors import CapacityError, OverloadedError, PromptError

# HTTP/2 peers limit all of a call's trailers to 8 KiB, and a status beyond that breaks the call itself.
MAX_DETAILS = 1000
PUSHBACK_HEADER = "grpc-retry-pushback-ms"
STATUS_HEADER = "grpc-status-details-bin"

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ServiceError(Exception):
    """Ends a call with the status `code`. The text goes to the client."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class FieldError(ServiceError):
    """Names the request's field at fault: `field: problem`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class InvalidArgumentError(FieldError):
    """A field whose value is wrong whatever the state of the service."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(FieldError):
    """A field that names something that is not there."""

    code = grpc.StatusCode.NOT_FOUND


class UnauthenticatedError(ServiceError):
    """The call shows no token, or none that is valid."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(ServiceError):
    """The caller is known and may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class FailedPreconditionError(ServiceError):
    """The request does not fit this replica's state, such as another model version."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class UnimplementedError(ServiceError):
    """The service does not offer this, as it is set up; no other try will succeed."""

    code = grpc.StatusCode.UNIMPLEMENTED


class ResourceExhaustedError(ServiceError):
    """A limit of this replica is reached."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, problem: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(problem)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(ServiceError):
    """Something that the call needs does not answer; another try may succeed."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(ServiceError):
    """The call's time is over."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class StartupError(Exception):
    """A server cannot start. The text is one line and names what to change."""


@dataclass(frozen=True)
class CallStatus:
    """How a call ends: the gRPC status code, the text that goes with it, and when another try may succeed, if known."""

    code: grpc.StatusCode
    details: str
    retry_after_seconds: float | None = None

    @property
    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        """The hint as gRPC's own retries obey it, and as google.rpc.RetryInfo for those who read it."""
        if self.retry_after_seconds is None:
            return ()
        milliseconds = math.ceil(self.retry_after_seconds * 1000)
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(milliseconds)
        status = status_pb2.Status(code=self.code.value[0], message=self.details)
        status.details.add().Pack(info)
        return (PUSHBACK_HEADER, str(milliseconds)), (STATUS_HEADER, status.SerializeToString())


def call_status(error: Exception) -> CallStatus:
    """The status that `error` ends a call with. One that is ours is logged, under the id in the status."""
    if isinstance(error, ServiceError):
        return CallStatus(error.code, _shortened(str(error)), getattr(error, "retry_after_seconds", None))
    if isinstance(error, (PromptError, CapacityError)):
        return CallStatus(grpc.StatusCode.INVALID_ARGUMENT, _shortened(str(error)))
    if isinstance(error, OverloadedError):
        return CallStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, _shortened(str(error)))
    error_id = secrets.token_hex(6)
    _log.error("internal error", error_id=error_id, exc_info=error)
    return CallStatus(grpc.StatusCode.INTERNAL, f"internal error {error_id}")


def is_over(left: float, seconds: float) -> bool:
    """Whether a cancellation with `left` seconds left of a deadline of `seconds` was that deadline.

    gRPC rounds the time that it sends up, by 1 % at most, and the caller may give up some milliseconds before the server's clock
    says so.
    """
    return left <= 0.02 + 0.01 * seconds


def retry_after_seconds(error: grpc.aio.AioRpcError) -> float | None:
    """When a service that refused a call thinks that another try may succeed; None where it does not say."""
    for key, value in error.trailing_metadata() or ():
        if key == PUSHBACK_HEADER and isinstance(value, str) and value.isdecimal():
            return int(value) / 1000
    return None


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_DETAILS else text[: MAX_DETAILS - 3] + "..."
