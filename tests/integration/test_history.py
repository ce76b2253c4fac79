"""Histories against a real server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from structlog.testing import capture_logs

from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.kv.redis_client import connect
from atspeed.local.redis_server import LocalRedis
from orchestrator.history import LIMIT_KEY, HistoryStore, HistoryUnavailable
from tests.stored_histories import append


@pytest.fixture
async def histories(redis_client: Redis) -> HistoryStore:
    return HistoryStore(redis_client, max_items=5)


async def test_items_come_back_in_order(histories: HistoryStore) -> None:
    assert await histories.get("u") is None
    assert await append(histories, "u", ["a", "b"]) == 2
    assert await append(histories, "u", ["c"]) == 3
    assert await histories.get("u") == ["a", "b", "c"]
    assert await histories.get("v") is None


async def test_the_newest_are_kept(histories: HistoryStore, redis_client: Redis) -> None:
    assert await append(histories, "u", [str(item) for item in range(12)]) == 5
    assert await append(histories, "u", ["12", "13"]) == 5
    assert await histories.get("u") == ["9", "10", "11", "12", "13"]
    assert [event.item_id for event in await histories.events("u")] == ["9", "10", "11", "12", "13"]
    await append(histories, "u", [str(item) for item in range(14, 200)])
    assert await redis_client.hlen("history::u") - 1 <= 5 + 64


class Model:
    """A history in plain Python. dropped: how many of its events are no longer kept."""

    def __init__(self, max_items: int, trim_step: int) -> None:
        self.max_items, self.trim_step = max_items, trim_step
        self.events: list[str] = []
        self.dropped = 0

    def append(self, items: Sequence[str]) -> None:
        self.events += items
        excess = len(self.events) - self.dropped - self.max_items
        if excess > 0:
            self.dropped += math.ceil(excess / self.trim_step) * self.trim_step

    @property
    def kept(self) -> list[str]:
        return self.events[self.dropped :]


# (max_items, trim_step <= max_items), and how many items each append brings.
caps = st.integers(1, 12).flatmap(lambda most: st.tuples(st.just(most), st.integers(1, most)))
batches = st.lists(st.integers(0, 30), max_size=12)
with_redis = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(cap=caps, sizes=batches)
@example(cap=(5, 2), sizes=[12])
@example(cap=(4, 4), sizes=[4, 1, 3, 1])
@with_redis
async def test_trims_in_steps_as_a_plain_list_does(redis_client: Redis, cap: tuple[int, int], sizes: list[int]) -> None:
    histories, model = HistoryStore(redis_client, cap[0], trim_step=cap[1]), Model(*cap)
    await histories.forget("u")
    for size in sizes:
        items = [str(len(model.events) + n) for n in range(size)]
        model.append(items)
        assert await append(histories, "u", items) == min(len(model.events), cap[0])
        assert [event.item_id for event in await histories.events("u")] == model.events[-cap[0] :]
        assert await histories.get("u") == (model.kept or None)
        assert model.dropped % cap[1] == 0


@given(data=st.data(), window=st.integers(1, 10), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=25))
@with_redis
async def test_the_prompts_window_moves_by_whole_blocks(
    redis_client: Redis, data: st.DataObject, window: int, sizes: list[int]
) -> None:
    """It starts where it would if nothing were ever trimmed, so long as the cap leaves room for window and block."""
    block = data.draw(st.integers(1, window))
    cap = data.draw(st.integers(window + block - 1, window + 3 * block))
    prompt = PromptTemplate(prefix=(0,), max_items=window, drop_block=block)
    histories = HistoryStore(redis_client, cap, trim_step=block)
    await histories.forget("u")
    events: list[str] = []
    for size in sizes:
        items = [str(len(events) + n) for n in range(size)]
        events += items
        await append(histories, "u", items)
        kept = await histories.get("u") or []
        assert kept[prompt.window_start(len(kept)) :] == events[prompt.window_start(len(events)) :]


async def test_a_heavy_user_keeps_the_prompts_beginning(redis_client: Redis) -> None:
    """One event at a time at the cap: the window's first item changes once in a block, and not at every event."""
    prompt = PromptTemplate(prefix=(0,), max_items=8, drop_block=4)
    histories = HistoryStore(redis_client, 20, trim_step=4)
    await append(histories, "u", [str(item) for item in range(20)])
    firsts = []
    for item in range(20, 60):
        await append(histories, "u", [str(item)])
        kept = await histories.get("u") or []
        firsts.append(kept[prompt.window_start(len(kept))])
    assert len(set(firsts)) == 10
    assert firsts == sorted(firsts, key=int)


async def test_more_items_than_one_lua_call_takes(redis_client: Redis) -> None:
    items = [str(item) for item in range(20_003)]
    histories = HistoryStore(redis_client, 18_000, trim_step=1000)
    assert await append(histories, "u", items) == 18_000
    assert await histories.get("u") == items[3000:]


