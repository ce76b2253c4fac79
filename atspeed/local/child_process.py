"""A child process that never outlives its owner.

No failure, signal or early end leaves the process or one of its pipes behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

_HELD = (signal.SIGINT, signal.SIGTERM)

# Reads until its standard input, a pipe that only this process holds, is closed; then ends the watched process. It works for
# a SIGKILL, on Linux and macOS, and needs no code between fork and exec.
_SCRIPT = 'read _; kill -CONT "$0"; kill -TERM "$0"'


@contextmanager
def held_signals() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM of the block at its end. Only the main thread receives signals.

    The signals are noted and not blocked, since a process started in the block would inherit the mask and never end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        pending.append(number)

    # Ignored signals stay ignored. None is a handler from outside Python, which could not be restored.
    replaced = [number for number in _HELD if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, note) for number in replaced}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in pending:
            signal.raise_signal(late)


class ParentWatch:
    """Ends process `pid` when this process ends, in whatever way.

    Release it before the process is waited for, since its id may then become another's.
    """

    def __init__(self, pid: int) -> None:
        self._shell = subprocess.Popen(  # noqa: S603  our own script
            ["/bin/sh", "-c", _SCRIPT, str(pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # the process may have ended already
            start_new_session=True,
        )

    def release(self) -> None:
        """Stop watching. No effect a second time."""
        with held_signals():
            self._shell.kill()
            self._shell.wait()
            if self._shell.stdin is not None:
                self._shell.stdin.close()


class ChildProcess:
    """One process at a time, in its own session, so that a terminal's Ctrl-C reaches only this process. Not thread-safe.

    The child ends at the latest when this process ends, in whatever way.

    Attributes:
        process: the process; None if there is none.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._watcher: ParentWatch | None = None

    @property
    def running(self) -> bool:
        """True while the process lives, paused or not. A process that has ended is released."""
        if self.process is not None and self.process.poll() is None:
            return True
        self.kill()
        return False

    def start(
        self,
        command: Sequence[str | Path],
        log: IO[bytes],
        *,
        announces: bool = False,
        environment: Mapping[str, str] | None = None,
        files: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a process in place of the one before, which is killed if it lives.

        Args:
            command: the program and its arguments.
            log: receives standard error, and standard output unless `announces`.
            announces: whether this process reads the child's standard output.
            environment: variables added to those of this process.
            files: descriptors that the child inherits.
        """
        self.kill()
        with held_signals():  # signals are delivered when the process has an owner
            self.process = subprocess.Popen(  # noqa: S603 - our own commands, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if announces else log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                pass_fds=files,
                start_new_session=True,
            )
            try:
                self._watcher = ParentWatch(self.process.pid)
            except BaseException:
                self.kill()
                raise
            return self.process

    def terminate(self) -> None:
        """Send SIGTERM, also to a paused process, without waiting for the end."""
        if self.process is not None:
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)

    def wait(self, seconds: float) -> None:
        """Wait for the end. The process is killed after `seconds`, or when waiting is interrupted."""
        try:
            if self.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """Send SIGKILL unless the process has ended, and release it. No effect without a process."""
        with held_signals():
            if (
                self._watcher is not None
            ):  # first, since it must not outlive the process and signal another with the same id
                self._watcher.release()
            if self.process is not None:
                self.process.kill()
                self.process.wait()
                if self.process.stdout is not None:
                    self.process.stdout.close()
            self.process = None
            self._watcher = None
