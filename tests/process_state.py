"""State of this process that every test leaves as it found it: the next test runs in the same process."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import Any

# Not SIGHUP: an event loop that handled it leaves the default, while `nohup` has it ignored.
_SIGNALS = (signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE, signal.SIGTERM)
# Libraries of training set others of their own when they are imported, and gRPC reads one that a channel by key sets for good.
_VARIABLES = (
    "ATSPEED_",
    "AWS_",
    "HF_",
    "HOME",
    "HTTP",
    "OMP_",
    "OTEL_",
    "PATH",
    "PYTHON",
    "REDIS_",
    "TMPDIR",
    "http",
    "no_",
)


def process_state() -> dict[str, Any]:
    """Return the state by name."""
    return {
        "os.environ": {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
        "the working folder": os.getcwd(),  # noqa: PTH109 - a text costs less than a path
        "signal handlers": [signal.getsignal(number) for number in _SIGNALS],
        "hooks of uncaught exceptions": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "the root logger": (
            logging.root.level,
            logging.root.disabled,
            logging.root.manager.disable,
            logging.root.handlers[:],
        ),
    }


def changed(before: dict[str, Any]) -> str:
    """Return the names of what has changed since `before`; empty if nothing has."""
    now = process_state()
    return ", ".join(name for name, value in before.items() if now[name] != value)
