"""Pooled connections to a Redis that answer and are of no use, that fall silent, or that are all taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvloop
from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, MasterDownError, ReadOnlyError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from atspeed.engine.kv.erasure import ErasureSubscriber, publish_erasure
from atspeed.engine.kv.memory_cache import MemoryKvCache
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.redis_client import connect
from atspeed.engine.kv.redis_pool import RefusedError
from atspeed.local.redis_server import LocalRedis
from orchestrator.history import HistoryStore, HistoryUnavailable
from orchestrator.user_key import user_cache_key
from tests.conftest import mended
from tests.kv_chains import LAYOUT, LIVENESS_SECONDS, assert_run, chain, content, store_of
from tests.redis_proxy import RedisProxy
from tests.stored_histories import append

REFUSALS = {
    "READONLY You can't write against a read only replica.": ReadOnlyError,
    "LOADING Redis is loading the dataset in memory": BusyLoadingError,
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": MasterDownError,
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.": RefusedError,
    "NOREPLICAS Not enough good replicas to write.": RefusedError,
    "ERR Error running script (call to f_ab): @user_script:7: -READONLY You can't write.": RefusedError,
}


@pytest.fixture
def proxy(redis_url: str) -> Iterator[RedisProxy]:
    with RedisProxy(redis_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def other_server() -> Iterator[LocalRedis]:
    """The server that becomes the master."""
    with LocalRedis() as server:
        yield server


@pytest.fixture
async def new_master(other_server: LocalRedis) -> AsyncIterator[Redis]:
    async with Redis.from_url(mended(other_server)) as client:
        yield client


@pytest.fixture
async def demote(redis_client: Redis) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Make the old master a replica that keeps its connections and its data, and gets nothing of the new master's."""

    async def demoted() -> None:
        await redis_client.replicaof("127.0.0.1", 1)

    yield demoted
    await redis_client.replicaof("NO", "ONE")
    await redis_client.config_set("replica-serve-stale-data", "yes")


def url_of(client: Redis) -> str:
    return f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}/0"


async def becomes(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIVENESS_SECONDS):
        while not condition():  # noqa: ASYNC110  it has no event
            await asyncio.sleep(0.01)


async def open_connections(client: Redis, server: LocalRedis, count: int) -> None:
    """Leave so many idle connections in the client's pool: nothing is answered before all calls are sent."""
    server.pause()
    calls = [asyncio.ensure_future(client.exists("nothing")) for _ in range(count)]
    await asyncio.sleep(0.1)
    server.resume()
    await asyncio.gather(*calls)


