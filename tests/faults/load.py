"""Requests without a pause from several callers while a fault happens."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from atspeed.v1 import recommendation_pb2 as pb
from tests.faults.conftest import Case, assert_all_right
from tests.serving import Client, until


class Load:
    """Callers that ask for the cases in turn until the block ends. Every answer is kept; a failed call fails the block."""

    def __init__(self, client: Client, cases: Sequence[Case], *, callers: int = 6, **fields: Any) -> None:
        self._client, self._cases, self._fields = client, cases, {"k": 20, **fields}
        self._pool = ThreadPoolExecutor(callers)
        self._numbers, self._stop = itertools.count(), threading.Event()
        self._callers: list[Future[None]] = []
        self._begin = callers
        self._open: dict[int, int] = {}  # by number of a call without an answer: the answers before it
        self.answers: list[tuple[Case, pb.RecommendResponse]] = []

    def _call(self) -> None:
        while not self._stop.is_set():
            number = next(self._numbers)
            case = self._cases[number % len(self._cases)]
            self._open[number] = len(self.answers)
            self.answers.append((case, self._client.recommend(case.history, **self._fields)))
            del self._open[number]

    def goes_on(self, answers: int = 10) -> None:
        """Return when so many more requests have been answered; at once when a caller has failed."""
        wanted = len(self.answers) + answers
        until(lambda: len(self.answers) >= wanted or any(caller.done() for caller in self._callers))

    def waits(self) -> None:
        """Return when a call waits while as many others as there are callers were answered; at once when a caller has failed."""
        until(
            lambda: (
                any(len(self.answers) - before >= self._begin for before in list(self._open.values()))
                or any(caller.done() for caller in self._callers)
            )
        )

    @property
    def retries(self) -> int:
        """Streams that broke and were taken up on another target."""
        return sum(reply.statistics.target_retries for _, reply in self.answers)

    def __enter__(self) -> Self:
        self._callers = [self._pool.submit(self._call) for _ in range(self._begin)]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        if kind is None:
            for caller in self._callers:
                caller.result()
            assert_all_right([reply for _, reply in self.answers], [case for case, _ in self.answers])
