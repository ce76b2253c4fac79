"""A service that echoes, and does whatever its requests' texts ask for; calls of it, and what a test waits for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2
from pydantic_settings import SettingsConfigDict

from atspeed.configuration.settings import ServiceSettings
from atspeed.engine.errors import BundleError, CapacityError, PromptError
from atspeed.errors import InvalidArgumentError, NotFoundError
from atspeed.observability.logs import REQUEST_ID_HEADER, request_metadata
from atspeed.rpc.server import Registration, RunningServer

SERVICE = "test.Echo"
SECRET = "/srv/secret.onnx"


class EchoSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="TEST_ECHO_")
    service: ClassVar[str] = "echo"


class Echo:
    """All four kinds of method. A request's text names what to do with it."""

    def __init__(self) -> None:
        self.calls = 0
        self.closed = 0
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

    async def act(self, request: StringValue) -> StringValue:
        self.calls += 1
        errors: dict[str, Callable[[], Exception]] = {
            "invalid": lambda: InvalidArgumentError("k", "must be at least 1"),
            "missing": lambda: NotFoundError("user_id", "no history"),
            "prompt": lambda: PromptError("history is empty"),
            "capacity": lambda: CapacityError("too long"),
            "bug": lambda: ValueError(f"cannot open {SECRET}"),
            "bundle": lambda: BundleError(f"no manifest in {SECRET}"),
        }
        if request.value in errors:
            raise errors[request.value]()
        if request.value == "wait":
            self.entered.set()
            await self.release.wait()
        if request.value == "request id":
            await asyncio.sleep(0.01)
            return StringValue(value=dict(request_metadata())[REQUEST_ID_HEADER])
        return request

    async def unary_unary(self, request: StringValue, context: object) -> StringValue:
        return await self.act(request)

    async def unary_stream(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        try:
            yield await self.act(request)
        finally:
            self.closed += 1

    async def stream_unary(self, requests: AsyncIterator[StringValue], context: object) -> StringValue:
        answers = [await self.act(request) async for request in requests]
        return answers[-1]

    async def stream_stream(self, requests: AsyncIterator[StringValue], context: object) -> AsyncIterator[StringValue]:
        try:
            async for request in requests:
                yield await self.act(request)
        finally:
            self.closed += 1

    def registration(self, name: str = SERVICE) -> Registration:
        coding: Any = {
            "request_deserializer": StringValue.FromString,
            "response_serializer": StringValue.SerializeToString,
        }
        methods: dict[str, Any] = {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(self.unary_unary, **coding),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(self.unary_stream, **coding),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(self.stream_unary, **coding),
            "StreamStream": grpc.stream_stream_rpc_method_handler(self.stream_stream, **coding),
        }
        handler = grpc.method_handlers_generic_handler(name, methods)
        return Registration(name, lambda server: server.add_generic_rpc_handlers((handler,)))


def settings(bundle: Path, **changes: Any) -> EchoSettings:
    return EchoSettings(**{"bundle": bundle, **changes})


async def call(channel: grpc.aio.Channel, kind: str, message: bytes | str, **options: Any) -> str:
    """One message to a method of any kind; its first answer."""
    data = message if isinstance(message, bytes) else StringValue(value=message).SerializeToString()
    path = f"/{SERVICE}/{kind}"
    methods: dict[str, Any] = {
        "UnaryUnary": channel.unary_unary,
        "UnaryStream": channel.unary_stream,
        "StreamUnary": channel.stream_unary,
        "StreamStream": channel.stream_stream,
    }
    method = methods[kind](path, response_deserializer=StringValue.FromString)
    answers = method(iter([data]) if kind.startswith("Stream") else data, **options)
    first = [answer async for answer in answers][0] if kind.endswith("Stream") else await answers  # noqa: RUF015
    assert isinstance(first, StringValue)
    return first.value


async def until(condition: Callable[[], object]) -> None:
    """Wait for it, while the event loop runs."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def failure(channel: grpc.aio.Channel, kind: str, message: bytes | str) -> grpc.aio.AioRpcError:
    """Return the status with which the call ends."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, kind, message)
    return caught.value


def leave(up: AbstractAsyncContextManager[RunningServer]) -> asyncio.Task[bool | None]:
    """Let a server drain, in the background."""
    return asyncio.create_task(up.__aexit__(None, None, None))


async def watch(channel: grpc.aio.Channel, states: list[int]) -> grpc.StatusCode:
    """Note each state of the service until the stream ends; how it ended."""
    method = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    watching = method(health_pb2.HealthCheckRequest(service=SERVICE))
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for answer in watching:
            states.append(answer.status)  # noqa: PERF401 - what came before the end counts
    return await watching.code()
