"""Real servers and real channels: what a client meets, whatever a handler does."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
import structlog
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from pydantic_settings import SettingsConfigDict

from engine.errors import BundleError, CapacityError, PromptError
from service_kit import healthcheck
from service_kit.channels import open_channel, target_uri
from service_kit.errors import (
    PUSHBACK_HEADER,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from service_kit.logs import REQUEST_ID_HEADER, request_metadata
from service_kit.server import Registration, RunningServer, running
from service_kit.settings import ServiceSettings

SERVICE = "test.Echo"
KINDS = ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream"]
ROOT = Path(__file__).parents[2]
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
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def failure(channel: grpc.aio.Channel, kind: str, message: bytes | str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, kind, message)
    return caught.value


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def server(echo: Echo, tmp_path: Path) -> AsyncIterator[RunningServer]:
    async with running(
        settings(tmp_path, max_concurrent_calls=2, max_message_bytes=65_536), [echo.registration()]
    ) as up:
        yield up


@pytest.fixture
async def channel(server: RunningServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(server.address) as opened:
        yield opened


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_passes_through(channel: grpc.aio.Channel, kind: str) -> None:
    assert await call(channel, kind, "hello") == "hello"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("message", "code", "details"),
    [
        ("invalid", grpc.StatusCode.INVALID_ARGUMENT, "k: must be at least 1"),
        ("missing", grpc.StatusCode.NOT_FOUND, "user_id: no history"),
        ("prompt", grpc.StatusCode.INVALID_ARGUMENT, "history is empty"),
        ("capacity", grpc.StatusCode.INVALID_ARGUMENT, "too long"),
        (b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, "request: not a valid message of this method"),
    ],
)
async def test_the_clients_mistakes_name_the_field(
    channel: grpc.aio.Channel, kind: str, message: bytes | str, code: grpc.StatusCode, details: str
) -> None:
    error = await failure(channel, kind, message)
    assert (error.code(), error.details()) == (code, details)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("message", ["bug", "bundle"])
async def test_our_mistakes_stay_in_our_log(channel: grpc.aio.Channel, kind: str, message: str) -> None:
    with structlog.testing.capture_logs() as logs:
        error = await failure(channel, kind, message)
    (entry,) = [log for log in logs if log["event"] == "internal error"]
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == f"internal error {entry['error_id']}"
    assert SECRET in str(entry["exc_info"])
    assert entry["exc_info"].__traceback__ is not None
    seen_by_client = (
        f"{error.details()} {error.debug_error_string()} {error.trailing_metadata()} {error.initial_metadata()}"
    )
    assert SECRET not in seen_by_client
    assert "Error:" not in seen_by_client


async def test_an_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    nothing: Any = channel.unary_unary(f"/{SERVICE}/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await nothing(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_over_the_limit_is_refused(channel: grpc.aio.Channel) -> None:
    error = await failure(channel, "UnaryUnary", "x" * 70_000)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("kind", ["UnaryStream", "StreamStream"])
async def test_a_cancelled_stream_frees_its_state_at_once(channel: grpc.aio.Channel, echo: Echo, kind: str) -> None:
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(call(channel, kind, "wait"))
        await asyncio.wait_for(echo.entered.wait(), 5)
        task.cancel()
        await until(lambda: echo.closed and logs)
    assert [log["code"] for log in logs] == ["CANCELLED"]


async def test_a_deadline_cancels_the_handler(channel: grpc.aio.Channel, echo: Echo) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, "UnaryStream", "wait", timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: echo.closed)


async def test_calls_over_the_bound_of_a_method_are_refused_but_others_and_health_answer(
    channel: grpc.aio.Channel, server: RunningServer, echo: Echo
) -> None:
    waiting = [asyncio.create_task(call(channel, "UnaryUnary", "wait")) for _ in range(2)]
    await until(lambda: echo.calls == 2)
    error = await failure(channel, "UnaryUnary", "hello")
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(str(dict(error.trailing_metadata())[PUSHBACK_HEADER])) > 0
    assert await call(channel, "StreamStream", "hello") == "hello"
    assert await asyncio.to_thread(healthcheck.state, server.address, SERVICE) == "SERVING"
    echo.release.set()
    assert await asyncio.gather(*waiting) == ["wait", "wait"]
    assert await call(channel, "UnaryUnary", "hello") == "hello"


async def test_a_call_counts_before_its_message_is_there(channel: grpc.aio.Channel) -> None:
    """grpc.aio receives the message of a unary method before it calls the handler: what was never finished was never counted."""
    method: Any = channel.stream_unary(f"/{SERVICE}/UnaryUnary")
    unfinished = [method() for _ in range(2)]
    for one in unfinished:
        await one.wait_for_connection()
    async with asyncio.timeout(10):
        while (error := await refusal(channel)) is None:
            pass  # until both have arrived
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for one in unfinished:
        one.cancel()
    async with asyncio.timeout(10):
        while await refusal(channel) is not None:
            pass


async def refusal(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError | None:
    try:
        await call(channel, "UnaryUnary", "hello")
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def test_a_call_without_its_message_is_invalid(channel: grpc.aio.Channel) -> None:
    method: Any = channel.stream_unary(f"/{SERVICE}/UnaryUnary")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await method(iter([]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_each_call_has_its_own_request_id(channel: grpc.aio.Channel) -> None:
    first, second = await asyncio.gather(
        call(channel, "UnaryUnary", "request id", metadata=((REQUEST_ID_HEADER, "mine-1"),)),
        call(channel, "UnaryStream", "request id"),
    )
    assert first == "mine-1"
    assert len(second) == 16
    forged = await call(channel, "UnaryUnary", "request id", metadata=((REQUEST_ID_HEADER, "two words {}"),))
    assert len(forged) == 16


async def test_the_request_id_comes_back(channel: grpc.aio.Channel) -> None:
    method: Any = channel.unary_unary(f"/{SERVICE}/UnaryUnary")
    running_call = method(b"", metadata=((REQUEST_ID_HEADER, "mine-2"),))
    await running_call
    assert dict(await running_call.trailing_metadata())[REQUEST_ID_HEADER] == "mine-2"


@pytest.mark.parametrize(("service", "state"), [("", "SERVING"), (SERVICE, "SERVING"), ("other", "NOT_FOUND")])
async def test_health_by_service(server: RunningServer, service: str, state: str) -> None:
    assert await asyncio.to_thread(healthcheck.state, server.address, service) == state


def test_a_healthcheck_with_half_of_tls_does_not_ask_in_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        healthcheck.main(["127.0.0.1:1", "--certificate", "a.pem", "--key", "a.key"])
    assert ended.value.code == 2
    assert "need --ca" in capsys.readouterr().err


async def test_healthcheck_command(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(healthcheck.main, [server.address]) == 0
    assert await asyncio.to_thread(healthcheck.main, ["127.0.0.1:1"]) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.isupper()] == ["SERVING", "UNAVAILABLE"]


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    method = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    answers = [a async for a in method(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def leave(up: AbstractAsyncContextManager[RunningServer]) -> asyncio.Task[bool | None]:
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


async def test_draining_tells_watchers_and_lets_running_calls_end(echo: Echo, tmp_path: Path) -> None:
    """Watchers used to keep a draining server up for its whole grace period."""
    states: list[int] = []
    manager = running(settings(tmp_path, drain_seconds=60), [echo.registration()])
    up = await manager.__aenter__()
    async with grpc.aio.insecure_channel(up.address) as channel:
        watching = asyncio.create_task(watch(channel, states))
        waiting = asyncio.create_task(call(channel, "UnaryStream", "wait"))
        await asyncio.wait_for(echo.entered.wait(), 5)
        leaving = leave(manager)
        assert await asyncio.wait_for(watching, 5) is grpc.StatusCode.UNAVAILABLE
        assert states == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
        assert not waiting.done()
        assert not leaving.done()
        echo.release.set()
        assert await waiting == "wait"
        await asyncio.wait_for(leaving, 5)


async def test_a_call_that_outlasts_the_drain_is_cancelled(echo: Echo, tmp_path: Path) -> None:
    manager = running(settings(tmp_path, drain_seconds=0.2), [echo.registration()])
    up = await manager.__aenter__()
    async with grpc.aio.insecure_channel(up.address) as channel:
        waiting = asyncio.create_task(failure(channel, "UnaryStream", "wait"))
        await asyncio.wait_for(echo.entered.wait(), 5)
        await asyncio.wait_for(leave(manager), 5)
        assert (await waiting).code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert echo.closed == 1


# Tokens


async def test_whoever_called_before_says_nothing_of_who_may_call_now(echo: Echo, tmp_path: Path) -> None:
    """An interceptor that kept one handler for a method once let callers without a token in after one with a token."""
    token, service = "t" * 43, "atspeed.v1.RecommendationService"
    file = tmp_path / "tokens.toml"
    file.write_text(f'[shop]\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\nscopes = ["read"]\n')
    handler = grpc.unary_unary_rpc_method_handler(
        echo.unary_unary,
        request_deserializer=StringValue.FromString,
        response_serializer=StringValue.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler(service, {"Recommend": handler})
    registration = Registration(service, lambda server: server.add_generic_rpc_handlers((generic,)))
    async with (
        running(settings(tmp_path, tokens_file=file), [registration]) as up,
        grpc.aio.insecure_channel(up.address) as channel,
    ):
        method: Any = channel.unary_unary(f"/{service}/Recommend")
        for _ in range(2):
            await method(b"", metadata=(("authorization", f"Bearer {token}"),))
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await method(b"")
            assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
        unfinished: Any = channel.stream_unary(f"/{service}/Recommend")
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await asyncio.wait_for(unfinished(silence()), 10)  # whose message is not waited for
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def silence() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


# Channels


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


async def test_a_replica_that_does_not_serve_the_service_gets_no_calls(tmp_path: Path, server: RunningServer) -> None:
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


# Processes

PROGRAM = """
import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

