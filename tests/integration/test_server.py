"""Real servers and channels: statuses, limits, drain and health for every kind of handler."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from atspeed.observability.logs import REQUEST_ID_HEADER
from atspeed.rpc import healthcheck
from atspeed.rpc.grpc_status import PUSHBACK_HEADER
from atspeed.rpc.server import Registration, RunningServer, running
from tests.echo import SECRET, SERVICE, Echo, call, failure, leave, settings, until, watch

KINDS = ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream"]


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
    (entry,) = [log for log in logs if log["event"] == "internal_error"]
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == f"internal error {entry['error_id']}"
    assert SECRET in str(entry["exc_info"])
    assert entry["exc_info"].__traceback__ is not None
    seen_by_client = (
        f"{error.details()} {error.debug_error_string()} {error.trailing_metadata()} {error.initial_metadata()}"
    )
    assert SECRET not in seen_by_client
    assert "Error:" not in seen_by_client


@pytest.mark.parametrize("kind", KINDS)
async def test_the_log_of_a_failed_call_has_what_a_trusted_proxy_forwards(
    echo: Echo, tmp_path: Path, kind: str
) -> None:
    metadata = (("x-forwarded-for", "203.0.113.7"),)
    async with (
        running(settings(tmp_path, trusted_proxies="127.0.0.0/8,::1"), [echo.registration()]) as up,
        grpc.aio.insecure_channel(up.address) as channel,
    ):
        with structlog.testing.capture_logs() as logs:
            await call(channel, kind, "hello", metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError):
                await call(channel, kind, "bug", metadata=metadata)
            await until(lambda: sum(log["event"] == "call" for log in logs) == 2)
    good, bad = (log for log in logs if log["event"] == "call")
    assert (good["code"], good.keys() & {"peer", "proxy"}) == ("OK", set())
    assert (bad["code"], bad["peer"]) == ("INTERNAL", "203.0.113.7")
    assert bad["proxy"].startswith("127.0.0.1:")


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


async def test_drain_notifies_watchers_and_running_calls_end(echo: Echo, tmp_path: Path) -> None:
    """Watchers used to keep a draining server up for its whole grace period."""
    states: list[int] = []
    manager = running(settings(tmp_path, drain_seconds=60), [echo.registration()])
    up = await manager.__aenter__()
    async with grpc.aio.insecure_channel(up.address) as channel:
        watching = asyncio.create_task(watch(channel, states))
        waiting = asyncio.create_task(call(channel, "UnaryStream", "wait"))
        await asyncio.wait_for(echo.entered.wait(), 5)
        await until(lambda: bool(states))  # the watcher came later than the call, now and then
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


async def test_permission_is_checked_on_every_call(echo: Echo, tmp_path: Path) -> None:
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
