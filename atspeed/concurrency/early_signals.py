"""Signals from a process's first moment on: a `__main__.py` calls this before its other imports, which take a second.

The first process of a container has no default for SIGTERM: one that comes before there is a handler is lost, and the process
then starts and serves.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def leave_at_signals() -> None:
    """SIGTERM and SIGINT end the process at once, with exit code 0, until other handlers take their place.

    For a process that has nothing to let go of yet.
    """
    for number in SIGNALS:
        signal.signal(number, _leave)


def unwind_at_sigterm() -> None:
    """SIGTERM ends the process as Ctrl-C does: what it has started is stopped. Exit code 143, as the shell has it."""
    signal.signal(signal.SIGTERM, _unwind)


def _leave(_number: int, _frame: FrameType | None) -> None:
    """Not by an exception: half of an import may catch it."""
    os._exit(0)


def _unwind(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one does not cut the stopping short
    raise SystemExit(128 + number)
