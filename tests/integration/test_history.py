"""Histories against a real server."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from client.local_redis import LocalRedis
from engine.kv_store import connect
from orchestrator.history import HistoryStore, HistoryUnavailable


@pytest.fixture
async def histories(redis_client: Redis) -> HistoryStore:
    return HistoryStore(redis_client, max_items=5)


async def test_items_come_back_in_order(histories: HistoryStore) -> None:
    assert await histories.get("u") is None
    assert await histories.append("u", ["a", "b"]) == 2
    assert await histories.append("u", ["c"]) == 3
    assert await histories.get("u") == ["a", "b", "c"]
    assert await histories.get("v") is None


async def test_the_newest_are_kept(histories: HistoryStore, redis_client: Redis) -> None:
    assert await histories.append("u", [str(item) for item in range(12)]) == 5
    assert await histories.append("u", ["12", "13"]) == 5
    assert await histories.get("u") == ["9", "10", "11", "12", "13"]
    assert await redis_client.llen("history:u") == 5


async def test_appending_nothing_tells_the_length(histories: HistoryStore) -> None:
    assert await histories.append("u", []) == 0
    assert await histories.get("u") is None
    await histories.append("u", ["a"])
    assert await histories.append("u", []) == 1


async def test_concurrent_appends_lose_nothing_and_never_exceed_the_cap(redis_client: Redis) -> None:
    histories = HistoryStore(redis_client, max_items=30)
    lengths = await asyncio.gather(*(histories.append("u", [f"{n}a", f"{n}b"]) for n in range(20)))
    items = await histories.get("u")
    assert items is not None
    assert max(lengths) == len(items) == 30
    # Each append is one step: its two items stand next to each other.
    assert all(a[:-1] == b[:-1] and (a[-1], b[-1]) == ("a", "b") for a, b in zip(items[::2], items[1::2], strict=True))


async def test_forgetting_is_complete(histories: HistoryStore, redis_client: Redis) -> None:
    await histories.append("u", ["a"])
    assert await histories.forget("u") is True
    assert await histories.forget("u") is False
    assert await histories.get("u") is None
    assert await redis_client.keys() == []


async def test_never_expires(histories: HistoryStore, redis_client: Redis) -> None:
    await histories.append("u", ["a"])
    assert await redis_client.ttl("history:u") == -1


@pytest.mark.parametrize("item", ["", " ", "é漢", "a\nb", "a\x00b", '"', "\\x80\\x04K\\x01.", "x" * 10_000])
async def test_ids_are_kept_as_they_are(histories: HistoryStore, item: str) -> None:
    await histories.append(f"u:{item[:50]}", [item])
    assert await histories.get(f"u:{item[:50]}") == [item]


async def test_stored_garbage_is_text_not_an_error(histories: HistoryStore, redis_client: Redis) -> None:
    await redis_client.rpush("history:u", b"\xff\x80\x04K\x01.")
    (item,) = await histories.get("u") or []
    assert "�" in item


async def test_a_client_that_decodes_serves_too(redis_url: str) -> None:
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        histories = HistoryStore(client, max_items=5)
        await histories.append("u", ["a"])
        assert await histories.get("u") == ["a"]


class TestUnavailable:
    async def _all_fail(self, histories: HistoryStore) -> None:
        for call in (histories.append("secret-user", ["a"]), histories.append("secret-user", [])):
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
        assert await histories.append("u", ["a"]) == 1

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
        await patient.append("one", ["1"])
        await patient.append("other", ["2"])
        redis_server.pause()
        with pytest.raises(HistoryUnavailable):
            await hasty.get("one")
        redis_server.resume()
        assert await patient.get("other") == ["2"]

    async def test_holding_something_else(self, histories: HistoryStore, redis_client: Redis) -> None:
        await redis_client.set("history:secret-user", "not a list")
        with pytest.raises(HistoryUnavailable) as failure:
            await histories.append("secret-user", ["a"])
        assert "secret-user" not in str(failure.value)
        with pytest.raises(HistoryUnavailable):
            await histories.get("secret-user")

    async def test_full(self, histories: HistoryStore, redis_client: Redis) -> None:
        await histories.append("u", ["a"])
        await redis_client.config_set("maxmemory", 1)
        with pytest.raises(HistoryUnavailable):
            await histories.append("u", ["b"])
        assert await histories.get("u") == ["a"]

    async def test_a_broken_connection_never_appends_twice(self, redis_url: str) -> None:
        """A client that retries would run an RPUSH again of which only the reply was lost. And it is one transaction."""
        received: list[bytes] = []

        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                received.append(data)
                if b"RPUSH" in data:
                    break
                writer.write(b"+OK\r\n" * data.count(b"*"))
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, connect(f"redis://127.0.0.1:{port}/0?protocol=2", timeout_seconds=5.0) as client:
            with pytest.raises(HistoryUnavailable):
                await HistoryStore(client, max_items=5, timeout_seconds=30).append("u", ["a"])
        await asyncio.sleep(0.01)
        sent = b"".join(received)
        assert [sent.count(command) for command in (b"MULTI", b"RPUSH", b"LTRIM", b"EXEC")] == [1, 1, 1, 1]

    def test_refuses_an_empty_cap(self, redis_url: str) -> None:
        with pytest.raises(ValueError, match="max_items"):
            HistoryStore(connect(redis_url, timeout_seconds=1.0), max_items=0)
