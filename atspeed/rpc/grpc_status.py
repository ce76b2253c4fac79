"""Maps exceptions to gRPC statuses.

`PromptError` and `CapacityError` of the engine are mistakes of the client and become INVALID_ARGUMENT.
`OverloadedError` becomes RESOURCE_EXHAUSTED, and `DeviceError` UNAVAILABLE: another replica may serve the call. Every other
exception is a defect of the service and becomes INTERNAL with an error id. The log has the traceback under this id.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import grpc
import structlog
from google.rpc import error_details_pb2, status_pb2

from atspeed.engine.errors import CapacityError, DeviceError, OverloadedError, PromptError
from atspeed.errors import ServiceError

# Characters. HTTP/2 peers limit the trailers of a call to 8 KiB, and a longer status breaks the call itself.
MAX_DETAILS = 1000
PUSHBACK_HEADER = "grpc-retry-pushback-ms"
STATUS_HEADER = "grpc-status-details-bin"

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class CallStatus:
    """The status of a failed call.

    Attributes:
        code: gRPC status code.
        details: text for the client.
        retry_after_seconds: time until a retry may succeed; None if unknown.
    """

    code: grpc.StatusCode
    details: str
    retry_after_seconds: float | None = None

    @property
    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the retry hint twice: as gRPC's own retries obey it, and as google.rpc.RetryInfo."""
        if self.retry_after_seconds is None:
            return ()
        milliseconds = math.ceil(self.retry_after_seconds * 1000)
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(milliseconds)
        status = status_pb2.Status(code=self.code.value[0], message=self.details)
        status.details.add().Pack(info)
        return (PUSHBACK_HEADER, str(milliseconds)), (STATUS_HEADER, status.SerializeToString())


def call_status(error: Exception) -> CallStatus:
    """Return the status of a call that raised `error`. An unknown error is logged under the id in the status."""
    if isinstance(error, ServiceError):
        return CallStatus(
            grpc.StatusCode[error.code], _shortened(str(error)), getattr(error, "retry_after_seconds", None)
        )
    if isinstance(error, (PromptError, CapacityError)):
        return CallStatus(grpc.StatusCode.INVALID_ARGUMENT, _shortened(str(error)))
    if isinstance(error, OverloadedError):
        return CallStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, _shortened(str(error)))
    if isinstance(error, DeviceError):
        _log.error("device_failed", error=str(error))
        return CallStatus(grpc.StatusCode.UNAVAILABLE, "the model's device failed")
    error_id = secrets.token_hex(6)
    _log.error("internal_error", error_id=error_id, exc_info=error)
    return CallStatus(grpc.StatusCode.INTERNAL, f"internal error {error_id}")


def retry_after_seconds(error: grpc.aio.AioRpcError) -> float | None:
    """Return the retry hint of a refused call; None without a hint."""
    for key, value in error.trailing_metadata() or ():
        if key == PUSHBACK_HEADER and isinstance(value, str) and value.isdecimal():
            return int(value) / 1000
    return None


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_DETAILS else text[: MAX_DETAILS - 3] + "..."
