"""When a run saves its state and when it stops before its end: after a time limit, or at SIGTERM or Ctrl-C."""

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
    """Asked after every piece of work whose result can be kept, so a run gets on however short its time limit is.

    minutes: between two saved states inside an epoch. deadline: where time.monotonic() stands when the time is up.
    """

    minutes: float = 5.0
    deadline: float = math.inf
    _signalled: bool = False
    _saved: float = field(default_factory=time.monotonic)

    @classmethod
    def within(cls, limit: float | None, minutes: float) -> Self:
        """Stop after `limit` minutes from now; None: never."""
        return cls(minutes, math.inf if limit is None else time.monotonic() + 60 * limit)

    @property
    def stopping(self) -> bool:
        """Whether this process has been asked to stop, or its time is up."""
        return self._signalled or time.monotonic() >= self.deadline

    @property
    def signalled(self) -> bool:
        """Whether this process has been asked to stop, time limit or not."""
        return self._signalled

    @property
    def due(self) -> bool:
        """Whether the state was saved so long ago that it should be saved again."""
        return time.monotonic() - self._saved >= 60 * self.minutes

    def saved(self) -> None:
        """The state is on disk."""
        self._saved = time.monotonic()

    def pause_if_stopping(self, done: str) -> None:
        """Raise Paused if any process is to stop; every process has to ask. done: what is kept."""
        if mean_and_any(0.0, self.stopping)[1]:
            raise Paused(done)

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask to stop; a second one ends the process as if nobody listened."""

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
