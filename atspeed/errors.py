"""The exceptions of a call, and of a start that fails. No gRPC.

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

`atspeed/rpc/grpc_status.py` turns them into gRPC statuses.
"""

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """Ends a call with the gRPC status of the name `code`. The text goes to the client."""

    code: ClassVar[str] = "UNKNOWN"

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

    code = "INVALID_ARGUMENT"


class NotFoundError(FieldError):
    """A field that names something that is not there."""

    code = "NOT_FOUND"


class UnauthenticatedError(ServiceError):
    """The call shows no token, or none that is valid."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(ServiceError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"


class FailedPreconditionError(ServiceError):
    """The request does not fit this replica's state, such as another model version."""

    code = "FAILED_PRECONDITION"


class UnimplementedError(ServiceError):
    """The service does not offer this, as it is set up; no other try will succeed."""

    code = "UNIMPLEMENTED"


class ResourceExhaustedError(ServiceError):
    """A limit of this replica is reached."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, problem: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(problem)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(ServiceError):
    """Something that the call needs does not answer; another try may succeed."""

    code = "UNAVAILABLE"


class DeadlineExceededError(ServiceError):
    """The call's time is over."""

    code = "DEADLINE_EXCEEDED"


class StartupError(Exception):
    """A server cannot start. The text is one line and names what to change."""
