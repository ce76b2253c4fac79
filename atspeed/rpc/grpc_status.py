"""Maps exceptions to gRPC statuses.

Every status carries the details that protos/atspeed/v1/errors.proto promises.
`PromptError` and `CapacityError` of the engine are mistakes of the client and become INVALID_ARGUMENT.
`OverloadedError` becomes RESOURCE_EXHAUSTED, and `DeviceError` UNAVAILABLE: another replica may serve the call. Every other
exception is a defect of the service and becomes INTERNAL with an error id. The log has the traceback under this id.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import structlog
from google.rpc import error_details_pb2, status_pb2

from atspeed.engine.errors import CapacityError, DeviceError, OverloadedError, PromptError
from atspeed.errors import FieldError, Reason, ServiceError, Violation

# Bytes of UTF-8. HTTP/2 peers limit the trailers of a call to 8 KiB, and a longer status breaks the call itself. The text is
# there twice: percent-encoded, where a byte may take three, and in the details, which are in base64.
MAX_DETAILS = 1000
_MAX_VIOLATIONS = 1500
ERROR_DOMAIN = "atspeed"
PUSHBACK_HEADER = "grpc-retry-pushback-ms"
RETRY_AFTER_HEADER = "retry-after"
"""HTTP's hint in whole seconds. Envoy makes the trailers of a refused call the headers of its HTTP reply."""
STATUS_HEADER = "grpc-status-details-bin"

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class CallStatus:
    """The status of a failed call.

    Attributes:
        code: gRPC status code.
        details: text for the client.
        reason: reason for programs.
        violations: fields of the request at fault.
        retry_after_seconds: time until a retry may succeed; None if unknown.
    """

    code: grpc.StatusCode
    details: str
    reason: Reason
    violations: tuple[Violation, ...] = ()
    retry_after_seconds: float | None = None

    @property
    def message(self) -> status_pb2.Status:
        """Return the status with its details."""
        status = status_pb2.Status(code=self.code.value[0], message=self.details)
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=self.reason, domain=ERROR_DOMAIN))
        if self.violations:
            status.details.add().Pack(_bad_request(self.violations))
        if self._retry_after_ms is not None:
            info = error_details_pb2.RetryInfo()
            info.retry_delay.FromMilliseconds(self._retry_after_ms)
            status.details.add().Pack(info)
        return status

    @property
    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the details, and the retry hint once more as gRPC's own retries obey it, and as HTTP's clients do."""
        status = (STATUS_HEADER, self.message.SerializeToString())
        milliseconds = self._retry_after_ms
        if milliseconds is None:
            return (status,)
        seconds = str(math.ceil(milliseconds / 1000))
        return ((PUSHBACK_HEADER, str(milliseconds)), (RETRY_AFTER_HEADER, seconds), status)

    @property
    def _retry_after_ms(self) -> int | None:
        return None if self.retry_after_seconds is None else math.ceil(self.retry_after_seconds * 1000)


def call_status(error: Exception) -> CallStatus:
    """Return the status of a call that raised `error`. An unknown error is logged under the id in the status."""
    if isinstance(error, ServiceError):
        return CallStatus(
            grpc.StatusCode[error.code],
            _shortened(str(error)),
            error.reason,
            error.violations if isinstance(error, FieldError) else (),
            getattr(error, "retry_after_seconds", None),
        )
    if isinstance(error, (PromptError, CapacityError)):
        return CallStatus(grpc.StatusCode.INVALID_ARGUMENT, _shortened(str(error)), Reason.INVALID_REQUEST)
    if isinstance(error, OverloadedError):
        return CallStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, _shortened(str(error)), Reason.OVERLOADED)
    if isinstance(error, DeviceError):
        _log.error("device_failed", error=str(error))
        return CallStatus(grpc.StatusCode.UNAVAILABLE, "the model's device failed", Reason.BACKEND_UNAVAILABLE)
    error_id = secrets.token_hex(6)
    _log.error("internal_error", error_id=error_id, exc_info=error)
    return CallStatus(grpc.StatusCode.INTERNAL, f"internal error {error_id}", Reason.INTERNAL)


def retry_after_seconds(error: grpc.aio.AioRpcError) -> float | None:
    """Return the retry hint of a refused call; None without a hint."""
    for key, value in error.trailing_metadata() or ():
        if key == PUSHBACK_HEADER and isinstance(value, str) and value.isdecimal():
            return int(value) / 1000
    return None


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    """Return the violations that fit a trailer, and the number of the others in one more without a field."""
    message, room = error_details_pb2.BadRequest(), _MAX_VIOLATIONS
    for place, violation in enumerate(violations):
        room -= len(violation.field.encode()) + len(violation.problem.encode())
        if room < 0 and place:
            message.field_violations.add(description=f"and {len(violations) - place} more")
            break
        message.field_violations.add(field=violation.field, description=_shortened(violation.problem))
    return message


def _shortened(text: str) -> str:
    encoded = text.encode()
    return text if len(encoded) <= MAX_DETAILS else encoded[: MAX_DETAILS - 3].decode(errors="ignore") + "..."
