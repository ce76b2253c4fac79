"""Admission control: calls that run, wait, are displaced and are refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.ewma import Ewma
from atspeed.errors import DeadlineExceededError, ResourceExhaustedError
from atspeed.rpc.admission import Admission, Priority
from atspeed.rpc.grpc_status import PUSHBACK_HEADER, RETRY_AFTER_HEADER, STATUS_HEADER, call_status

BATCH, INTERACTIVE = Priority.BATCH, Priority.INTERACTIVE


class Visitor:
    """A task that takes a slot, holds it until `leave` is set, and records the outcome."""

    def __init__(self, admission: Admission, priority: Priority, journal: list[Visitor]) -> None:
        self.priority, self._journal = priority, journal
        self.inside, self.leave = asyncio.Event(), asyncio.Event()
        self.refused = False
        self.task = asyncio.create_task(self._visit(admission))

    async def _visit(self, admission: Admission) -> None:
        try:
            async with admission.slot(self.priority):
                self._journal.append(self)
                self.inside.set()
                await self.leave.wait()
        except ResourceExhaustedError:
            self.refused = True

    @property
    def waiting(self) -> bool:
        return not (self.task.done() or self.inside.is_set())


async def settle() -> None:
    """Run every task until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def end(visitors: list[Visitor]) -> None:
    for visitor in visitors:
        visitor.task.cancel()
    await asyncio.gather(*(visitor.task for visitor in visitors), return_exceptions=True)


async def arrive(admission: Admission, *priorities: Priority) -> tuple[list[Visitor], list[Visitor]]:
    """Return visitors that arrive in turn, and the journal of those that got a slot."""
    journal: list[Visitor] = []
    visitors = []
    for priority in priorities:
        visitors.append(Visitor(admission, priority, journal))
        await settle()
    return visitors, journal


async def test_admission_refuses_when_slots_and_queue_are_full() -> None:
    visitors, _ = await arrive(Admission(slots=2, queue_limit=1), *[INTERACTIVE] * 4)
    assert [visitor.inside.is_set() for visitor in visitors] == [True, True, False, False]
    assert [visitor.refused for visitor in visitors] == [False, False, False, True]
    await end(visitors)


async def test_admission_without_a_queue_refuses_when_slots_are_full() -> None:
    visitors, _ = await arrive(Admission(slots=1, queue_limit=0), INTERACTIVE, INTERACTIVE)
    assert visitors[1].refused
    await end(visitors)


async def test_interactive_calls_are_served_before_batch_calls() -> None:
    visitors, journal = await arrive(Admission(1, 3), INTERACTIVE, BATCH, INTERACTIVE, INTERACTIVE)
    for visitor in (visitors[0], visitors[2], visitors[3], visitors[1]):
        assert journal[-1] is visitor
        visitor.leave.set()
        await settle()
    assert all(visitor.task.done() and not visitor.refused for visitor in visitors)


async def test_full_queue_displaces_its_newest_batch_call_for_an_interactive_one() -> None:
    visitors, _ = await arrive(Admission(1, 2), INTERACTIVE, BATCH, BATCH, INTERACTIVE, BATCH)
    assert [visitor.refused for visitor in visitors] == [False, False, True, False, True]
    more, _ = await arrive(Admission(1, 1), INTERACTIVE, INTERACTIVE, INTERACTIVE)
    assert more[2].refused  # calls of equal priority keep their slots
    await end([*visitors, *more])


async def test_refusal_has_all_three_retry_hints() -> None:
    admission = Admission(1, 0)
    async with admission.slot(INTERACTIVE):
        with pytest.raises(ResourceExhaustedError) as refusal:
            async with admission.slot(INTERACTIVE):
                pass
    status = call_status(refusal.value)
    trailers = dict(status.trailers)
    detail = status_pb2.Status.FromString(cast("bytes", trailers[STATUS_HEADER]))
    info = error_details_pb2.RetryInfo()
    assert detail.details[-1].Unpack(info)
    assert (status.code, detail.code) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 8)
    milliseconds = info.retry_delay.ToMilliseconds()
    assert milliseconds == int(str(trailers[PUSHBACK_HEADER])) > 0
    assert milliseconds <= 1000 * int(str(trailers[RETRY_AFTER_HEADER])) < milliseconds + 1000


