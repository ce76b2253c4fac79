"""Handles signals from a process's first moment on.

A `__main__.py` calls this before its other imports, which take a second. PID 1 of a container has no default handler for SIGTERM.
A signal before the first handler would be lost, and the process would start and serve.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def leave_at_signals() -> None:
    """Let SIGTERM and SIGINT end the process at once, with exit code 0, until other handlers replace these.

    For a process that has nothing to clean up yet.
    """
    for number in SIGNALS:
        signal.signal(number, _leave)


def unwind_at_sigterm() -> None:
    """Let SIGTERM unwind the process as Ctrl-C does, so that it stops its children. The exit code is 143, as in a shell.

    In an import the process ends at once, with the same code; children end with it (atspeed/local/child_process.py).
    """
    signal.signal(signal.SIGTERM, _unwind)


def _leave(_number: int, _frame: FrameType | None) -> None:
    """End the process. An exception could be caught by an import that is under way."""
    os._exit(0)


def _unwind(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal does not interrupt the cleanup
    if _is_importing(frame):
        os._exit(128 + number)
    raise SystemExit(128 + number)


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether an import is under way. It could lose an exception, and this process would then ignore the signal.

    Python prints and drops what is raised in the callbacks by which an import releases its locks.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