from engine.errors import BundleError
from service_kit.server import run
from tests.integration.test_service_kit_server import Echo, EchoSettings


@asynccontextmanager
async def echo(settings):
    if (settings.bundle / "broken").exists():
        raise BundleError("manifest.json: not there")
    if (settings.bundle / "slow").exists():
        print("loading", flush=True)
        while not (settings.bundle / "deaf").exists():
            await asyncio.sleep(0.01)
        while True:  # as code does that does not let the event loop run
            pass
    yield [Echo().registration()]
    (settings.bundle / "left").touch()


run(EchoSettings, echo)
"""


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, *arguments),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def ended(*arguments: str) -> tuple[int | None, str]:
    """Exit code and stderr of a process that does not start."""
    async with process(*arguments) as child:
        _, stderr = await asyncio.wait_for(child.communicate(), 30)
        return child.returncode, stderr.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_process_says_where_it_listens_and_leaves_at_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    async with process("--bundle", str(tmp_path), "--port", "0", "--redis-url", "redis://:hidden@localhost") as child:
        assert child.stdout is not None
        line = json.loads(await asyncio.wait_for(child.stdout.readline(), 30))
        assert line == {
            "service": "echo",
            "address": f"127.0.0.1:{line['port']}",
            "port": line["port"],
            "pid": child.pid,
        }
        async with grpc.aio.insecure_channel(line["address"]) as channel:
            assert await call(channel, "UnaryUnary", "hello") == "hello"
        child.send_signal(number)
        _, stderr = await asyncio.wait_for(child.communicate(), 10)
    assert child.returncode == 0
    assert (tmp_path / "left").exists()
    logs = [json.loads(entry) for entry in stderr.decode().splitlines()]
    assert [log["event"] for log in logs] == ["listening", "call", "draining"]
    assert all(log["service"] == "echo" for log in logs)
    assert "hidden" not in stderr.decode()


async def test_a_signal_ends_the_start(tmp_path: Path) -> None:
    """The first process of a container has no default for signals: one that came while the model was loaded was lost."""
    (tmp_path / "slow").touch()
    async with process("--bundle", str(tmp_path)) as child:
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), 30) == b"loading\n"
        child.send_signal(signal.SIGTERM)
        _, stderr = await asyncio.wait_for(child.communicate(), 10)
    assert child.returncode == 0
    assert [json.loads(entry)["event"] for entry in stderr.decode().splitlines()] == ["stopped before it served"]


async def test_a_second_signal_ends_the_process_whatever_it_does(tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    (tmp_path / "deaf").touch()
    async with process("--bundle", str(tmp_path)) as child:
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), 30) == b"loading\n"
        async with asyncio.timeout(10):
            while child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(signal.SIGTERM)  # signals that meet before they are seen are one
                await asyncio.sleep(0.05)
    assert child.returncode == 128 + signal.SIGTERM


async def test_a_port_in_use_is_a_reason_not_to_start(tmp_path: Path, server: RunningServer) -> None:
    code, stderr = await ended("--bundle", str(tmp_path), "--port", str(server.port))
    assert code == 1
    assert f"cannot listen on {server.address}" in stderr
    assert "--port (TEST_ECHO_PORT)" in stderr
    assert "Traceback" not in stderr


async def test_a_broken_bundle_is_a_reason_not_to_start(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    code, stderr = await ended("--bundle", str(tmp_path))
    assert code == 1
    (entry,) = stderr.splitlines()
    assert json.loads(entry)["reason"] == "manifest.json: not there"


async def test_a_bad_setting_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    code, stderr = await ended("--bundle", str(tmp_path), "--port", "high")
    assert code == 2
    (line,) = stderr.splitlines()
    assert line.startswith("echo: --port (TEST_ECHO_PORT): ")
