"""Events against a real Redis: replays, late events, ties, and histories from before events had times."""

from __future__ import annotations

import itertools
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from orchestrator.events import StoredEvent
from orchestrator.history import HistoryStore, HistoryUnavailable, Recorded, UserEvents
from tests.serving import LIVENESS_SECONDS
from tests.stored_histories import append

DAY = 86_400_000_000


def ordered(events: Iterable[StoredEvent]) -> list[StoredEvent]:
    """The oracle: the first event of every key, by time and key."""
    by_key: dict[str, StoredEvent] = {}
    for event in events:
        by_key.setdefault(event.event_id, event)
    return sorted(by_key.values(), key=lambda event: (event.time_us or 0, event.event_id.encode()))


async def send_one_by_one(histories: HistoryStore, stream: Sequence[tuple[str, StoredEvent]]) -> None:
    sent: dict[str, list[StoredEvent]] = {}
    for name, event in stream:
        sent.setdefault(name, []).append(event)
    for name, events in sent.items():
        for first in range(0, len(events), 97):
            await histories.record(name, events[first : first + 97])


async def send_in_batches(histories: HistoryStore, stream: Sequence[tuple[str, StoredEvent]]) -> None:
    for first in range(0, len(stream), 2500):
        batch = [UserEvents(name, [event]) for name, event in stream[first : first + 2500]]
        recorded = await histories.record_batch(batch)
        assert len(recorded) == len(batch)
        assert all(isinstance(one, Recorded) for one in recorded)


@pytest.mark.parametrize("send", [send_one_by_one, send_in_batches])
async def test_ten_thousand_events_replayed_twice_and_shuffled_are_the_ordered_ones(
    redis_client: Redis, send: Callable[[HistoryStore, Sequence[tuple[str, StoredEvent]]], Awaitable[None]]
) -> None:
    """Users have from a few events to more than a history keeps; many events share their time."""
    draw = random.Random(17)
    histories = HistoryStore(redis_client, 200, trim_step=8, timeout_seconds=LIVENESS_SECONDS)
    users: dict[str, list[StoredEvent]] = {f"user-{number}": [] for number in range(40)}
    names = draw.choices(list(users), weights=[1 / (1 + rank) for rank in range(40)], k=10_000)
    for number, name in enumerate(names):
        time = 1_700_000_000_000_000 + draw.randrange(40) * DAY
        users[name].append(
            StoredEvent(f"item-{draw.randrange(500)}", time, draw.choice(["view", ""]), 0.5, f"e{number}", "r")
        )
    assert max(map(len, users.values())) > 1000
    stream = [(name, event) for name, events in users.items() for event in events] * 3
    draw.shuffle(stream)
    await send(histories, stream)
    for name, events in users.items():
        assert await histories.events(name) == ordered(events)[-200:]


async def test_a_batch_tells_which_users_failed(redis_client: Redis) -> None:
    """A key of another kind fails alone. A full Redis fails them all and changes nothing."""
    histories = HistoryStore(redis_client, 20, timeout_seconds=LIVENESS_SECONDS)
    await redis_client.set("history::broken", "x")
    users = [UserEvents(name, [StoredEvent("a", 5, event_id="e")]) for name in ("one", "broken", "two")]
    first, broken, last = await histories.record_batch(users)
    assert (first, last) == (Recorded(1, 0, 0), Recorded(1, 0, 0))
    assert isinstance(broken, HistoryUnavailable)
    assert "broken" not in str(broken)
    await redis_client.config_set("maxmemory", 1)
    full = await histories.record_batch(
        [UserEvents("three", [StoredEvent("a")]), UserEvents("one", [StoredEvent("b")])]
    )
    assert all(isinstance(one, HistoryUnavailable) for one in full)
    await redis_client.config_set("maxmemory", "256mb")
    assert await histories.get("three") is None
    assert await histories.get("one") == ["a"]


async def test_a_batch_after_the_scripts_are_gone_is_stored(redis_client: Redis) -> None:
    """Another server, after a failover, knows no script."""
    histories = HistoryStore(redis_client, 20, timeout_seconds=LIVENESS_SECONDS)
    users = [UserEvents(name, [StoredEvent("a")]) for name in "uvw"]
    for length in (1, 2):
        await redis_client.script_flush()
        assert await histories.record_batch(users) == [Recorded(length, 0, 0)] * 3
    assert await histories.record_batch([]) == []


EVENTS = st.builds(
    StoredEvent,
    item_id=st.text(max_size=3),
    time_us=st.integers(0, 6),
    type=st.sampled_from(["", "view", "é\x00{}"]),
    weight=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    event_id=st.sampled_from("abcdefghijkl"),
    recommendation_id=st.sampled_from(["", "r"]),
)