class TestReplica:
    async def test_the_old_master_of_a_name_costs_no_call(
        self, proxy: RedisProxy, redis_server: LocalRedis, new_master: Redis, demote: Callable[[], Awaitable[None]]
    ) -> None:
        """It keeps its connections and answers on them; the events go to the new master, each once."""
        async with connect(proxy.url, timeout_seconds=10) as client:
            histories = HistoryStore(client, 100, timeout_seconds=10)
            await append(histories, "u", ["before"])
            await open_connections(client, redis_server, 20)
            await demote()
            proxy.leads_to(url_of(new_master))
            await asyncio.gather(*(append(histories, "u", [f"item-{number}"]) for number in range(40)))
            stored = await HistoryStore(new_master, 100).get("u") or []
            assert sorted(stored) == sorted(f"item-{number}" for number in range(40))
            assert await histories.forget("u") is True
            assert await new_master.exists("history::u") == 0

    async def test_reads_alone_leave_it_too(
        self, proxy: RedisProxy, new_master: Redis, demote: Callable[[], Awaitable[None]]
    ) -> None:
        """The old master serves every read, so a read must not be what tells."""
        async with connect(proxy.url, timeout_seconds=10) as client:
            histories = HistoryStore(client, 100, timeout_seconds=10)
            await append(histories, "u", ["before"])
            await demote()
            proxy.leads_to(url_of(new_master))
            await new_master.rpush("history::u", "after")
            await asyncio.sleep(0.2)
            assert await histories.get("u") == ["after"]

    async def test_reads_without_a_pause_leave_it_too(
        self, proxy: RedisProxy, new_master: Redis, demote: Callable[[], Awaitable[None]]
    ) -> None:
        async with connect(proxy.url, timeout_seconds=10) as client, asyncio.timeout(LIVENESS_SECONDS):
            histories = HistoryStore(client, 100, timeout_seconds=10)
            await append(histories, "u", ["before"])
            await demote()
            proxy.leads_to(url_of(new_master))
            await new_master.rpush("history::u", "after")
            while await histories.get("u") != ["after"]:
                pass

    async def test_a_name_that_leads_to_a_replica_is_told_from_one_that_takes_writes(
        self, proxy: RedisProxy, new_master: Redis, demote: Callable[[], Awaitable[None]]
    ) -> None:
        async with connect(proxy.url, timeout_seconds=10) as client:
            histories = HistoryStore(client, 100, timeout_seconds=10)
            await append(histories, "u", ["a"])
            await demote()
            assert not await histories.reachable()
            with pytest.raises(HistoryUnavailable, match="ReadOnlyError"):
                await append(histories, "u", ["b"])
            assert await histories.get("u") == ["a"]
            proxy.leads_to(url_of(new_master))
            assert await append(histories, "u", ["b"]) == 1
            assert await histories.reachable()

    async def test_the_kv_store_finds_the_new_master(
        self, proxy: RedisProxy, new_master: Redis, demote: Callable[[], Awaitable[None]]
    ) -> None:
        async with connect(proxy.url, timeout_seconds=10) as client:
            store = store_of(client, timeout=10)
            await store.put(content(chain(3, seed=1)))
            await demote()
            proxy.leads_to(url_of(new_master))
            await asyncio.sleep(0.2)
            await store.put(content(chain(3, seed=2)))
            assert store.statistics.failures == 0
            assert len(await new_master.keys("kv:*")) == 3
            assert_run(await store.get_chain(chain(3, seed=2)), chain(3, seed=2))

    async def test_subscriber_of_a_cut_off_replica_lags_until_it_reaches_a_master(
        self, proxy: RedisProxy, new_master: Redis, demote: Callable[[], Awaitable[None]]
    ) -> None:
        """The replica answers reads of the stream for ever, and shows no erasure that is published elsewhere."""
        async with connect(proxy.url, timeout_seconds=10) as client:
            cache = PrefixCache(LAYOUT, MemoryKvCache(2**20))
            subscriber = ErasureSubscriber(client, cache, max_lag_seconds=0.5, poll_seconds=0.02)
            await subscriber.start()
            assert cache.accepts_user_blocks
            await demote()
            await becomes(lambda: not cache.accepts_user_blocks)
            await publish_erasure(new_master, user_cache_key("", "leaver"))
            proxy.leads_to(url_of(new_master))
            await becomes(lambda: cache.accepts_user_blocks)
            assert user_cache_key("", "leaver") in cache._held_until
            await subscriber.close()

    async def test_a_replica_without_its_master_is_left(
        self, proxy: RedisProxy, redis_client: Redis, new_master: Redis, demote: Callable[[], Awaitable[None]]
    ) -> None:
        """MASTERDOWN, from a real one."""
        async with connect(proxy.url, timeout_seconds=10) as client:
            histories = HistoryStore(client, 100, timeout_seconds=10)
            await append(histories, "u", ["a"])
            await demote()
            await redis_client.config_set("replica-serve-stale-data", "no")
            with pytest.raises(HistoryUnavailable, match="MasterDownError"):
                await histories.get("u")
            await new_master.rpush("history::u", "b")
            proxy.leads_to(url_of(new_master))
            assert await histories.get("u") == ["b"]


class TestRefusals:
    @pytest.mark.parametrize("text", REFUSALS)
    async def test_a_refused_event_is_stored_once_over_a_new_connection(
        self, proxy: RedisProxy, redis_server: LocalRedis, text: str
    ) -> None:
        async with connect(proxy.url, timeout_seconds=10) as client:
            histories = HistoryStore(client, 100, timeout_seconds=10)
            await open_connections(client, redis_server, 10)
            proxy.answer(b"-" + text.encode() + b"\r\n")
            await asyncio.gather(*(append(histories, "u", [f"item-{number}"]) for number in range(20)))
            assert sorted(await histories.get("u") or []) == sorted(f"item-{number}" for number in range(20))

    @pytest.mark.parametrize("text", REFUSALS)
    async def test_refusal_on_every_connection_is_raised(self, text: str) -> None:
        """Each connection with such a reply is closed."""
        asked = 0

        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            while data := await reader.read(65_536):
                asked += b"UNLINK" in data
                writer.write(b"".join(_reply(command, text) for command in data.split(b"*")[1:]))
            writer.close()

        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}?protocol=2"
            async with connect(url, timeout_seconds=10) as client:
                with pytest.raises(REFUSALS[text]):
                    await client.unlink("a")
                assert asked == 2
                assert not any(connection.is_connected for connection in client.connection_pool._available_connections)

    async def test_other_errors_are_no_reason_to_ask_again(self, proxy: RedisProxy) -> None:
        async with connect(proxy.url, timeout_seconds=10) as client:
            await client.set("text", "a")
            opened = proxy.open
            for _ in range(3):
                with pytest.raises(RedisError, match="WRONGTYPE"):
                    await client.rpush("text", "b")
            assert proxy.open == opened


def _reply(command: bytes, text: str) -> bytes:
    return b"-" + text.encode() + b"\r\n" if b"UNLINK" in command else b"+OK\r\n"


def test_a_transport_that_closed_underneath_is_a_lost_connection(redis_url: str) -> None:
    """uvloop, the services' event loop, raises RuntimeError for a write on it, which is no error of a connection."""

    async def use_it() -> None:
        async with connect(redis_url, timeout_seconds=LIVENESS_SECONDS) as client:
            await client.set("a", "b")
            pooled: list[Any] = client.connection_pool._available_connections
            pooled[0]._writer.transport.abort()
            await asyncio.sleep(0.05)
            assert await client.get("a") == b"b"
            connection = pooled[0]
            connection._writer.transport.abort()
            with pytest.raises(RedisConnectionError, match="the connection was lost"):
                await connection.send_command("PING", check_health=False)

    uvloop.run(use_it())


