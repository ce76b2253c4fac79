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

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import ClassVar


class Reason(StrEnum):
    """Reason of an error, as google.rpc.ErrorInfo names it. The proto's `ErrorReason` explains each one."""

    @staticmethod
    def _generate_next_value_(name: str, *_: object) -> str:
        return name

    INVALID_REQUEST = auto()
    HISTORY_WITHOUT_KNOWN_ITEM = auto()
    HISTORY_NOT_FOUND = auto()
    UNAUTHENTICATED = auto()
    PERMISSION_DENIED = auto()
    NOT_SERVED = auto()
    HISTORIES_DISABLED = auto()
    OVERLOADED = auto()
    HISTORIES_UNAVAILABLE = auto()
    BACKEND_UNAVAILABLE = auto()
    DEADLINE_EXCEEDED = auto()
    INTERNAL = auto()
    QUOTA_EXCEEDED = auto()
    TENANT_DENIED = auto()


class ServiceError(Exception):
    """Ends a call with the gRPC status of the name `code`. The text goes to the client.

    reason: the reason of this error, if it is not the usual one of its class.
    """

    code: ClassVar[str] = "UNKNOWN"
    reason: Reason = Reason.INTERNAL

    def __init__(self, problem: str, *, reason: Reason | None = None) -> None:
        super().__init__(problem)
        if reason is not None:
            self.reason = reason


@dataclass(frozen=True)
class Violation:
    """Field at fault, and the problem with its value."""

    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class FieldError(ServiceError):
    """Names the request's fields at fault: `field: problem`, joined by semicolons.

    Attributes:
        field: the first of them.
        violations: all of them.
    """

    def __init__(
        self, field: str, problem: str, *, more: Iterable[Violation] = (), reason: Reason | None = None
    ) -> None:
        self.field = field
        self.problem = problem
        self.violations = (Violation(field, problem), *more)
        super().__init__("; ".join(map(str, self.violations)), reason=reason)


class InvalidArgumentError(FieldError):
    """Fields whose values are wrong whatever the state of the service."""

    code = "INVALID_ARGUMENT"
    reason = Reason.INVALID_REQUEST


class Violations:
    """Collects the violations of a request, so that its error names all of them."""

    def __init__(self) -> None:
        self._found: list[Violation] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, field: str, problem: str) -> None:
        """Note that a field is at fault."""
        self._found.append(Violation(field, problem))

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the InvalidArgumentError of the block, and go on after it."""
        try:
            yield
        except InvalidArgumentError as error:
            self._found += error.violations

    def raise_any(self) -> None:
        """Raise InvalidArgumentError with all violations, if there are any."""
        if self._found:
            first, *more = self._found
            raise InvalidArgumentError(first.field, first.problem, more=more)


class NotFoundError(FieldError):
    """A field that names something that is not there."""

    code = "NOT_FOUND"
    reason = Reason.HISTORY_NOT_FOUND


class UnauthenticatedError(ServiceError):
    """The call shows no token, or none that is valid."""

    code = "UNAUTHENTICATED"
    reason = Reason.UNAUTHENTICATED


class PermissionDeniedError(ServiceError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"
    reason = Reason.PERMISSION_DENIED


class FailedPreconditionError(ServiceError):
    """The request does not fit this replica's state, such as another model version."""

    code = "FAILED_PRECONDITION"
    reason = Reason.NOT_SERVED


class UnimplementedError(ServiceError):
    """The service does not offer this, as it is set up; no other try will succeed."""

    code = "UNIMPLEMENTED"
    reason = Reason.HISTORIES_DISABLED


class ResourceExhaustedError(ServiceError):
    """A limit of this replica, or the caller's quota, is reached."""

    code = "RESOURCE_EXHAUSTED"
    reason = Reason.OVERLOADED

    def __init__(self, problem: str, *, retry_after_seconds: float | None = None, reason: Reason | None = None) -> None:
        super().__init__(problem, reason=reason)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(ServiceError):
    """Something that the call needs does not answer; another try may succeed."""

    code = "UNAVAILABLE"
    reason = Reason.BACKEND_UNAVAILABLE


class DeadlineExceededError(ServiceError):
    """The call's time is over."""

    code = "DEADLINE_EXCEEDED"
    reason = Reason.DEADLINE_EXCEEDED


class StartupError(Exception):
    """A server cannot start. The text is one line and names what to change."""
