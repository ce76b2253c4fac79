"""Keeps captures of CUDA graphs apart from all other use of the device.

A capture forbids most calls of CUDA in all other threads of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CaptureLock:
    """Many users of the device at a time, or one capture. A user's blocks may be nested."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._waiting = 0
        self._capturing = False
        self._thread = threading.local()

    @contextmanager
    def using(self) -> Iterator[None]:
        """Use the device within the block, beside others but beside no capture."""
        with self._block(lambda: not (self._capturing or self._waiting), capture=False):
            yield

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Be the only user of the device within the block, which is in no other. Users that come later wait."""
        with self._changed:
            self._waiting += 1
        with self._block(lambda: not (self._capturing or self._users), capture=True):
            yield

    @contextmanager
    def _block(self, free: Callable[[], bool], *, capture: bool) -> Iterator[None]:
        if getattr(self._thread, "inside", False):
            yield
            return
        with self._changed:
            self._changed.wait_for(free)
            self._waiting -= capture
            self._capturing, self._users = capture, self._users + (not capture)
        self._thread.inside = True
        try:
            yield
        finally:
            self._thread.inside = False
            with self._changed:
                self._capturing, self._users = False, self._users - (not capture)
                self._changed.notify_all()


DEVICE = CaptureLock()
"""The lock of this process, whose device is one."""