@given(batches=st.lists(st.lists(EVENTS, max_size=6), max_size=8))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_history_is_its_first_events_by_time_and_key(
    redis_client: Redis, batches: list[list[StoredEvent]]
) -> None:
    histories = HistoryStore(redis_client, 20)
    await histories.forget("u")
    duplicates = 0
    for events in batches:
        recorded = await histories.record("u", events)
        duplicates += recorded.duplicates
        assert recorded.expired == 0
    sent = list(itertools.chain.from_iterable(batches))
    assert await histories.events("u") == ordered(sent)
    assert duplicates == len(sent) - len(ordered(sent))


async def test_a_replay_changes_nothing_in_redis(redis_client: Redis) -> None:
    histories = HistoryStore(redis_client, 20)
    events = [StoredEvent(f"i{n}", 1000 * n, "buy", 2.5, f"e{n}") for n in range(5)]
    assert (await histories.record("u", events)).duplicates == 0
    before = await redis_client.dump("history::u")
    changed = [replace(event, item_id="other", time_us=5) for event in events]
    recorded = await histories.record("u", changed)
    assert (recorded.length, recorded.duplicates) == (5, 5)
    assert await redis_client.dump("history::u") == before


async def test_a_late_event_goes_where_its_time_puts_it(redis_client: Redis) -> None:
    histories = HistoryStore(redis_client, 20)
    await histories.record("u", [StoredEvent("first", 10), StoredEvent("last", 30)])
    await histories.record("u", [StoredEvent("late", 20)])
    assert await histories.get("u") == ["first", "late", "last"]


async def test_events_without_a_time_follow_each_other(redis_client: Redis) -> None:
    """Also at one moment of the server's clock, and never before what was stored without a time earlier."""
    histories = HistoryStore(redis_client, 500)
    items = [str(number) for number in range(300)]
    for first in range(0, 300, 50):
        await append(histories, "u", items[first : first + 50])
    assert await histories.get("u") == items
    times = [event.time_us or 0 for event in await histories.events("u")]
    assert times == sorted(set(times))
    assert times[0] > 1_600_000_000_000_000


async def test_an_event_older_than_all_of_a_full_history_is_not_stored(redis_client: Redis) -> None:
    histories = HistoryStore(redis_client, 5)
    await histories.record("u", [StoredEvent(f"i{n}", 1000 + n, event_id=f"e{n}") for n in range(200)])
    stored = await redis_client.hlen("history::u")
    recorded = await histories.record(
        "u", [StoredEvent("old", 7, event_id="old"), StoredEvent("i3", 1003, event_id="e3")]
    )
    assert (recorded.length, recorded.expired) == (5, 2)
    assert await redis_client.hlen("history::u") == stored
    assert await histories.get("u") == [f"i{n}" for n in range(195, 200)]


class TestHistoriesThatAreLists:
    """Histories were lists of item ids before events had times."""

    async def _list(self, client: Redis, items: Sequence[str]) -> None:
        await client.rpush("history::u", *items)

    async def test_it_is_read_as_it_is(self, redis_client: Redis) -> None:
        await self._list(redis_client, ["a", "b", "é"])
        histories = HistoryStore(redis_client, 2)
        assert await histories.get("u") == ["b", "é"]
        assert await histories.events("u") == [StoredEvent("b"), StoredEvent("é")]
        assert await redis_client.type("history::u") == b"list"

    async def test_the_next_event_converts_it(self, redis_client: Redis) -> None:
        await self._list(redis_client, ["a", "b", "é"])
        histories = HistoryStore(redis_client, 10)
        recorded = await histories.record("u", [StoredEvent("early", 5, event_id="e"), StoredEvent("now")])
        assert recorded.length == 5
        assert await histories.get("u") == ["a", "b", "é", "early", "now"]
        events = await histories.events("u")
        assert [event.time_us for event in events][:4] == [None, None, None, 5]
        assert await histories.forget("u") is True
        assert await histories.get("u") is None

    async def test_a_full_redis_loses_nothing_of_it(self, redis_client: Redis) -> None:
        await self._list(redis_client, ["a", "b"])
        histories = HistoryStore(redis_client, 10)
        await redis_client.config_set("maxmemory", 1)
        with pytest.raises(HistoryUnavailable):
            await histories.record("u", [StoredEvent("c")])
        assert await histories.get("u") == ["a", "b"]


@pytest.mark.parametrize("fields", [{"k1": "no event"}, {"n1": "5 9"}, {"meta": "1"}, {"ka": "1 1 i{"}])
async def test_a_hash_that_is_no_history_is_unavailable(redis_client: Redis, fields: dict[Any, Any]) -> None:
    await redis_client.hset("history::u", mapping=fields)
    with pytest.raises(HistoryUnavailable):
        await HistoryStore(redis_client, 5).events("u")
