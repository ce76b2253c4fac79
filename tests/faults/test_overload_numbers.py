"""Five times as many requests as a replica can serve: goodput stays, and the rest is refused at once.

Times are the callers': from the call to its answer or refusal, as a process of their own sees it.
"""

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

from atspeed.engine.bundle.bundle import Bundle
from atspeed.local.stack import LocalStack
from tests.bundles import random_history, write_bundle
from tests.catalogues import random_catalogue
from tests.faults.offered import Caller, Outcome
from tests.serving import RECOMMENDATION, SERVING, check_health, request_of

pytestmark = pytest.mark.long

SECONDS = 10.0
PLACES, QUEUE = 4, 4
# 32 million parameters: tens of milliseconds for a list, as targets that are worth a service of their own take.
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "initializer_range": 0.05,
}


@pytest.fixture(scope="module")
def large_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    catalogue = random_catalogue(4000, (64, 64, 64, 64), seed=3)
    folder = tmp_path_factory.mktemp("large")
    return write_bundle(folder, catalogue, max_items=20, target_shape=SHAPE).bundle


@pytest.fixture
def small_stack(large_bundle: Bundle, log_folder: Path) -> Iterator[LocalStack]:
    """One of each service, whose orchestrator serves four requests at once and lets four wait. The target has one thread: where
    there are two cores, the services have the other.
    """
    folder = log_folder / "overload"
    folder.mkdir()
    flags: dict[str, dict[str, object]] = {
        "draft": {"threads": 1},
        "target": {"threads": 1},
        "orchestrator": {"max-running": PLACES, "max-queued": QUEUE},
    }
    with LocalStack(large_bundle.root, log_folder=folder, flags=flags) as stack:
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


def told(seconds: list[float]) -> str:
    """The distribution of some times."""
    milliseconds = np.array(seconds) * 1000
    p50, p99 = np.quantile(milliseconds, [0.5, 0.99])
    return f"p50 {p50:.1f}, p99 {p99:.1f}, max {milliseconds.max():.1f} ms"


def test_five_times_the_limit(large_bundle: Bundle, small_stack: LocalStack) -> None:
    catalogue = large_bundle.catalogue()
    requests = [request_of(random_history(catalogue, 1 + seed % 20, seed), k=20) for seed in range(200)]
    with Caller(small_stack.address, requests) as caller:
        caller.at_once(PLACES + QUEUE, SECONDS).result()  # warm, and the planner knows what pays
        peak = caller.at_once(PLACES + QUEUE, SECONDS).result()  # as many as it takes without a refusal
        assert set(peak.codes) == {"OK"}
        before, logged = memory(small_stack), small_stack.orchestrators[0].log.stat().st_size
        running = caller.at_rate(5 * peak.goodput, SECONDS)
        probes = probe(small_stack, running)
        flood = running.result()
        grown = memory(small_stack) - before
        after = caller.at_once(PLACES + QUEUE, SECONDS).result()
    refused = flood.seconds["RESOURCE_EXHAUSTED"]
    decided = refusals_ms(small_stack, logged)
    print(  # noqa: T201 - numbers for readers of `make faults`
        f"peak {peak.goodput:.1f}/s, offered {5 * peak.goodput:.0f}/s: goodput {flood.goodput:.1f}/s; {len(refused)} refusals: "
        f"{told(refused)}, of which the server's {told([ms / 1000 for ms in decided])}; answers: {told(flood.seconds['OK'])}; "
        f"{len(probes)} probes: {told(probes)}; memory {grown:+.1f} MiB; afterwards {after.goodput:.1f}/s"
    )
    assert set(flood.codes) == {"OK", "RESOURCE_EXHAUSTED"}, flood.details
    assert flood.goodput >= 0.9 * max(peak.goodput, after.goodput)
    assert len(decided) == len(refused)
    assert np.quantile(refused, 0.99) <= 0.05
    assert max(probes) <= 0.2
    assert grown <= 20
    assert set(after.codes) == {"OK"}
