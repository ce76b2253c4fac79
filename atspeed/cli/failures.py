"""Exit codes of commands, and the one-line messages of expected failures.

    exit code   meaning
    1           a failure that another try does not repair
    2           a mistake in the command, or a request that the service refuses as wrong
    69          the service does not answer
    75          the same command may succeed later: the service is busy; a training or a batch stopped before its end
    77          the token is missing, not valid, or does not allow the call

69, 75 and 77 are EX_UNAVAILABLE, EX_TEMPFAIL and EX_NOPERM of sysexits.h.

This module imports every package with errors of its own. `commands.py` therefore imports it only after a failure.
"""

from __future__ import annotations

import errno

import grpc

from atspeed.batch.errors import BatchError
from atspeed.benchmarks.results import BenchmarkError
from atspeed.capacity.errors import CapacityError
from atspeed.engine.errors import EngineError
from atspeed.local.edge import LocalEdgeError
from atspeed.local.free_ports import PortTakenError
from atspeed.local.prometheus import LocalPrometheusError
from atspeed.local.redis_server import LocalRedisError
from atspeed.local.stack import LocalStackError
from atspeed.security.tls import TlsError
from atspeed.training.errors import Paused, TrainingError
from atspeed_client import RecommenderError, UsageError

PAUSED = 75
_CALL_EXITS = {
    grpc.StatusCode.INVALID_ARGUMENT: 2,
    grpc.StatusCode.UNAVAILABLE: 69,
    grpc.StatusCode.DEADLINE_EXCEEDED: 69,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 75,
    grpc.StatusCode.UNAUTHENTICATED: 77,
    grpc.StatusCode.PERMISSION_DENIED: 77,
}
_EXPECTED = (
    BatchError,
    BenchmarkError,
    CapacityError,
    EngineError,
    LocalEdgeError,
    LocalPrometheusError,
    PortTakenError,
    LocalRedisError,
    LocalStackError,
    TlsError,
    TrainingError,
)


def exit_code_and_line(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and the message of an expected failure; None for any other."""
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, RecommenderError):
        return _CALL_EXITS.get(error.code, 1), str(error)
    if isinstance(error, _EXPECTED):
        return 1, str(error)
    if isinstance(error, Paused):
        return PAUSED, f"paused: {error}; run the same command again to continue"
    if isinstance(error, OSError) and error.errno != errno.EPIPE:  # Typer ends a command whose output is closed
        return 1, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, UnicodeDecodeError):
        return 1, f"a file that the command reads is not UTF-8: {error.reason} at byte {error.start}"
    return None
