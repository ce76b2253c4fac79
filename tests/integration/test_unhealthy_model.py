"""An unhealthy target: callers leave it for another replica, and return when a probe succeeds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.model.decoder import Decoder
from atspeed.engine.search.trie import ROOT
from atspeed.rpc import wire
from atspeed.rpc.addresses import target_uri
from atspeed.rpc.channels import channel_options, health_name
from atspeed.rpc.server import RunningServer, running
from atspeed.v1 import target_pb2
from target_service.server import application
from target_service.settings import TargetSettings
from tests.observed import scrape_port
from tests.serving import SERVING, TARGET, EvaluateStream, check_health, until

UNHEALTHY_AFTER = 3
NOT_SERVING = int(health_pb2.HealthCheckResponse.NOT_SERVING)


@dataclass
class Decoders:
    """Those of this process in the order of their first pass, and which of them fail."""

    seen: list[Decoder] = field(default_factory=list)
    failing: list[Decoder] = field(default_factory=list)


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> Decoders:
    decoders, works = Decoders(), Decoder.run_batch

    def run_batch(decoder: Decoder, *arguments: Any) -> Any:
        if decoder not in decoders.seen:
            decoders.seen.append(decoder)
        if decoder in decoders.failing:
            raise MemoryError("no room for 3 GiB")
        return works(decoder, *arguments)

    monkeypatch.setattr(Decoder, "run_batch", run_batch)
    return decoders


@pytest.fixture
async def replicas(bundle: Path, decoders: Decoders) -> AsyncIterator[list[RunningServer]]:
    """Two targets, one loaded after the other."""
    settings = TargetSettings(
        bundle=bundle,
        port=0,
        metrics_port=0,
        threads=1,
        warm_up_seconds=0,
        unhealthy_after=UNHEALTHY_AFTER,
        drain_seconds=1,
    )
    async with AsyncExitStack() as stack:
        registrations = [await stack.enter_async_context(application(settings)) for _ in range(2)]
        yield [await stack.enter_async_context(running(settings, each)) for each in registrations]


@dataclass(frozen=True)
class Caller:
    """Asks for passes of the version that orchestrators ask for."""

    channel: grpc.Channel
    version: str

    def asks(self) -> grpc.StatusCode:
        """How one pass ends."""
        start = target_pb2.EvaluateStart(model_version=self.version, prompt=wire.to_array(np.arange(1, 6)))
        nodes = wire.to_array(np.array([ROOT], dtype=np.int32))
        with EvaluateStream(self.channel) as stream:
            try:
                stream.ask(target_pb2.EvaluateRequest(start=start, nodes=nodes))
            except grpc.RpcError as error:
                return error.code()
        return grpc.StatusCode.OK


async def test_callers_leave_an_unhealthy_target_until_it_recovers(
    bundle: Path, replicas: list[RunningServer], decoders: Decoders
) -> None:
    await asyncio.to_thread(live_through, bundle, replicas, decoders)


def live_through(bundle: Path, replicas: list[RunningServer], decoders: Decoders) -> None:
    """Blocking, beside the servers' event loop."""
    version = Bundle(bundle).manifest.model_version("target")
    balanced = channel_options(TARGET, [], -1, version)
    addresses = ",".join(replica.address for replica in replicas)
    with (
        grpc.insecure_channel(replicas[0].address) as direct,
        grpc.insecure_channel(target_uri(addresses), options=balanced) as channel,
    ):
        sick, caller = Caller(direct, version), Caller(channel, version)
        assert [caller.asks() for _ in range(4)] == [grpc.StatusCode.OK] * 4

        decoders.failing.append(decoders.seen[0])
        names = {"": SERVING, TARGET: NOT_SERVING, health_name(TARGET, version): NOT_SERVING}
        assert [sick.asks() for _ in range(UNHEALTHY_AFTER)] == [grpc.StatusCode.INTERNAL] * UNHEALTHY_AFTER
        until(lambda: {name: check_health(direct, name) for name in names} == names)
        assert unhealthy_models(replicas) == [1, 0]
        until(lambda: {caller.asks() for _ in range(6)} == {grpc.StatusCode.OK})
        assert [caller.asks() for _ in range(20)] == [grpc.StatusCode.OK] * 20

        decoders.failing.clear()
        until(lambda: {check_health(direct, name) for name in names} == {SERVING})
        assert sick.asks() is grpc.StatusCode.OK
        assert unhealthy_models(replicas) == [0, 0]


def unhealthy_models(replicas: list[RunningServer]) -> list[float]:
    """Return the metric of each replica."""
    return [scrape_port(replica.metrics_port or 0).value("atspeed_unhealthy_models") for replica in replicas]
