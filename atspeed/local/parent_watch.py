"""Ends a process with the one that started it, however that one ends."""

from __future__ import annotations

import subprocess

from atspeed.local.held_signals import held_signals

# Reads until its standard input, a pipe that only our process holds, is closed; then the watched process goes too. Works for
# a SIGKILL, on Linux and macOS, and needs no code between fork and exec.
_SCRIPT = 'read _; kill -CONT "$0"; kill -TERM "$0"'


class Watcher:
    """Watches over process `pid`. Release it before the process is waited for: its id may then become another's."""

    def __init__(self, pid: int) -> None:
        self._shell = subprocess.Popen(  # noqa: S603  our own script
            ["/bin/sh", "-c", _SCRIPT, str(pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # the process may be gone already
            start_new_session=True,
        )

    def release(self) -> None:
        """Let the process be. Without effect a second time."""
        with held_signals():
            self._shell.kill()
            self._shell.wait()
            if self._shell.stdin is not None:
                self._shell.stdin.close()
