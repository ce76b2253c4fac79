"""The Redis tier where Redis is dead, hanging, full, or something that is no Redis at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from atspeed.engine.kv.redis_client import connect
from atspeed.engine.kv.redis_store import RedisKvStore
from atspeed.local.redis_server import LocalRedis
from orchestrator.history import HistoryStore
from tests.kv_chains import LAYOUT, LIVENESS_SECONDS, Clock, assert_run, chain, content, store_of
from tests.stored_histories import append


async def grown(counter: Callable[[], int], *, by: int) -> None:
    """Return when a counter has grown so far."""
    goal = counter() + by
    while counter() < goal:  # noqa: ASYNC110  a statistic has no event
        await asyncio.sleep(0.001)


class Speaker(asyncio.Protocol):
    """A server that sends the same reply to every command and closes the connection soon after."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(self.text)
        asyncio.get_running_loop().call_later(0.02, self.transport.close)


@contextlib.asynccontextmanager
async def speaking(text: bytes) -> AsyncIterator[str]:
    """Return the URL of a port that answers with `text`."""
    speakers: list[Speaker] = []

    def answer() -> Speaker:
        speakers.append(Speaker(text))
        return speakers[-1]

    async with await asyncio.get_running_loop().create_server(answer, "127.0.0.1", 0) as server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    for speaker in speakers:
        speaker.transport.abort()
    await asyncio.sleep(0)


class TestDead:
    async def test_down_is_a_miss_then_silence_then_one_that_tries(
        self, redis_url: str, redis_server: LocalRedis, redis_client: Redis
    ) -> None:
        clock = Clock()
        store = store_of(redis_client, clock=clock)
        keys = chain(3)
        redis_server.kill()
        with capture_logs() as logged:
            assert await store.get_chain(keys) == []
            assert (store.statistics.failures, store.statistics.skipped) == (1, 0)
            assert await store.get_chain(keys) == []
            await store.put(content(keys))
            assert (store.statistics.failures, store.statistics.skipped) == (1, 2)

            clock.now += 1.5
            assert await asyncio.gather(*(store.get_chain(keys) for _ in range(5))) == [[]] * 5
            assert (store.statistics.failures, store.statistics.skipped) == (2, 6)
        assert [entry["event"] for entry in logged] == ["kv_redis_failed"], "one line a minute"

        redis_server.start()
        clock.now += 1.5
        await store.put(content(keys))
        assert_run(await store.get_chain(keys), keys)
        assert store.statistics.failures == 2

    async def test_killed_in_the_middle_of_traffic(
        self, redis_url: str, redis_server: LocalRedis, redis_client: Redis
    ) -> None:
        """Every look-up before, during and after gives right blocks or fewer, and nothing is raised."""
        store = RedisKvStore(redis_client, LAYOUT, 60, 1.0, open_seconds=0.01)
        chains = [chain(6, seed) for seed in range(8)]
        stopping = asyncio.Event()

        async def traffic(worker: int) -> int:
            rounds = 0
            while not stopping.is_set():
                keys = chains[(worker + rounds) % len(chains)]
                blocks = await store.get_chain(keys)
                assert_run(blocks, keys[: len(blocks)])
                await store.put(content(keys[len(blocks) :]))
                rounds += 1
                await asyncio.sleep(0)
            return rounds

        async with asyncio.timeout(LIVENESS_SECONDS), asyncio.TaskGroup() as group:
            workers = [group.create_task(traffic(worker)) for worker in range(4)]
            for _ in range(3):
                await grown(lambda: store.statistics.hits, by=50)
                await asyncio.to_thread(redis_server.kill)
                await grown(lambda: store.statistics.failures, by=3)
                await asyncio.to_thread(redis_server.start)
            stopping.set()
        assert all(worker.result() for worker in workers)

    async def test_a_hanging_redis_is_a_miss_in_time(
        self, redis_url: str, redis_server: LocalRedis, redis_client: Redis
    ) -> None:
        clock = Clock()
        store = store_of(redis_client, timeout=0.2, clock=clock)
        keys = chain(3)
        await store.put(content(keys))
        redis_server.pause()
        async with asyncio.timeout(LIVENESS_SECONDS):
            assert await store.get_chain(keys) == []
            assert store.statistics.failures == 1
            assert await store.get_chain(keys) == []
            assert (store.statistics.failures, store.statistics.skipped) == (1, 1)
            clock.now += 1.5
            await store.put(content(keys))
            assert store.statistics.failures == 2
        redis_server.resume()
        clock.now += 1.5
        patient = store_of(redis_client, timeout=LIVENESS_SECONDS)
        assert_run(await patient.get_chain(keys), keys)

    async def test_a_cancelled_read_leaves_no_late_answer_behind(
        self, redis_url: str, redis_server: LocalRedis
    ) -> None:
        """An answer that arrives after its reader has gone must not be taken for the next command's."""
        one, other = chain(2, seed=1), chain(2, seed=2)
        async with connect(redis_url, timeout_seconds=LIVENESS_SECONDS) as client:
            store = store_of(client, timeout=LIVENESS_SECONDS)
            await store.put(content(one) | content(other))
            redis_server.pause()
            readers = [asyncio.create_task(store.get_chain(one)) for _ in range(4)]
            await asyncio.sleep(0.05)
            for reader in readers:
                reader.cancel()
            answers = await asyncio.gather(*readers, return_exceptions=True)
            assert all(isinstance(answer, asyncio.CancelledError) for answer in answers)
            redis_server.resume()
            for blocks in await asyncio.gather(*(store.get_chain(other) for _ in range(4))):
                assert_run(blocks, other)
            assert store.statistics.failures == 0

    @pytest.mark.parametrize(
        "garbage",
        [
            b"",
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            b"\x00\xff\xfe" * 100,
            b"+OK\r\n" * 100,
            b":1\r\n" * 100,
            b"-ERR no\r\n" * 100,
            b"-\r\n" * 100,
            b"$-1\r\n" * 100,
            b"$5\r\nab",
            b"*2\r\n:1\r\n:2\r\n" * 100,
            b"*3\r\n*0\r\n$-1\r\n+x\r\n" * 100,
            b"%1\r\n+proto\r\n:3\r\n" * 100,
            b"*9999\r\n",
            b"$99999999999999\r\n",
        ],
    )
    @pytest.mark.parametrize("protocol", [2, 3])
    async def test_something_that_is_no_redis_is_a_miss(self, garbage: bytes, protocol: int) -> None:
        """With protocol 3 the garbage answers the handshake, with 2 the command itself."""
        keys, clock = chain(2), Clock()
        async with speaking(garbage) as url, connect(f"{url}?protocol={protocol}", timeout_seconds=0.3) as client:
            store = store_of(client, clock=clock)
            for _ in range(3):
                assert await store.get_chain(keys) == []
                clock.now += 2
                await store.put(content(keys))
                clock.now += 2
            assert store.statistics.hits == 0

    async def test_a_wrong_address_is_a_miss(self) -> None:
        async with connect("redis://name.invalid:6379/0", timeout_seconds=5.0) as client:
            store = store_of(client)
            assert await store.get_chain(chain(1)) == []
            assert store.statistics.failures == 1


