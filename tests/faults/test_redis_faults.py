"""A Redis that ends, hangs, fills up or holds damaged entries: calls with a history are served, others are refused."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import redis

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import random_history
from tests.faults.conftest import Case, asking, assert_all_right
from tests.serving import LEVELS, WINDOW, Client, assert_same_list, refused, request_of, storm, until

Entries = dict[bytes, bytes]


@pytest.fixture
def store(redis_url: str, stack: LocalStack) -> Iterator[redis.Redis]:
    """The tests' own connection."""
    with redis.Redis.from_url(redis_url) as store:
        yield store


@pytest.fixture
def long(cases: list[Case]) -> Case:
    """A case whose prompt has whole blocks to cache."""
    return next(case for case in cases if len(case.history) >= WINDOW)


class TestStopped:
    def runs_without(
        self,
        client: Client,
        cases: list[Case],
        breaks: Callable[[], object],
        mends: Callable[[], object],
    ) -> None:
        """Inline histories are all answered, stored ones refused with the field's name, and both served afterwards."""
        client.record("user", cases[0].history)
        replies = storm(asking(client, cases * 2), {8: breaks, 24: mends})
        assert_all_right(replies, cases * 2)
        assert [list(reply.degraded_descriptions) for reply in replies if reply.degraded] == []

        breaks()
        with refused(grpc.StatusCode.UNAVAILABLE, "user_id"):
            client.recommend(user_id="user")
        for call in (lambda: client.record("user", ["item-1"]), lambda: client.history("user")):
            with pytest.raises(grpc.RpcError) as refusal:
                call()
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        assert {backend.name: backend.available for backend in client.info().backends}["redis"] is False
        assert_same_list(client.recommend(cases[1].history, k=20), cases[1].expected)

        mends()
        if not client.history("user"):
            client.record("user", cases[0].history)
        assert_same_list(client.recommend(user_id="user", k=20), cases[0].expected)

    def test_killed(self, redis_server: LocalRedis, client: Client, cases: list[Case]) -> None:
        self.runs_without(client, cases, redis_server.kill, redis_server.start)

    def test_hanging(self, redis_server: LocalRedis, client: Client, cases: list[Case]) -> None:
        self.runs_without(client, cases, redis_server.pause, redis_server.resume)
        assert client.history("user")[: len(cases[0].history)] == list(cases[0].history)

    def test_slow(self, store: redis.Redis, client: Client, cases: list[Case]) -> None:
        """It answers, a fifth of a second late, again and again: slower lists, and the same."""
        client.record("user", cases[0].history)
        slow = {answered: lambda: store.client_pause(200) for answered in range(0, 40, 4)}
        replies = storm(asking(client, cases * 2), slow)
        assert_all_right(replies, cases * 2)
        assert_same_list(client.recommend(user_id="user", k=20), cases[0].expected)

    def test_stopped(self, redis_server: LocalRedis, client: Client, cases: list[Case]) -> None:
        self.runs_without(client, cases, redis_server.stop, redis_server.start)

    def test_a_batch_with_stored_and_inline_histories(
        self, redis_server: LocalRedis, client: Client, cases: list[Case]
    ) -> None:
        """Only the requests that need the store fail."""
        client.record("user", cases[0].history)
        redis_server.kill()
        inline = [request_of(case.history, k=20) for case in cases[1:3]]
        results = client.batch([inline[0], request_of(user_id="user"), inline[1]])
        assert_same_list(results[0].response, cases[1].expected)
        assert results[1].error.code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert results[1].error.message.startswith("user_id: ")
        assert_same_list(results[2].response, cases[2].expected)


