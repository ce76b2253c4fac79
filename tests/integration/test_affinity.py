"""Calls by key through gRPC's own ring, against real servers that come, go and drain; and real replicas behind it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from pydantic_settings import SettingsConfigDict

from atspeed.configuration.settings import ServiceSettings
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.rpc.addresses import target_uri
from atspeed.rpc.affinity import Routes
from atspeed.rpc.channels import KEY_HEADER, open_channel
from atspeed.rpc.server import Registration, RunningServer, running
from tests.bundles import random_history
from tests.serving import LEVELS, Client, until

SERVICE = "test.Who"
KEYS = [f"key-{number}" for number in range(60)]


class WhoSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="TEST_WHO_")
    service: ClassVar[str] = "who"


def registration(name: str) -> Registration:
    """Service that replies with its name."""

    async def who(_request: StringValue, _context: object) -> StringValue:
        return StringValue(value=name)

    method: Any = grpc.unary_unary_rpc_method_handler(
        who, request_deserializer=StringValue.FromString, response_serializer=StringValue.SerializeToString
    )
    handler = grpc.method_handlers_generic_handler(SERVICE, {"Who": method})
    return Registration(SERVICE, lambda server: server.add_generic_rpc_handlers((handler,)))


class Replica:
    """One server, on a port that it keeps."""

    def __init__(self, name: str, bundle: Path) -> None:
        self.name, self._bundle, self._port = name, bundle, 0
        self._stack = AsyncExitStack()

    async def start(self) -> RunningServer:
        settings = WhoSettings(bundle=self._bundle, port=self._port, drain_seconds=5)
        server = await self._stack.enter_async_context(running(settings, [registration(self.name)]))
        self._port = server.port
        return server

    async def stop(self) -> None:
        await self._stack.aclose()


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[dict[str, Replica]]:
    named = {name: Replica(name, tmp_path) for name in ("a", "b", "c")}
    for replica in named.values():
        await replica.start()
    yield named
    for replica in named.values():
        await replica.stop()


@pytest.fixture
async def target(replicas: dict[str, Replica]) -> str:
    return target_uri(",".join(f"127.0.0.1:{replica._port}" for replica in replicas.values()))


async def served_by(channel: grpc.aio.Channel, key: str) -> str:
    """The name of the replica that a key's call went to."""
    method: Any = channel.unary_unary(f"/{SERVICE}/Who", response_deserializer=StringValue.FromString)
    answer = await method(b"", metadata=((KEY_HEADER, key),), timeout=20, wait_for_ready=True)
    return str(answer.value)


async def placement(channel: grpc.aio.Channel) -> dict[str, str]:
    return dict(zip(KEYS, await asyncio.gather(*(served_by(channel, key) for key in KEYS)), strict=True))


async def test_key_has_one_replica_for_all_clients(target: str) -> None:
    async with open_channel(target, SERVICE, by_key=True) as one, open_channel(target, SERVICE, by_key=True) as other:
        placed = await placement(one)
        assert await placement(one) == placed
        assert await placement(other) == placed
    assert min(Counter(placed.values())[name] for name in "abc") >= len(KEYS) // 10


async def test_removed_replica_moves_only_its_own_keys(target: str, replicas: dict[str, Replica]) -> None:
    """No call fails while it drains, the keys of the others stay where they are, and its own come back with it."""
    async with open_channel(target, SERVICE, by_key=True) as channel:
        before = await placement(channel)
        leaving = asyncio.create_task(replicas["a"].stop())
        during = [await placement(channel) for _ in range(5)]
        await leaving
        for placed in [*during, after := await placement(channel)]:
            assert {key: placed[key] for key in KEYS if before[key] != "a"} == {
                key: name for key, name in before.items() if name != "a"
            }
        assert set(after.values()) == {"b", "c"}
        await replicas["a"].start()
        async with asyncio.timeout(60):
            while await placement(channel) != before:  # noqa: ASYNC110  it has no event
                await asyncio.sleep(0.05)


class TestRoutes:
    """Return which of two stubs a call gets; here the stubs are words."""

    def test_a_key_counts_for_as_many_calls_at_once_as_may_be(self) -> None:
        routes = Routes("in turn", "by key", max_calls=2)
        with routes.route("u") as first, routes.route("u") as second, routes.route("u") as third:
            assert [first.stub, second.stub, third.stub] == ["by key", "by key", "in turn"]
            assert (first.metadata, third.metadata) == (((KEY_HEADER, "u"),), ())
            with routes.route("v") as other:
                assert other.stub == "by key"
        with pytest.raises(RuntimeError), routes.route("u"):
            raise RuntimeError
        with routes.route("u") as again, routes.route("u") as twice:
            assert (again.stub, twice.stub) == ("by key", "by key")

    @pytest.mark.parametrize("routes", [Routes("in turn"), Routes("in turn", "by key", max_calls=0)])
    def test_without_affinity_all_calls_go_in_turn(self, routes: Routes[str]) -> None:
        with routes.route("u") as route:
            assert (route.stub, route.metadata) == ("in turn", ())

    def test_no_key_no_affinity(self) -> None:
        with Routes("in turn", "by key", max_calls=2).route("") as route:
            assert (route.stub, route.metadata) == ("in turn", ())


@pytest.fixture(scope="module")
def several(bundle: Path, log_folder: Path) -> Iterator[LocalStack]:
    """Two drafts and two targets, two orchestrators, no Redis: what a replica does not know is computed."""
    # The adaptive planner would ask the draft only where that pays, which is not what is looked at here.
    flags: dict[str, dict[str, object]] = {
        "target": {"threads": 1},
        "draft": {"threads": 1},
        "orchestrator": {"draft-timeout-seconds": 30, "planner": "fixed"},
    }
    folder = log_folder / "affinity"
    folder.mkdir()
    with LocalStack(bundle, drafts=2, targets=2, orchestrators=2, log_folder=folder, flags=flags) as stack:
        yield stack


def calls(service: ServiceProcess) -> int:
    """Plans or streams that a replica has served, by its log."""
    log = service.log.read_text()
    return log.count('TargetService/Evaluate"') + log.count('DraftService/Plan"')


class TestReplicas:
    def test_a_returning_history_finds_its_keys_and_values(self, several: LocalStack, catalogue: Catalogue) -> None:
        """Through either orchestrator, target and draft alike, and a longer history of the same beginning too."""
        before = [calls(service) for service in (*several.drafts, *several.targets)]
        histories = [random_history(catalogue, 7, seed) for seed in range(3000, 3010)]
        clients = [Client(orchestrator.address) for orchestrator in several.orchestrators]
        for history in histories:
            first = clients[0].recommend(history[:6]).statistics
            for client in clients:
                again = client.recommend(history).statistics
                assert again.cached_tokens["memory"] >= first.prompt_tokens - LEVELS
        for client in clients:
            client.close()
        services = (*several.drafts, *several.targets)
        until(lambda: sum(map(calls, services)) >= sum(before) + 6 * len(histories))
        assert all(calls(service) > count for service, count in zip(services, before, strict=True)), "one got them all"
