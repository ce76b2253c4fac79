"""A Redis that moves, hangs or loses its connections, seen by who calls the orchestrator."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import redis

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.kv.redis_store import user_blocks_name
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.user_key import user_cache_key
from tests.bundles import random_history
from tests.conftest import mended
from tests.integration.conftest import LIMITS
from tests.redis_proxy import RedisProxy
from tests.serving import LIVENESS_SECONDS, WINDOW, Client, until

CAP = LIMITS["max-history-items"]


@pytest.fixture
def proxy(redis_url: str) -> Iterator[RedisProxy]:
    with RedisProxy(redis_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def other_server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.fixture
def new_master(other_server: LocalRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(mended(other_server)) as client:
        yield client


@pytest.fixture
def old_master(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client
        client.replicaof("NO", "ONE")


@contextmanager
def started(module: str, flags: dict[str, object], log: Path) -> Iterator[ServiceProcess]:
    service = ServiceProcess(module, flags, log)
    service.start()
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def through_proxy(proxy: RedisProxy, shared_stack: LocalStack, log_folder: Path) -> Iterator[Client]:
    """An orchestrator that reaches Redis by the proxy alone."""
    flags = shared_stack.orchestrators[0].flags | {"redis-url": proxy.url}
    with (
        started("orchestrator", flags, log_folder / "through-proxy.log") as service,
        Client(service.address) as client,
    ):
        yield client


def record_at_once(client: Client, server: LocalRedis | None, users: list[str]) -> list[pb.RecordEventsResponse]:
    """One event for each user, all under way together. server: what is stopped meanwhile."""
    if server:
        server.pause()
    requests = [pb.RecordEventsRequest(user_id=user, events=[pb.Event(item_id="item-1")]) for user in users]
    calls = [client.stub.RecordEvents.future(request, timeout=LIVENESS_SECONDS) for request in requests]
    if server:
        time.sleep(1.5)
        server.resume()
    return [call.result() for call in calls]


def redis_available(client: Client) -> bool:
    return {backend.name: backend.available for backend in client.info().backends}["redis"]


def test_a_failover_behind_one_address_costs_no_call(
    through_proxy: Client,
    proxy: RedisProxy,
    redis_server: LocalRedis,
    other_server: LocalRedis,
    old_master: redis.Redis,
    new_master: redis.Redis,
) -> None:
    """The old master keeps its connections and turns into a replica; the address leads to the new one."""
    record_at_once(through_proxy, redis_server, [f"user-{number}" for number in range(20)])
    assert proxy.open >= 20
    old_master.replicaof("127.0.0.1", 1)
    proxy.leads_to(other_server.url)
    users = [f"after-{number}" for number in range(40)]
    assert [reply.history_length for reply in record_at_once(through_proxy, None, users)] == [1] * 40
    assert len(new_master.keys("history:*")) == 40
    assert through_proxy.stub.ForgetUser(pb.ForgetUserRequest(user_id="after-0"), timeout=LIVENESS_SECONDS).existed
    assert redis_available(through_proxy)
    assert through_proxy.history("user-0") == []


def test_a_replica_is_not_available_to_an_orchestrator(
    through_proxy: Client,
    proxy: RedisProxy,
    other_server: LocalRedis,
    old_master: redis.Redis,
    new_master: redis.Redis,
) -> None:
    through_proxy.record("user", ["item-1"])
    assert redis_available(through_proxy)
    old_master.replicaof("127.0.0.1", 1)
    assert not redis_available(through_proxy)
    for call in (
        lambda: through_proxy.record("user", ["item-2"]),
        lambda: through_proxy.stub.ForgetUser(pb.ForgetUserRequest(user_id="user"), timeout=LIVENESS_SECONDS),
    ):
        with pytest.raises(grpc.RpcError) as refusal:
            call()
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    proxy.leads_to(other_server.url)
    assert through_proxy.record("user", ["item-2"]).history_length == 1
    assert redis_available(through_proxy)


def test_events_wait_while_redis_is_stopped_for_a_moment(stack: LocalStack, redis_server: LocalRedis) -> None:
    """Six hundred at once, more than there are connections: none is refused, each is stored once."""
    users = [f"user-{number}" for number in range(600)]
    with Client(stack.address) as client:
        replies = record_at_once(client, redis_server, users)
    assert [reply.history_length for reply in replies] == [1] * 600


def test_connections_that_a_balancer_dropped_cost_no_event(
    through_proxy: Client, proxy: RedisProxy, redis_server: LocalRedis
) -> None:
    record_at_once(through_proxy, redis_server, [f"user-{number}" for number in range(60)])
    assert proxy.open >= 60
    time.sleep(0.2)  # idle, as a balancer asks of what it drops
    proxy.swallow()
    users = [f"after-{number}" for number in range(60)]
    assert [reply.history_length for reply in record_at_once(through_proxy, None, users)] == [1] * 60


def test_a_models_prefixes_are_in_the_new_master_after_a_failover(
    proxy: RedisProxy,
    shared_stack: LocalStack,
    other_server: LocalRedis,
    old_master: redis.Redis,
    new_master: redis.Redis,
    catalogue: Catalogue,
    log_folder: Path,
) -> None:
    """A user's blocks are erased there too."""
    moved: dict[str, object] = {"redis-url": proxy.url}
    kept = user_blocks_name(user_cache_key("", "user"))
    ours = shared_stack.orchestrators[0].flags
    with (
        started("target_service", shared_stack.targets[0].flags | moved, log_folder / "moving-target.log") as target,
        started("orchestrator", ours | moved | {"target": target.address}, log_folder / "moving.log") as service,
        Client(service.address) as client,
    ):
        client.recommend(random_history(catalogue, WINDOW, seed=70))
        until(lambda: len(old_master.keys("kv:*")) > 0)
        old_master.replicaof("127.0.0.1", 1)
        proxy.leads_to(other_server.url)
        items = itertools.cycle(random_history(catalogue, 4 * WINDOW, seed=71))

        def is_kept() -> bool:
            """Ask once more with another prompt: a write that meets the old master is lost, as the cache may lose any."""
            client.record("user", [next(items)])
            client.recommend(user_id="user")
            return new_master.exists(kept) == 1

        until(is_kept, pause=0.2)
        client.stub.ForgetUser(pb.ForgetUserRequest(user_id="user"), timeout=LIVENESS_SECONDS)
        assert new_master.exists(kept) == 0


def test_deployments_with_two_limits_cut_nothing_of_each_other(
    client: Client, shared_stack: LocalStack, redis_url: str, log_folder: Path
) -> None:
    """The replica with the larger limit shows all items, the other one its own newest, and logs that the limits differ."""
    longer = shared_stack.orchestrators[0].flags | {"max-history-items": 3 * CAP}
    items = [f"item-{number}" for number in range(4 * CAP)]
    with started("orchestrator", longer, log_folder / "longer.log") as service, Client(service.address) as other:
        for start in range(0, 4 * CAP, 10):
            (client if start % 20 else other).record("user", items[start : start + 10])
            stored = items[: start + 10]
            assert other.history("user") == stored[-3 * CAP :]
            assert len(client.history("user")) <= CAP
            assert stored[-len(client.history("user")) :] == client.history("user")
    assert "history_limit_below_stored" in shared_stack.orchestrators[0].log.read_text()
    assert "history_limit_below_stored" not in service.log.read_text()