class TestFull:
    async def _limit(self, client: Redis, extra: int) -> None:
        used = (await client.info("memory"))["used_memory"]
        await client.config_set("maxmemory", used + extra)

    async def test_kv_is_evicted_and_histories_are_not(self, redis_client: Redis) -> None:
        """The reason for `volatile-lru` and for histories without a time to live."""
        store, histories = store_of(redis_client), HistoryStore(redis_client, 50)
        for user in range(100):
            await append(histories, f"u{user}", [f"item-{user}-{index}" for index in range(20)])
        await self._limit(redis_client, 2_000_000)
        for seed in range(100):
            await store.put(content(chain(8, seed)))
        assert (await redis_client.info("stats"))["evicted_keys"] > 0
        assert store.statistics.failures == 0
        for user in range(100):
            assert await histories.get(f"u{user}") == [f"item-{user}-{index}" for index in range(20)]
        assert_run(await store.get_chain(chain(8, seed=99)), chain(8, seed=99))

    async def test_no_room_at_all_is_a_miss(self, redis_client: Redis) -> None:
        store, histories = store_of(redis_client), HistoryStore(redis_client, 50)
        await append(histories, "u", ["a", "b"])
        await redis_client.config_set("maxmemory", 1)
        keys = chain(2)
        await store.put(content(keys))
        assert store.statistics.failures == 1
        assert await histories.get("u") == ["a", "b"]
