"""Channels to real servers: which replicas get the calls, what is renewed and what is tried again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from atspeed.errors import ResourceExhaustedError, UnavailableError
from atspeed.rpc import healthcheck
from atspeed.rpc.addresses import target_uri
from atspeed.rpc.channels import open_channel
from atspeed.rpc.server import RunningServer, running
from tests.echo import SERVICE, Echo, call, failure, leave, settings


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RunningServer]:
    async with running(settings(tmp_path), [Echo().registration()]) as up:
        yield up


@asynccontextmanager
async def replicas(bundle: Path, count: int) -> AsyncIterator[list[tuple[Echo, RunningServer]]]:
    async with AsyncExitStack() as stack:
        echoes = [Echo() for _ in range(count)]
        servers = [running(settings(bundle), [echo.registration()]) for echo in echoes]
        yield [(echo, await stack.enter_async_context(server)) for echo, server in zip(echoes, servers, strict=True)]


async def test_calls_go_round_all_replicas_that_serve(tmp_path: Path) -> None:
    async with replicas(tmp_path, 2) as pair:
        target = target_uri(",".join(up.address for _, up in pair))
        async with open_channel(target, SERVICE) as channel:
            await balanced(channel, pair)


async def balanced(channel: grpc.aio.Channel, pair: list[tuple[Echo, RunningServer]]) -> None:
    async with asyncio.timeout(10):
        while not all(echo.calls for echo, _ in pair):
            await call(channel, "UnaryUnary", "hello")
    before = [echo.calls for echo, _ in pair]
    for _ in range(20):
        await call(channel, "UnaryUnary", "hello")
    assert [echo.calls - old for (echo, _), old in zip(pair, before, strict=True)] == [10, 10]


async def test_connections_are_renewed_and_no_call_notices(tmp_path: Path) -> None:
    """At a second's age, here: calls go on over a new connection, which gRPC opens after resolving the name again."""
    peers: set[str] = set()

    class Seeing(Echo):
        async def unary_unary(self, request: StringValue, context: Any) -> StringValue:
            peers.add(context.peer())
            return request

    long = Echo()
    registrations = [Seeing().registration(), long.registration("test.Long")]
    async with (
        running(settings(tmp_path, max_connection_seconds=1), registrations) as up,
        open_channel(target_uri(up.address), SERVICE) as channel,
        asyncio.timeout(60),
    ):
        stream: Any = channel.unary_stream("/test.Long/UnaryStream", response_deserializer=StringValue.FromString)
        waiting = stream(StringValue(value="wait").SerializeToString())
        while len(peers) < 3:
            await call(channel, "UnaryUnary", "hello", timeout=5)
        long.release.set()
        assert [answer.value async for answer in waiting] == ["wait"]


async def test_a_replica_that_drains_costs_no_call(tmp_path: Path) -> None:
    first, second = Echo(), Echo()
    manager = running(settings(tmp_path), [first.registration()])
    async with running(settings(tmp_path), [second.registration()]) as stays:
        goes = await manager.__aenter__()
        async with open_channel(target_uri(f"{goes.address},{stays.address}"), SERVICE) as channel:
            await balanced(channel, [(first, goes), (second, stays)])
            leaving = leave(manager)
            while not leaving.done():
                await call(channel, "UnaryUnary", "hello", timeout=5)
            calls = first.calls
            for _ in range(10):
                await call(channel, "UnaryUnary", "hello", timeout=5)
            assert first.calls == calls


async def test_a_replica_that_does_not_serve_the_service_gets_no_calls(server: RunningServer) -> None:
    async with open_channel(target_uri(server.address), "test.Other") as channel:
        assert (await failure(channel, "UnaryUnary", "hello")).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_proxy_in_the_environment_is_not_asked(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert await asyncio.to_thread(healthcheck.state, server.address) == "SERVING"
    async with open_channel(f"dns:///localhost:{server.port}", SERVICE) as channel:
        assert await call(channel, "UnaryUnary", "hello", timeout=5) == "hello"


class Flaky(Echo):
    """Fails each first of two calls."""

    async def act(self, request: StringValue) -> StringValue:
        self.calls += 1
        if self.calls % 2:
            raise UnavailableError("busy")
        return request


async def test_only_the_named_methods_are_retried(tmp_path: Path) -> None:
    flaky = Flaky()
    async with (
        running(settings(tmp_path), [flaky.registration()]) as up,
        open_channel(target_uri(up.address), SERVICE, retried=["UnaryUnary"]) as channel,
    ):
        assert await call(channel, "UnaryUnary", "hello") == "hello"
        assert flaky.calls == 2
        assert (await failure(channel, "UnaryStream", "hello")).code() is grpc.StatusCode.UNAVAILABLE
        assert flaky.calls == 3


class Busy(Echo):
    """Refuses each first of two calls, with a hint."""

    async def act(self, request: StringValue) -> StringValue:
        self.calls += 1
        if self.calls % 2:
            raise ResourceExhaustedError("busy", retry_after_seconds=0.02)
        return request


async def test_grpcs_own_retries_obey_the_hint(tmp_path: Path) -> None:
    """The policy's own backoff is an hour: without the hint the call would not come back."""
    policy = {"maxAttempts": 2, "initialBackoff": "3600s", "maxBackoff": "3600s", "backoffMultiplier": 1}
    method = {"name": [{}], "retryPolicy": {**policy, "retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}
    options = [("grpc.service_config", json.dumps({"methodConfig": [method]}))]
    busy = Busy()
    async with (
        running(settings(tmp_path), [busy.registration()]) as up,
        grpc.aio.insecure_channel(up.address, options=options) as channel,
    ):
        assert await call(channel, "UnaryUnary", "hello", timeout=60) == "hello"
    assert busy.calls == 2
