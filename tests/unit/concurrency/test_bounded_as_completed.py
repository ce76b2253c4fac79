"""A batch's requests: a few at once, answers as they are ready."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from atspeed.concurrency.bounded_as_completed import bounded_as_completed


class Work:
    """Numbered coroutines that take some turns of the event loop."""

    def __init__(self, turns: list[int]) -> None:
        self.turns, self.running, self.most, self.begun = turns, 0, 0, 0

    def __iter__(self) -> Iterator[Coroutine[Any, Any, int]]:
        return (self._one(number, turns) for number, turns in enumerate(self.turns))

    async def _one(self, number: int, turns: int) -> int:
        self.running, self.begun = self.running + 1, self.begun + 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
            return number
        finally:
            self.running -= 1


@given(turns=st.lists(st.integers(0, 5), max_size=12), at_once=st.integers(1, 4))
def test_every_answer_comes_once_and_no_more_run_than_may(turns: list[int], at_once: int) -> None:
    async def collect() -> list[int]:
        return [answer async for answer in bounded_as_completed(iter(work), at_once)]

    work = Work(turns)
    assert sorted(asyncio.run(collect())) == list(range(len(turns)))
    assert work.most <= at_once


async def test_the_quick_one_does_not_wait_for_the_slow_one() -> None:
    assert [answer async for answer in bounded_as_completed(iter(Work([50, 1])), 2)] == [1, 0]


async def test_whoever_stops_listening_stops_the_work() -> None:
    work = Work([1, 100, 100, 100])
    async with aclosing(bounded_as_completed(iter(work), 2)) as answers:
        assert await anext(answers) == 0
    assert (work.running, work.begun) == (0, 2)
