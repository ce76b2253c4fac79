"""Metrics on a port of their own, and calls counted by how they end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
from prometheus_client import CollectorRegistry
from pydantic_settings import SettingsConfigDict

from atspeed.configuration.settings import ServiceSettings
from atspeed.errors import NotFoundError, StartupError
from atspeed.observability.metrics import (
    CounterOf,
    HistogramOf,
    ReadCounter,
    ReadGauge,
    Readings,
    Reads,
    SummedReadings,
    exposed,
)
from atspeed.rpc.server import Registration, running
from tests.observed import Scrape, scrape_port
from tests.serving import until

COUNTED = CounterOf("atspeed_counted_total", "Counted.", ("kind",))
SPREAD = HistogramOf("atspeed_spread", "Spread.", buckets=(1, 2))
KEPT = ReadCounter("atspeed_kept_total", "Kept elsewhere.")
KNOWN = ReadGauge("atspeed_known", "Known elsewhere.", ("tier",))


class EchoSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="TEST_METRICS_")
    service: ClassVar[str] = "echo"


def test_what_is_declared_is_exposed_with_what_others_count() -> None:
    registry, kept = CollectorRegistry(), [3]
    counted, spread = COUNTED.build(registry), SPREAD.build(registry)
    registry.register(Readings({KEPT: lambda: kept[0], KNOWN: lambda: {("memory",): 1, ("redis",): 2}}))
    with exposed(registry, "127.0.0.1", 0) as port:
        counted.labels("odd").inc()
        spread.observe(1.5)
        kept[0] += 1
        seen = scrape_port(port)
    assert seen.kinds == {
        "atspeed_counted_total": "counter",
        "atspeed_spread": "histogram",
        "atspeed_kept_total": "counter",
        "atspeed_known": "gauge",
    }
    assert (seen.value("atspeed_counted_total", kind="odd"), seen.value("atspeed_kept_total")) == (1, 4)
    assert (seen.value("atspeed_spread_bucket", le="1.0"), seen.value("atspeed_spread_bucket", le="2.0")) == (0, 1)
    assert seen.value("atspeed_known", tier="redis") == 2


async def test_a_metrics_port_that_is_taken_is_a_reason_not_to_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = EchoSettings(bundle=tmp_path, metrics_port=taken.getsockname()[1])
        with pytest.raises(StartupError, match=r"--metrics-port \(TEST_METRICS_METRICS_PORT\)"):
            async with running(settings, []):
                pass


async def test_without_a_port_there_is_none(tmp_path: Path) -> None:
    async with running(EchoSettings(bundle=tmp_path), []) as server:
        assert server.metrics_port is None


async def served(tmp_path: Path, act: Callable[[], Awaitable[bytes]], use: Callable[..., Awaitable[None]]) -> Scrape:
    """Return the metrics of a server after some calls of one method."""

    async def method(request: bytes, context: object) -> bytes:
        return await act()

    methods: dict[str, Any] = {"Act": grpc.unary_unary_rpc_method_handler(method)}
    handler = grpc.method_handlers_generic_handler("test.Echo", methods)
    registration = Registration("test.Echo", lambda server: server.add_generic_rpc_handlers((handler,)))
    async with running(EchoSettings(bundle=tmp_path, metrics_port=0), [registration]) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            await use(channel.unary_unary("/test.Echo/Act"))
        port = server.metrics_port
        assert port is not None
        # A refusal is sent before it is counted.
        await asyncio.to_thread(until, lambda: scrape_port(port).total("atspeed_calls_total") == 1)
        return await asyncio.to_thread(scrape_port, port)


async def failing(call: Any, **options: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await call(b"", **options)


@pytest.mark.parametrize(
    ("error", "code"), [(NotFoundError("user_id", "none"), "NOT_FOUND"), (ValueError("a bug"), "INTERNAL")]
)
async def test_a_refusal_counts_under_its_status(tmp_path: Path, error: Exception, code: str) -> None:
    async def act() -> bytes:
        raise error

    seen = await served(tmp_path, act, failing)
    assert seen.value("atspeed_calls_total", method="Act", code=code) == 1
    assert seen.value("atspeed_calls_in_flight", method="Act") == 0


async def test_a_call_whose_deadline_passes_counts_as_such(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def act() -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return b""

    async def use(call: Any) -> None:
        await failing(call, timeout=0.2)
        await ended.wait()

    seen = await served(tmp_path, act, use)
    assert seen.value("atspeed_calls_total", method="Act", code="DEADLINE_EXCEEDED") == 1


def test_a_counter_never_falls_when_one_that_counted_goes() -> None:
    """It would read like a restart, and what the others have counted like an increase."""
    registry, counts = CollectorRegistry(), [3.0, 4.0]
    summed = SummedReadings([KEPT, KNOWN])
    registry.register(summed)
    parts: list[Reads] = [
        {KEPT: lambda: counts[0], KNOWN: lambda: {("memory",): 1}},
        {KEPT: lambda: counts[1], KNOWN: lambda: {("memory",): 2, ("redis",): 5}},
    ]
    for part in parts:
        summed.add(part)
    assert _sums(registry) == (7, 3, 5)
    summed.remove(parts[0])
    counts[:] = [100, 5]
    assert _sums(registry) == (8, 2, 5)
    summed.add(parts[0])
    assert _sums(registry) == (108, 3, 5)


def _sums(registry: CollectorRegistry) -> tuple[float | None, ...]:
    tiers = [registry.get_sample_value("atspeed_known", {"tier": tier}) for tier in ("memory", "redis")]
    return registry.get_sample_value("atspeed_kept_total"), *tiers
