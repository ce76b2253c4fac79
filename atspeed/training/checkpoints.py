"""Decides when a run saves its state, and when it stops before its end.

A run stops after a time limit, or at SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Self

from atspeed.training.errors import Paused
from atspeed.training.processes import mean_and_any


@dataclass
class Checkpoints:
    """The state of saving and stopping. A run asks it after every piece of work whose result can be kept.

    Attributes:
        minutes: time between two saved states inside an epoch.
        deadline: value of time.monotonic() at which the time limit is reached.
    """

    minutes: float = 5.0
    deadline: float = math.inf
    _signalled: bool = False
    _saved: float = field(default_factory=time.monotonic)

    @classmethod
    def within(cls, limit: float | None, minutes: float) -> Self:
        """Return checkpoints that stop a run `limit` minutes from now; None: no time limit."""
        return cls(minutes, math.inf if limit is None else time.monotonic() + 60 * limit)

    @property
    def stopping(self) -> bool:
        """True if this process was asked to stop, or its time limit is reached."""
        return self._signalled or time.monotonic() >= self.deadline

    @property
    def signalled(self) -> bool:
        """True if a signal asked this process to stop."""
        return self._signalled

    @property
    def due(self) -> bool:
        """True if the last saved state is old enough to save again."""
        return time.monotonic() - self._saved >= 60 * self.minutes

    def saved(self) -> None:
        """Note that the state is on disk."""
        self._saved = time.monotonic()

    def pause_if_stopping(self, done: str) -> None:
        """Raise Paused if any process is to stop. Every process has to call it. done: the work that is kept."""
        if mean_and_any(0.0, self.stopping)[1]:
            raise Paused(done)

    @contextmanager
    def stop_at_signals(self) -> Iterator[None]:
        """Note SIGTERM and Ctrl-C within the block as requests to stop. A second one ends the process at once."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            self._signalled = True
            restore()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            restore()
