"""A process that we own until it has ended: no failure, signal or early end on the way leaves it, or a pipe of it, behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from atspeed.local.held_signals import held_signals
from atspeed.local.parent_watch import Watcher


class Child:
    """One process at a time, in a session of its own: a terminal's Ctrl-C reaches us alone. Not thread-safe.

    It ends with us at the latest, however we end. process: None where there is none.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._watcher: Watcher | None = None

    @property
    def running(self) -> bool:
        """Whether it lives, paused or not. One that has ended by itself is let go of."""
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
        """Start a process in the place of the one before, which is killed if it lives.

        log: takes what it writes to standard error, and to standard output unless it announces something there, for us to read.
        environment: variables on top of our own. files: descriptors that it inherits.
        """
        self.kill()
        with held_signals():  # it has an owner when they are delivered
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
                self._watcher = Watcher(self.process.pid)
            except BaseException:
                self.kill()
                raise
            return self.process

    def terminate(self) -> None:
        """SIGTERM, also to one that is paused, without waiting for it to end."""
        if self.process is not None:
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)

    def wait(self, seconds: float) -> None:
        """Wait until it has ended. It is killed when that takes longer, or when the waiting is broken off."""
        try:
            if self.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, unless it has ended, and let go of it. Without effect where there is none."""
        with held_signals():
            if self._watcher is not None:  # first: it must not outlive the process and hit another with the same id
                self._watcher.release()
            if self.process is not None:
                self.process.kill()
                self.process.wait()
                if self.process.stdout is not None:
                    self.process.stdout.close()
            self.process = self._watcher = None