async def test_call_that_would_miss_its_deadline_is_refused_on_arrival() -> None:
    """The rule begins when recent durations are known; a request that has time waits."""
    admission = Admission(1, 10)
    async with admission.slot(INTERACTIVE, 0.001):
        pass  # a free place is given to everybody: what it takes is known only by trying
    admission.seconds = Ewma(2.0)  # as after work that took two seconds
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(admission.slot(INTERACTIVE))
        with pytest.raises(ResourceExhaustedError, match="deadline"):
            await stack.enter_async_context(admission.slot(INTERACTIVE, seconds_left=3.9))
        patient = asyncio.create_task(stack.enter_async_context(admission.slot(INTERACTIVE, seconds_left=60)))
        await settle()
        assert (admission.running, admission.queued) == (1, 1)
        patient.cancel()


@pytest.mark.parametrize("end", [asyncio.CancelledError, lambda: DeadlineExceededError("late")])
async def test_cancelled_call_counts_at_least_the_expected_duration(
    monkeypatch: pytest.MonkeyPatch, end: Callable[[], BaseException]
) -> None:
    """While targets hang nothing ends well, and the estimate from before let in what could not be done in time."""
    clock, admission = [0.0], Admission(1, 10)
    monkeypatch.setattr("atspeed.rpc.admission.time.monotonic", lambda: clock[0])

    async def work(seconds: float, ending: BaseException | None = None) -> None:
        with contextlib.suppress(asyncio.CancelledError, DeadlineExceededError):
            async with admission.slot(INTERACTIVE):
                clock[0] += seconds
                if ending:
                    raise ending

    await work(1.0)
    await work(0.1, end())  # says nothing: it may have been cut off early
    assert admission.seconds.value == 1.0
    for _ in range(50):
        await work(5.0, end())
    assert admission.seconds.value == pytest.approx(5.0, rel=0.02)


async def test_deadline_ends_the_wait() -> None:
    admission = Admission(1, 1)
    async with admission.slot(INTERACTIVE):
        with pytest.raises(ResourceExhaustedError, match="deadline"):
            async with admission.slot(INTERACTIVE, seconds_left=0.01):
                pass
    assert (admission.running, admission.queued) == (0, 0)


async def test_slot_that_comes_with_a_cancellation_is_passed_on() -> None:
    visitors, _ = await arrive(Admission(1, 2), INTERACTIVE, INTERACTIVE, INTERACTIVE)
    visitors[0].leave.set()
    await asyncio.sleep(0)  # the first leaves: the second has its turn, and has not run yet
    visitors[1].task.cancel()
    await settle()
    assert visitors[2].inside.is_set()
    await end(visitors)


@given(
    slots=st.integers(1, 3),
    queue=st.integers(0, 3),
    steps=st.lists(st.tuples(st.sampled_from(["arrive", "leave", "cancel"]), st.integers(0, 9), st.booleans())),
)
def test_invariants(slots: int, queue: int, steps: list[tuple[str, int, bool]]) -> None:
    """No slot too many is given and none is lost, no call waits beside a free slot, no batch request overtakes."""
    asyncio.run(hold(Admission(slots, queue), steps))


async def hold(admission: Admission, steps: list[tuple[str, int, bool]]) -> None:
    journal: list[Visitor] = []
    visitors: list[Visitor] = []
    for action, number, calm in steps:
        open_visitors = [visitor for visitor in visitors if not visitor.task.done()]
        if action == "arrive":
            visitors.append(Visitor(admission, Priority(number % 2), journal))
        elif open_visitors:
            chosen = open_visitors[number % len(open_visitors)]
            if action == "leave":
                chosen.leave.set()
            else:
                chosen.task.cancel()
        if calm:
            await settle()
            running = [visitor for visitor in visitors if visitor.inside.is_set() and not visitor.task.done()]
            waiting = [visitor for visitor in visitors if visitor.waiting]
            assert (admission.running, admission.queued) == (len(running), len(waiting))
            assert admission.running <= admission.slots
            assert admission.queued <= admission.queue_limit
            assert not waiting or admission.running == admission.slots
    for visitor in visitors:
        visitor.leave.set()
    await asyncio.gather(*(visitor.task for visitor in visitors), return_exceptions=True)
    assert (admission.running, admission.queued) == (0, 0)
