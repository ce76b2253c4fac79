"""The batcher's queue: its order, its limits, cancellation, and delivery of outcomes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.engine.errors import CapacityError, OverloadedError
from atspeed.engine.model.batcher import Batcher, BatchLimits, PassSize, Reschedule, next_batch

sizes = st.builds(PassSize, new_tokens=st.integers(1, 60), cached_tokens=st.integers(0, 200))
limits = st.builds(
    BatchLimits,
    requests=st.integers(1, 6),
    tokens=st.integers(1, 80),
    gathered_tokens=st.integers(0, 800),
    row_keys=st.integers(0, 300),
)
SMALL = PassSize(1, 10)


@given(st.lists(sizes, min_size=1, max_size=12), limits)
def test_batch_keeps_its_limits_and_starts_with_the_oldest(waiting: list[PassSize], limits: BatchLimits) -> None:
    batch = next_batch(waiting, limits)
    assert batch[0] == 0
    assert batch == sorted(set(batch))
    if len(batch) > 1:
        new, cached = ([getattr(waiting[i], name) for i in batch] for name in ("new_tokens", "cached_tokens"))
        assert len(batch) <= limits.requests
        assert len(batch) * max(new) <= limits.tokens
        assert len(batch) * (max(new) + max(cached)) <= limits.gathered_tokens
        assert max(new) + max(cached) <= limits.row_keys
        assert len(batch) * max(new) <= 1.5 * sum(new)
        assert len(batch) * max(cached) <= 1.5 * sum(cached)


@given(st.integers(1, 12), sizes, limits)
def test_equal_passes_share_a_batch_up_to_the_limits(count: int, size: PassSize, limits: BatchLimits) -> None:
    by_tokens = limits.tokens // size.new_tokens
    keys = size.new_tokens + size.cached_tokens
    by_memory = limits.gathered_tokens // keys if keys <= limits.row_keys else 1
    assert len(next_batch([size] * count, limits)) == min(count, limits.requests, max(1, min(by_tokens, by_memory)))


@given(st.lists(sizes, min_size=1, max_size=10), st.lists(st.lists(sizes, max_size=3), max_size=12), limits)
def test_pass_behind_n_others_runs_within_n_plus_one_batches(
    first: list[PassSize], later: list[list[PassSize]], limits: BatchLimits
) -> None:
    """With any arrivals between batches, the request that found n others waiting is in batch n + 1 at the latest."""
    queue = list(enumerate(first))
    for batches, arrivals in enumerate(later, start=1):
        for index in reversed(next_batch([size for _, size in queue], limits) if queue else []):
            del queue[index]
        assert all(found >= batches for found, _ in queue)
        queue += [(len(queue) + batches + extra, size) for extra, size in enumerate(arrivals)]


class Gate:
    """Work that waits for its release. batches: what ran together.

    more: passes that a work has after its first one. behind: works whose next pass gives way to the requests that wait.
    """

    def __init__(self, **more: int) -> None:
        self.batches: list[list[str]] = []
        self.more = more
        self.behind: set[str] = set()
        self.entered = threading.Semaphore(0)
        self.release = threading.Semaphore(0)

    def __call__(self, works: Sequence[str]) -> list[str | Reschedule | Exception]:
        self.batches.append(list(works))
        self.entered.release()
        self.release.acquire()
        if "crash" in works:
            raise RuntimeError("no memory")
        return [self._outcome(work) for work in works]

    def _outcome(self, work: str) -> str | Reschedule | Exception:
        if self.more.get(work):
            self.more[work] -= 1
            return Reschedule(SMALL, behind=work in self.behind)
        return CapacityError(work) if work == "refused" else work.upper()

    async def entrance(self) -> None:
        """Return when a batch has begun."""
        await asyncio.to_thread(self.entered.acquire)


async def ask(batcher: Batcher[str, str], work: str, size: PassSize = SMALL) -> str:
    return await batcher.outcome(batcher.put(work, size))


def start(batcher: Batcher[str, str], *works: str) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(ask(batcher, work)) for work in works]


async def test_passes_queued_during_a_batch_run_together() -> None:
    gate = Gate()
    batcher = Batcher(gate, BatchLimits(requests=3))
    alone = start(batcher, "a")
    await gate.entrance()
    waiting = start(batcher, "b", "c", "d", "e")
    await asyncio.sleep(0)
    assert batcher.queued == 4
    gate.release.release(3)
    assert await asyncio.gather(*alone, *waiting) == ["A", "B", "C", "D", "E"]
    assert gate.batches == [["a"], ["b", "c", "d"], ["e"]]
    assert batcher.queued == 0
    await batcher.close()


async def test_cancelled_request_leaves_the_queue_and_never_runs() -> None:
    gate = Gate()
    batcher = Batcher(gate, BatchLimits(waiting=2))
    [running] = start(batcher, "running")
    await gate.entrance()
    left, stays = start(batcher, "left", "stays")
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="max_queued_passes: 2 passes wait"):
        await ask(batcher, "too many")
    left.cancel()
    running.cancel()
    await asyncio.wait([left, running])
    assert batcher.queued == 1
    [after] = start(batcher, "after")
    await asyncio.sleep(0)
    gate.release.release(2)
    assert [await stays, await after] == ["STAYS", "AFTER"]
    assert gate.batches == [["running"], ["stays", "after"]]
    await batcher.close()


async def test_rescheduled_work_stays_in_the_thread() -> None:
    """The event loop stands still from the first pass to the last; and a closed batcher still runs all of them."""
    for more in (0, 3):
        gate = Gate(a=more)
        gate.release.release(1 + more)
        batcher = Batcher(gate, BatchLimits())
        ticket = batcher.put("a", SMALL)
        for _ in range(1 + more):
            gate.entered.acquire()
        assert await batcher.outcome(ticket) == "A"
        assert gate.batches == [["a"]] * (1 + more)
        last = batcher.put("last", SMALL)
        gate.more, gate.release = {"last": more}, threading.Semaphore(1 + more)
        await batcher.close()
        assert await last.done == "LAST"


async def test_rescheduled_work_precedes_younger_work_and_is_never_refused() -> None:
    gate = Gate(a=2, b=1)
    batcher = Batcher(gate, BatchLimits(requests=2, waiting=3))
    [first] = start(batcher, "a")
    await gate.entrance()
    others = start(batcher, "b", "c", "d")
    await asyncio.sleep(0)
    gate.release.release()
    await gate.entrance()
    assert batcher.queued == 2
    gate.release.release(10)
    assert await asyncio.gather(first, *others) == ["A", "B", "C", "D"]
    assert gate.batches == [["a"], ["a", "b"], ["a", "b"], ["c", "d"]]
    await batcher.close()


async def test_long_work_takes_turns_with_the_requests_that_wait() -> None:
    """Requests that waited when its pass ended come first, with all their passes. Then it gets one pass at a time."""
    gate = Gate(long=3, short=1)
    gate.behind = {"long"}
    batcher = Batcher(gate, BatchLimits(requests=1))
    tasks = start(batcher, "long")
    await gate.entrance()
    tasks += start(batcher, "short", "other")
    await asyncio.sleep(0)
    gate.release.release()
    await gate.entrance()
    tasks += start(batcher, "late")
    await asyncio.sleep(0)
    gate.release.release(10)
    await asyncio.gather(*tasks)
    names = [name for [name] in gate.batches]
    assert names == ["long", "short", "short", "other", "long", "late", "long", "long"]
    await batcher.close()


async def test_next_pass_of_an_older_request_comes_first() -> None:
    gate = Gate()
    batcher = Batcher(gate, BatchLimits(requests=1))
    tickets = start(batcher, "runs")
    await gate.entrance()
    for name, since in (("third", 3.0), ("first", 1.0), ("third again", 3.0), ("second", 2.0)):
        tickets.append(asyncio.ensure_future(batcher.outcome(batcher.put(name, SMALL, began_at=since))))
    gate.release.release(10)
    await asyncio.gather(*tickets)
    assert [name for [name] in gate.batches] == ["runs", "first", "second", "third", "third again"]
    await batcher.close()


async def test_request_cancelled_between_passes_has_no_next_pass() -> None:
    """The ticket is open while a pass runs and while the request waits for the next; it is done when nothing runs for it."""
    gate = Gate(runs=1, waits=1)
    batcher = Batcher(gate, BatchLimits(requests=1))
    runs, waits = (batcher.put(work, SMALL) for work in ("runs", "waits"))
    asking = [asyncio.create_task(batcher.outcome(ticket)) for ticket in (runs, waits)]
    await gate.entrance()
    asking[0].cancel()
    await asyncio.wait(asking[:1])
    assert not runs.done.done()
    gate.release.release()
    await gate.entrance()
    await asyncio.wait([runs.done])
    asking.append(asyncio.create_task(batcher.outcome(batcher.put("holder", SMALL, began_at=0.0))))
    gate.release.release()
    await gate.entrance()
    assert batcher.queued == 1
    asking[1].cancel()
    await asyncio.wait(asking[1:2])
    assert (batcher.queued, runs.done.cancelled(), waits.done.cancelled()) == (0, True, True)
    gate.release.release()
    assert await asking[2] == "HOLDER"
    assert gate.batches == [["runs"], ["waits"], ["holder"]]
    await batcher.close()


async def test_request_without_a_waiter_is_done_when_its_work_is() -> None:
    """Until then the work may still write to its memory."""
    gate = Gate()
    batcher = Batcher(gate, BatchLimits())
    ticket = batcher.put("a", SMALL)
    listening = asyncio.create_task(batcher.outcome(ticket))
    await gate.entrance()
    listening.cancel()
    await asyncio.wait([listening])
    assert not ticket.done.done()
    gate.release.release()
    assert await ticket.done == "A"
    await batcher.close()


async def test_failure_of_one_request_fails_no_co_batched_one() -> None:
    """A crash of the shared pass, by the memory it needs or by one of its rows, once failed all of them."""
    gate = Gate()
    batcher = Batcher(gate, BatchLimits())
    cases: list[tuple[list[str], list[str]]] = [
        (["a", "refused", "b"], ["A", "refused", "B"]),
        (["c", "crash", "d"], ["C", "no memory", "D"]),
        (["e"], ["E"]),
    ]
    for companions, expected in cases:
        [holder] = start(batcher, "holder")
        await gate.entrance()
        together = start(batcher, *companions)
        await asyncio.sleep(0)
        gate.release.release(2 if "crash" not in companions else 2 + len(companions))
        outcomes = await asyncio.gather(*together, return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == expected
        assert await holder == "HOLDER"
        for _ in gate.batches[1:]:
            await gate.entrance()
        gate.batches.clear()
    await batcher.close()


async def test_outcome_is_delivered_as_soon_as_it_is_computed() -> None:
    """Not when the last of the batch is; and a failure after that leaves the answer as it was."""
    first_is_back = threading.Event()

    def run(works: Sequence[str]) -> Iterator[str]:
        yield works[0].upper()
        if len(works) > 1:
            first_is_back.wait()
            raise MemoryError

    batcher = Batcher(run, BatchLimits(requests=2, delay_seconds=3600))
    first, second = start(batcher, "first", "second")
    assert await first == "FIRST"
    assert not second.done()
    first_is_back.set()
    assert await second == "SECOND"
    await batcher.close()


async def test_delayed_pass_waits_until_the_batch_is_full() -> None:
    """A delay of an hour: only a full batch, or the end, lets it go."""
    gate = Gate()
    gate.release.release(10)
    hour = BatchLimits(requests=2, delay_seconds=3600)
    batcher = Batcher(gate, hour)
    assert await asyncio.gather(*start(batcher, "a", "b")) == ["A", "B"]
    [left] = start(batcher, "left")
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.wait([left])
    assert await asyncio.gather(*start(batcher, "c", "d")) == ["C", "D"]
    [last] = start(batcher, "last")
    await asyncio.sleep(0)
    await batcher.close()
    assert await last == "LAST"
    assert gate.batches == [["a", "b"], ["c", "d"], ["last"]]
    for narrow in (
        replace(hour, tokens=1),
        replace(hour, gathered_tokens=2 * (SMALL.new_tokens + SMALL.cached_tokens) - 1),
    ):
        batcher = Batcher(gate, narrow)
        assert await ask(batcher, "no room for two") == "NO ROOM FOR TWO"
        await batcher.close()
