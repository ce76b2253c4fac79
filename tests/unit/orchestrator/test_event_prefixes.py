"""Prefixes after events: idle time only, requests first, and every prefix counted once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from atspeed.errors import NotFoundError
from atspeed.rpc.admission import Admission, Priority
from orchestrator.serving.event_prefixes import EventPrefixes
from orchestrator.serving.track_router import TrackRouter
from orchestrator.user_key import user_cache_key


class Model:
    """Router, track, snapshot and recommender in one. `gate` holds a reading until it is set."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.started: list[str] = []
        self.read: list[str] = []
        self.error: Exception | None = None
        self.reads_ahead = True
        self.snapshots = self.recommender = self.current = self

    def of(self, subject: bytes) -> Model:
        return self

    @contextmanager
    def in_use(self) -> Iterator[Model]:
        yield self

    async def read_prompt(self, user_id: str, tenant: str, deadline: object) -> None:
        self.started.append(user_id)
        await self.gate.wait()
        if self.error:
            raise self.error
        self.read.append(user_id)


def made_of(model: Model, admission: Admission | None = None, *, enabled: bool = True) -> EventPrefixes:
    router = cast("TrackRouter", cast("Any", model))
    return EventPrefixes(router, admission or Admission(2, 2), seconds=10, enabled=enabled)


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the counts have no event
            await asyncio.sleep(0.001)


def counts(prefixes: EventPrefixes) -> dict[str, int]:
    return {name: count for name, count in prefixes.outcomes.items() if count}


async def test_a_list_after_an_event_is_a_hit_once() -> None:
    prefixes = made_of(model := Model())
    prefixes.offer("u", "")
    await until(lambda: model.read == ["u"] and prefixes.outcomes["made"])
    for _ in range(2):
        prefixes.request(user_cache_key("", "u"))
    prefixes.request(None)
    assert counts(prefixes) == {"made": 1, "hit": 1}


async def test_a_prompt_that_waits_for_a_request_is_not_read() -> None:
    prefixes = made_of(model := Model())
    model.reads_ahead = False
    prefixes.offer("u", "")
    await asyncio.sleep(0.05)
    prefixes.request(user_cache_key("", "u"))
    assert (model.started, counts(prefixes)) == ([], {})


async def test_another_event_or_erasure_wastes_a_prefix() -> None:
    prefixes = made_of(model := Model())
    prefixes.offer("u", "")
    await until(lambda: prefixes.outcomes["made"] == 1)
    prefixes.offer("u", "")
    assert counts(prefixes) == {"made": 1, "wasted": 1}
    await until(lambda: prefixes.outcomes["made"] == 2)
    await prefixes.forget("u", "other")
    assert prefixes.outcomes["wasted"] == 1
    await prefixes.forget("u", "")
    assert counts(prefixes) == {"made": 2, "wasted": 2}
    assert model.read == ["u", "u"]


async def test_nothing_runs_beside_a_request() -> None:
    admission = Admission(2, 2)
    prefixes = made_of(model := Model(), admission)
    async with admission.slot(Priority.INTERACTIVE):
        prefixes.offer("u", "")
        await asyncio.sleep(0.05)
        assert model.started == []
    await until(lambda: model.read == ["u"])


async def test_a_request_cancels_what_runs_and_it_waits_again() -> None:
    admission = Admission(2, 2)
    prefixes = made_of(model := Model(), admission)
    model.gate.clear()
    prefixes.offer("u", "")
    await until(lambda: model.started == ["u"])
    prefixes.request(user_cache_key("", "other"))
    async with admission.slot(Priority.INTERACTIVE):
        await until(lambda: prefixes.outcomes["cancelled"] == 1)
        model.gate.set()
        await asyncio.sleep(0.05)
        assert model.read == []
    await until(lambda: prefixes.outcomes["made"] == 1)
    assert model.started == ["u", "u"]


async def test_a_user_who_asks_needs_no_prefix_any_more() -> None:
    admission = Admission(2, 2)
    prefixes = made_of(model := Model(), admission)
    async with admission.slot(Priority.INTERACTIVE):
        prefixes.offer("u", "")
        prefixes.offer("v", "")
        prefixes.request(user_cache_key("", "u"))
    await until(lambda: model.read == ["v"])
    await asyncio.sleep(0.03)
    assert model.read == ["v"]


async def test_erasure_ends_the_running_prefix_before_it_returns() -> None:
    prefixes = made_of(model := Model())
    model.gate.clear()
    prefixes.offer("u", "")
    await until(lambda: model.started == ["u"])
    await prefixes.forget("u", "")
    model.gate.set()
    await asyncio.sleep(0.05)
    assert (model.started, model.read) == (["u"], [])


async def test_failures_are_counted_and_the_next_user_is_served() -> None:
    prefixes = made_of(model := Model())
    model.error = NotFoundError("user_id", "no history")
    prefixes.offer("u", "")
    await until(lambda: prefixes.outcomes["failed"] == 1)
    model.error = None
    prefixes.offer("v", "")
    await until(lambda: model.read == ["v"])


async def test_it_is_off_by_its_setting_and_bounded() -> None:
    admission = Admission(2, 2)
    off = made_of(Model(), enabled=False)
    off.offer("u", "")
    off.request(None)
    assert counts(off) == {}
    prefixes = made_of(model := Model(), admission)
    async with admission.slot(Priority.INTERACTIVE):
        for number in range(1_010):
            prefixes.offer(f"{number}", "")
        assert counts(prefixes) == {"dropped": 10}
    await prefixes.close()
    assert model.read == []