@pytest.mark.parametrize(
    ("own", "others"), [((5, 1), (20, 1)), ((8, 4), (20, 4)), ((8, 1), (20, 10)), ((19, 1), (20, 10))]
)
async def test_deployments_with_two_limits_cut_nothing_that_either_shows(
    redis_client: Redis, own: tuple[int, int], others: tuple[int, int]
) -> None:
    """Each writer keeps its own newest items, from a multiple of its step on, as if it were alone."""
    stores = [HistoryStore(redis_client, most, trim_step=step) for most, step in (own, others)]
    await stores[1].publish_limit()
    events: list[str] = []
    for turn in range(40):
        items = [f"{turn}-{number}" for number in range(1 + turn % 3)]
        events += items
        lengths = {store: await append(store, "u", []) for store in stores}
        stored = await append(stores[turn % 2], "u", items)
        for store, (most, step) in zip(stores, (own, others), strict=True):
            shown = await store.get("u") or []
            assert shown == events[len(events) - len(shown) :]
            assert most - step < len(shown) <= most or len(shown) == len(events)
            assert lengths[store] <= most
        assert stored == len(await stores[turn % 2].events("u"))


async def test_a_limit_falls_once_what_remembers_it_is_deleted(redis_client: Redis) -> None:
    larger, smaller = HistoryStore(redis_client, 20), HistoryStore(redis_client, 5)
    await append(larger, "u", [str(item) for item in range(20)])
    await append(smaller, "u", ["20"])
    assert await append(larger, "u", []) == 20
    await redis_client.delete(LIMIT_KEY)
    await append(smaller, "u", [str(item) for item in range(21, 90)])
    assert await redis_client.hlen("history::u") - 1 == 5
    assert await redis_client.get(LIMIT_KEY) == b"5"


async def test_a_smaller_limit_is_warned_of_once(redis_client: Redis) -> None:
    await HistoryStore(redis_client, 20).publish_limit()
    smaller = HistoryStore(redis_client, 5)
    with capture_logs() as logged:
        await smaller.publish_limit()
        await append(smaller, "u", ["a"])
        await append(HistoryStore(redis_client, 20), "u", ["a"])
    assert [(line["event"], line["max_history_items"], line["stored_limit"]) for line in logged] == [
        ("history_limit_below_stored", 5, 20)
    ]


async def test_tenants_share_no_user(histories: HistoryStore, redis_client: Redis) -> None:
    """Keys differ for any names: no two pairs of tenant and user have the same key."""
    pairs = [(t, u) for t in ("", "a", "a:b", "a%3Ab", ":", "%3A", "é") for u in ("", "u", "b:u", ":u", "a:u", "::")]
    for number, (tenant, user) in enumerate(pairs):
        assert await append(histories, user, [str(number)], tenant=tenant) == 1
    for number, (tenant, user) in enumerate(pairs):
        assert await histories.get(user, tenant=tenant) == [str(number)]
    assert len(await redis_client.keys("history:*")) == len(pairs)
    assert await histories.forget("u", tenant="a") is True
    assert await histories.get("u", tenant="a") is None
    assert await histories.get("u") is not None


async def test_appending_nothing_tells_the_length(histories: HistoryStore) -> None:
    assert await append(histories, "u", []) == 0
    assert await histories.get("u") is None
    await append(histories, "u", ["a"])
    assert await append(histories, "u", []) == 1


async def test_concurrent_appends_lose_nothing_and_never_exceed_the_cap(redis_client: Redis) -> None:
    histories = HistoryStore(redis_client, max_items=30)
    lengths = await asyncio.gather(*(append(histories, "u", [f"{n}a", f"{n}b"]) for n in range(20)))
    items = await histories.get("u")
    assert items is not None
    assert max(lengths) == len(items) == 30
    # Each append is one step: its two items stand next to each other.
    assert all(a[:-1] == b[:-1] and (a[-1], b[-1]) == ("a", "b") for a, b in zip(items[::2], items[1::2], strict=True))


async def test_forgetting_is_complete(histories: HistoryStore, redis_client: Redis) -> None:
    await append(histories, "u", ["a"])
    assert await histories.forget("u") is True
    assert await histories.forget("u") is False
    assert await histories.get("u") is None
    assert set(await redis_client.keys()) == {b"forgotten-users", LIMIT_KEY.encode()}


async def test_never_expires(histories: HistoryStore, redis_client: Redis) -> None:
    await append(histories, "u", ["a"])
    assert await redis_client.ttl("history::u") == -1


