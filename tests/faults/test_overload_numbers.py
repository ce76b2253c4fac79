"""Five times as many requests as a replica can serve: it serves as many as ever, and says no to the rest at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import grpc
import numpy as np
import pytest

from client.local_stack import LocalStack
from engine.bundle import Bundle
from tests.bundles import random_history
from tests.faults.offered import Caller, Outcome
from tests.serving import RECOMMENDATION, SERVING, check_health, request_of

pytestmark = pytest.mark.long

SECONDS = 10.0
BUNDLE = Path(__file__).parents[2] / "bundles" / "movielens-100k"
PLACES, QUEUE = 4, 4


@pytest.fixture
def small_stack(log_folder: Path) -> Iterator[LocalStack]:
    """One of each service, whose orchestrator serves four requests at once and lets four wait.

    Of the bundle that the project ships, asked for long lists: with cheaper ones, what a call itself costs would be the limit,
    and gRPC's core drops calls by itself when a thousand have come that Python has not looked at.
    """
    folder = log_folder / "overload"
    folder.mkdir()
    flags: dict[str, dict[str, object]] = {
        "target": {"threads": 1},
        "orchestrator": {"max-running": PLACES, "max-queued": QUEUE},
    }
    with LocalStack(BUNDLE, log_folder=folder, flags=flags) as stack:
        yield stack


def memory(stack: LocalStack) -> float:
    """MiB that the orchestrator holds."""
    process = stack.orchestrators[0].process
    assert process is not None
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def probe(stack: LocalStack, while_running: Future[Outcome]) -> list[float]:
    """How long each health check took while the load ran; all say SERVING."""
    took = []
    with grpc.insecure_channel(stack.address) as channel:
        while not while_running.done():
            begun = time.monotonic()
            assert check_health(channel, RECOMMENDATION) == SERVING
            took.append(time.monotonic() - begun)
            time.sleep(0.05)
    return took


def refusals_ms(stack: LocalStack, after: int) -> list[float]:
    """How long the orchestrator took for each refusal, by its log from this byte on."""
    lines = stack.orchestrators[0].log.read_bytes()[after:].splitlines()
    calls = [json.loads(line) for line in lines]
    return [call["duration_ms"] for call in calls if call.get("code") == "RESOURCE_EXHAUSTED"]


def test_five_times_the_limit(small_stack: LocalStack) -> None:
    catalogue = Bundle(BUNDLE).catalogue()
    requests = [request_of(random_history(catalogue, 1 + seed % 20, seed), k=100) for seed in range(200)]
    with Caller(small_stack.address, requests) as caller:
        caller.at_once(PLACES, SECONDS / 2).result()  # warm
        peak = caller.at_once(PLACES, SECONDS).result()
        assert set(peak.codes) == {"OK"}
        before, logged = memory(small_stack), small_stack.orchestrators[0].log.stat().st_size
        running = caller.at_rate(5 * peak.goodput, SECONDS)
        probes = probe(small_stack, running)
        flood = running.result()
        grown = memory(small_stack) - before
        after = caller.at_once(PLACES, SECONDS / 2).result()
    refusals = refusals_ms(small_stack, logged)
    seen_ms = np.array(flood.seconds["RESOURCE_EXHAUSTED"]) * 1000
    print(  # noqa: T201 - numbers for whoever runs `make faults`
        f"peak {peak.goodput:.1f}/s, offered {5 * peak.goodput:.0f}/s: goodput {flood.goodput:.1f}/s, "
        f"{len(refusals)} refusals, of the server's time p50 {np.median(refusals):.1f}, p99 {np.quantile(refusals, 0.99):.1f}, "
        f"max {max(refusals):.1f} ms, of the caller's p50 {np.median(seen_ms):.1f}, p99 {np.quantile(seen_ms, 0.99):.1f} ms; "
        f"health p99 {np.quantile(probes, 0.99) * 1000:.0f}, max {max(probes) * 1000:.0f} ms of {len(probes)}; "
        f"memory {grown:+.1f} MiB; afterwards {after.goodput:.1f}/s"
    )
    assert set(flood.codes) == {"OK", "RESOURCE_EXHAUSTED"}, flood.details
    assert flood.goodput >= 0.9 * peak.goodput
    assert len(refusals) == flood.codes["RESOURCE_EXHAUSTED"]
    assert max(refusals) <= 50
    assert max(probes) <= 0.2
    assert grown <= 20
    assert set(after.codes) == {"OK"}