def damaged(entries: Entries) -> dict[str, Entries]:
    """The same keys with contents that are not theirs."""
    names, values = list(entries), list(entries.values())
    return {
        "empty": dict.fromkeys(names, b""),
        "truncated": {name: value[: len(value) // 2] for name, value in entries.items()},
        "header only": {name: value[:96] for name, value in entries.items()},
        "one byte short": {name: value[:-1] for name, value in entries.items()},
        "one byte long": {name: value + b"\0" for name, value in entries.items()},
        "bit flipped": {name: flipped(value, len(value) // 2) for name, value in entries.items()},
        "header flipped": {name: flipped(value, 9) for name, value in entries.items()},
        "swapped": dict(zip(names, values[1:] + values[:1], strict=True)),
        "zeros": {name: bytes(len(value)) for name, value in entries.items()},
        "text": dict.fromkeys(names, b"not a block"),
    }


def flipped(value: bytes, position: int) -> bytes:
    return value[:position] + bytes([value[position] ^ 1]) + value[position + 1 :]


class TestDamagedEntries:
    def stored(self, client: Client, store: redis.Redis, case: Case) -> Entries:
        """The entries of a case's prompt, once they are written and of use."""
        until(lambda: client.recommend(case.history).statistics.cached_tokens["redis"] > 0)
        names = [name for name in store.keys("kv:*") if isinstance(name, bytes)]
        values = [value for value in store.mget(names) if isinstance(value, bytes)]
        return dict(zip(names, values, strict=True))

    @pytest.mark.parametrize("damage", sorted(damaged({b"a": bytes(200), b"b": bytes(200)})))
    def test_are_misses(self, client: Client, store: redis.Redis, long: Case, damage: str) -> None:
        """A prompt whose entries are damaged is computed again: the right list, nothing degraded, and good entries after it."""
        entries = self.stored(client, store, long)
        store.mset(damaged(entries)[damage])
        reply = client.recommend(long.history, k=20)
        assert (reply.statistics.cached_tokens["redis"], reply.degraded) == (0, False)
        assert_same_list(reply, long.expected)
        until(lambda: client.recommend(long.history).statistics.cached_tokens["redis"] > 0)
        again = client.recommend(long.history, k=20)
        assert_same_list(again, long.expected)

    def test_of_another_type(self, client: Client, store: redis.Redis, long: Case) -> None:
        """A list where a string should be, as another program may leave it behind."""
        for name in self.stored(client, store, long):
            store.delete(name)
            store.rpush(name, b"something")
        reply = client.recommend(long.history, k=20)
        assert reply.statistics.cached_tokens["redis"] == 0
        assert_same_list(reply, long.expected)

    def test_half_of_a_prompt(self, client: Client, store: redis.Redis, long: Case) -> None:
        """Whichever block is gone, what is left is used up to the gap."""
        whole = client.recommend(long.history).statistics
        entries = self.stored(client, store, long)
        seen = set()
        for name in entries:
            store.mset(entries)
            store.delete(name)
            reply = client.recommend(long.history, k=20)
            seen.add(reply.statistics.cached_tokens["redis"])
            assert_same_list(reply, long.expected)
            until(lambda name=name: store.exists(name) == 1)  # type: ignore[misc]
        assert seen >= {0, LEVELS}
        assert whole.prompt_tokens == 2 + 4 * WINDOW


class TestFull:
    def test_histories_survive_the_pressure_of_cached_prompts(
        self, client: Client, store: redis.Redis, catalogue: Catalogue, cases: list[Case]
    ) -> None:
        """With hardly any memory left, entries of the cache give way and no history loses an item."""
        histories = {f"user-{n}": random_history(catalogue, WINDOW, seed=500 + n) for n in range(40)}
        for user, history in histories.items():
            client.record(user, history)
        used = int(store.info("memory")["used_memory"])
        store.config_set("maxmemory", used + 200_000)
        storm([*asking(client, [Case(history, cases[0].expected) for history in histories.values()])] * 2, {})
        until(lambda: int(store.info("stats")["evicted_keys"]) > 0)
        assert client.record("user-0", ["item-1"]).history_length == WINDOW + 1
        histories["user-0"].append("item-1")
        assert {user: client.history(user) for user in histories} == histories
        assert_all_right(storm(asking(client, cases), {}), cases)

    @pytest.mark.long
    def test_five_times_as_much_kv_as_there_is_room_for(
        self, client: Client, store: redis.Redis, catalogue: Catalogue, long: Case
    ) -> None:
        """Lists are the target's own throughout, and no history loses an item."""
        until(lambda: client.recommend(long.history).statistics.cached_tokens["redis"] > 0)
        prompt_bytes = sum(int(store.memory_usage(name) or 0) for name in store.keys("kv:*"))
        histories = {f"user-{n}": random_history(catalogue, WINDOW, seed=900 + n) for n in range(100)}
        for user, history in histories.items():
            client.record(user, history)
        room = 40 * prompt_bytes
        store.config_set("maxmemory", int(store.info("memory")["used_memory"]) + room)
        prompts = [Case(random_history(catalogue, WINDOW, seed=n), long.expected) for n in range(5 * 40)]
        lists = storm(asking(client, prompts), {})
        until(lambda: int(store.info("stats")["evicted_keys"]) > 0)
        alone = storm(asking(client, prompts, mode=pb.MODE_TARGET_ONLY), {})
        for got, expected in zip(lists, alone, strict=True):
            assert_same_list(got, expected)
        assert {user: client.history(user) for user in histories} == histories

    def test_without_any_room_left(self, client: Client, store: redis.Redis, cases: list[Case]) -> None:
        """Nothing can be stored: events are refused, what is stored is served, and prompts are computed."""
        client.record("user", cases[0].history)
        store.config_set("maxmemory", 1)
        with pytest.raises(grpc.RpcError) as refusal:
            client.record("user", ["item-1"])
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        assert client.history("user") == list(cases[0].history)
        assert_same_list(client.recommend(user_id="user", k=20), cases[0].expected)
        assert_all_right(storm(asking(client, cases), {}), cases)


class Babbler(socketserver.ThreadingTCPServer):
    """A server that is no Redis, on the port where one should be."""

    allow_reuse_address = daemon_threads = True

    class _Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while self.request.recv(4096):
                self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n$-5\r\n\xff\xfe")

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self._Answer)


@pytest.mark.long
def test_something_that_is_no_redis(bundle: Path, cases: list[Case], log_folder: Path) -> None:
    """Lists are the same, and stored histories are out of reach, named as such."""
    folder = log_folder / "babbling"
    folder.mkdir()
    with Babbler() as babbler:
        threading.Thread(target=babbler.serve_forever, daemon=True).start()
        url = f"redis://127.0.0.1:{babbler.server_address[1]}/0"
        with LocalStack(bundle, redis_url=url, log_folder=folder) as stack, Client(stack.address) as client:
            assert_all_right(storm(asking(client, cases), {}), cases)
            with refused(grpc.StatusCode.UNAVAILABLE, "user_id"):
                client.recommend(user_id="user")
        babbler.shutdown()


def test_a_history_that_is_none(client: Client, store: redis.Redis, cases: list[Case]) -> None:
    """A value of another program under a user's key makes that user's history unreadable, until ForgetUser removes it."""
    store.set("history::user", "not a list")
    client.record("other", cases[0].history)
    with refused(grpc.StatusCode.UNAVAILABLE, "user_id"):
        client.recommend(user_id="user")
    assert_same_list(client.recommend(user_id="other", k=20), cases[0].expected)
    store.delete("history::user")
    store.rpush("history::user", b"\xff\xfe", *(item.encode() for item in cases[0].history))
    reply = client.recommend(user_id="user", k=20)
    assert len(reply.unknown_history_item_ids) == 1
    assert_same_list(reply, cases[0].expected)