@pytest.mark.parametrize("item", ["", " ", "é漢", "a\nb", "a\x00b", '"', "\\x80\\x04K\\x01.", "x" * 10_000])
async def test_ids_are_kept_as_they_are(histories: HistoryStore, item: str) -> None:
    await append(histories, f"u:{item[:50]}", [item])
    assert await histories.get(f"u:{item[:50]}") == [item]


async def test_stored_garbage_is_text_not_an_error(histories: HistoryStore, redis_client: Redis) -> None:
    await redis_client.rpush("history::u", b"\xff\x80\x04K\x01.")
    (item,) = await histories.get("u") or []
    assert "�" in item


class TestUnavailable:
    async def _all_fail(self, histories: HistoryStore) -> None:
        for call in (append(histories, "secret-user", ["a"]), append(histories, "secret-user", [])):
            with pytest.raises(HistoryUnavailable) as failure:
                await call
            assert "secret-user" not in str(failure.value)
        with pytest.raises(HistoryUnavailable):
            await histories.get("secret-user")
        with pytest.raises(HistoryUnavailable):
            await histories.forget("secret-user")

    async def test_down(self, redis_url: str, redis_server: LocalRedis, histories: HistoryStore) -> None:
        redis_server.kill()
        await self._all_fail(histories)
        redis_server.start()
        assert await append(histories, "u", ["a"]) == 1

    async def test_hanging(self, redis_url: str, redis_server: LocalRedis, redis_client: Redis) -> None:
        hasty = HistoryStore(redis_client, max_items=5, timeout_seconds=0.1)
        async with asyncio.timeout(60):
            redis_server.pause()
            await self._all_fail(hasty)

    async def test_one_users_late_answer_is_never_anothers(
        self, redis_url: str, redis_server: LocalRedis, redis_client: Redis
    ) -> None:
        hasty = HistoryStore(redis_client, max_items=5, timeout_seconds=0.1)
        patient = HistoryStore(redis_client, max_items=5, timeout_seconds=60)
        await append(patient, "one", ["1"])
        await append(patient, "other", ["2"])
        redis_server.pause()
        with pytest.raises(HistoryUnavailable):
            await hasty.get("one")
        redis_server.resume()
        assert await patient.get("other") == ["2"]

    async def test_holding_something_else(self, histories: HistoryStore, redis_client: Redis) -> None:
        await redis_client.set("history::secret-user", "not a list")
        with pytest.raises(HistoryUnavailable) as failure:
            await append(histories, "secret-user", ["a"])
        assert "secret-user" not in str(failure.value)
        with pytest.raises(HistoryUnavailable):
            await histories.get("secret-user")

    async def test_full(self, histories: HistoryStore, redis_client: Redis) -> None:
        await append(histories, "u", ["a"])
        await redis_client.config_set("maxmemory", 1)
        with pytest.raises(HistoryUnavailable):
            await append(histories, "u", ["b"])
        assert await histories.get("u") == ["a"]

    async def test_a_broken_connection_never_appends_twice(self, redis_url: str) -> None:
        """A client that retries would append again where only the reply was lost. And it is one command."""
        received: list[bytes] = []

        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                received.append(data)
                if b"EVAL" in data:
                    break
                writer.write(b"+OK\r\n" * data.count(b"*"))
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, connect(f"redis://127.0.0.1:{port}/0?protocol=2", timeout_seconds=5.0) as client:
            with pytest.raises(HistoryUnavailable):
                await append(HistoryStore(client, max_items=5, timeout_seconds=30), "u", ["a"])
        await asyncio.sleep(0.01)
        sent = b"".join(received)
        assert [sent.count(command) for command in (b"EVAL\r\n", b"MULTI")] == [1, 0]

    def test_refuses_an_empty_cap(self, redis_url: str) -> None:
        with pytest.raises(ValueError, match="max_items"):
            HistoryStore(connect(redis_url, timeout_seconds=1.0), max_items=0)

    @pytest.mark.parametrize("step", [0, -1, 6])
    def test_refuses_a_step_that_would_leave_nothing(self, redis_url: str, step: int) -> None:
        with pytest.raises(ValueError, match="trim_step"):
            HistoryStore(connect(redis_url, timeout_seconds=1.0), max_items=5, trim_step=step)


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_restarted_server_is_served_at_once(
    redis_server: LocalRedis, histories: HistoryStore, how: str
) -> None:
    """Every pooled connection is stale then; none of them may fail a call, above all no append, which is not repeated."""
    await asyncio.gather(*(append(histories, f"u{number}", ["a"]) for number in range(6)))
    await asyncio.to_thread(getattr(redis_server, how))
    await asyncio.to_thread(redis_server.start)
    assert [await append(histories, "z", ["a"]) for _ in range(4)] == [1, 2, 3, 4]
    assert await asyncio.gather(*(histories.get("z") for _ in range(6))) == [["a"] * 4] * 6