class TestSilence:
    async def test_idle_connections_that_were_dropped_cost_no_event(
        self, proxy: RedisProxy, redis_server: LocalRedis
    ) -> None:
        """Sixty at once, each stored once: a connection is asked before an event is sent on it."""
        async with connect(proxy.url, timeout_seconds=4) as client:
            histories = HistoryStore(client, 100, timeout_seconds=4)
            await open_connections(client, redis_server, 60)
            assert proxy.open == 60
            await asyncio.sleep(0.2)
            proxy.swallow()
            await asyncio.gather(*(append(histories, "u", [f"item-{number}"]) for number in range(60)))
            assert sorted(await histories.get("u") or []) == sorted(f"item-{number}" for number in range(60))

    async def test_they_are_found_without_any_call(self, proxy: RedisProxy, redis_server: LocalRedis) -> None:
        async with connect(proxy.url, timeout_seconds=0.5) as client:
            await open_connections(client, redis_server, 10)
            proxy.swallow()
            await becomes(lambda: proxy.open == 0)

    async def test_idle_connections_that_answer_are_kept(self, proxy: RedisProxy, redis_server: LocalRedis) -> None:
        async with connect(proxy.url, timeout_seconds=5) as client:
            await open_connections(client, redis_server, 10)
            opened = {id(connection._writer) for connection in client.connection_pool._available_connections}
            await asyncio.sleep(0.2)
            await asyncio.gather(*(client.exists("nothing") for _ in range(10)))
            assert {id(connection._writer) for connection in client.connection_pool._available_connections} == opened
            assert proxy.open == 10

    async def test_the_kv_store_misses_nothing_by_it(self, proxy: RedisProxy, redis_server: LocalRedis) -> None:
        async with connect(proxy.url, timeout_seconds=4) as client:
            store, keys = store_of(client, timeout=4), chain(3)
            await store.put(content(keys))
            await open_connections(client, redis_server, 10)
            await asyncio.sleep(0.2)
            proxy.swallow()
            assert_run(await store.get_chain(keys), keys)
            assert store.statistics.failures == 0

    async def test_an_event_whose_answer_was_lost_is_not_sent_again(self, proxy: RedisProxy) -> None:
        """The call fails, as its outcome is unknown. Then the event is there, once."""
        async with connect(proxy.url, timeout_seconds=0.5) as client:
            histories = HistoryStore(client, 100, timeout_seconds=0.5)
            await append(histories, "u", ["a"])
            proxy.mute()
            with pytest.raises(HistoryUnavailable):
                await append(histories, "u", ["b"])
            assert await histories.get("u") == ["a", "b"]


class TestCrowd:
    async def test_more_calls_than_connections_wait_for_one(self, proxy: RedisProxy, redis_server: LocalRedis) -> None:
        async with connect(proxy.url, timeout_seconds=LIVENESS_SECONDS) as client:
            histories = HistoryStore(client, 1000, timeout_seconds=LIVENESS_SECONDS)
            redis_server.pause()
            calls = [asyncio.create_task(append(histories, "u", [f"item-{number}"])) for number in range(600)]
            await asyncio.sleep(0.5)
            assert 0 < proxy.open < 600
            redis_server.resume()
            assert sorted(await asyncio.gather(*calls)) == list(range(1, 601))

    async def test_a_call_that_finds_no_connection_in_time_fails_and_stores_nothing(
        self, redis_url: str, redis_server: LocalRedis
    ) -> None:
        async with connect(redis_url, timeout_seconds=0.3) as client:
            histories = HistoryStore(client, 1000, timeout_seconds=0.3)
            redis_server.pause()
            outcomes = await asyncio.gather(*(histories.get("u") for _ in range(200)), return_exceptions=True)
            assert all(isinstance(outcome, HistoryUnavailable) for outcome in outcomes)
            redis_server.resume()
            assert await append(histories, "u", ["a"]) == 1

    async def test_calls_that_are_given_up_leave_every_connection_to_others(
        self, redis_url: str, redis_server: LocalRedis
    ) -> None:
        async with connect(redis_url, timeout_seconds=LIVENESS_SECONDS) as client:
            histories = HistoryStore(client, 1000, timeout_seconds=LIVENESS_SECONDS)
            for _ in range(3):
                redis_server.pause()
                calls = [asyncio.create_task(histories.get("u")) for _ in range(200)]
                await asyncio.sleep(0.05)
                for call in calls[::2]:
                    call.cancel()
                redis_server.resume()
                await asyncio.gather(*calls, return_exceptions=True)
            assert not client.connection_pool._in_use_connections
            assert len(await asyncio.gather(*(append(histories, "u", ["a"]) for _ in range(200)))) == 200
