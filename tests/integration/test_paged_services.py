"""Services whose keys and values are in pages of a device, here of the CPU: their lists, their hits, and their limits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
import redis

from atspeed.benchmarks.near_ties import Verdict, compare
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.kv.redis_store import user_blocks_name
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.trie import ROOT
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.rpc import wire
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import target_pb2
from tests.bundles import random_history
from tests.messages import array, first_message
from tests.serving import (
    LIVENESS_SECONDS,
    WINDOW,
    Client,
    EvaluateStream,
    models,
    request_of,
    until,
)


def assert_near(reply: pb.RecommendResponse, expected: pb.RecommendResponse) -> None:
    """Equal items in equal order, near-ties apart: the sums of a device have another order than those of the host."""
    assert compare(RankedList.of(reply.items), RankedList.of(expected.items)) is not Verdict.DIFFERENT


MODES = [pb.MODE_STRICT, pb.MODE_TARGET_ONLY, pb.MODE_TOLERANCE, pb.MODE_EXACT_SAMPLING]


@pytest.fixture(scope="module")
def paged_stack(bundle: Path, redis_server: LocalRedis, log_folder: Path) -> Iterator[LocalStack]:
    """Services like the shared ones, with two targets, in pages."""
    flags: dict[str, object] = {"redis-timeout-seconds": 10, "kv-redis": "always", "kv-paged": "always"}
    flags |= {"kv-device-mb": 32, "threads": 1, "warm-up-seconds": 0}
    patient: dict[str, object] = {"redis-timeout-seconds": 10, "draft-timeout-seconds": 30, "planner": "fixed"}
    folder = log_folder / "paged"
    folder.mkdir()
    all_flags = {"draft": flags, "target": flags, "orchestrator": patient}
    with LocalStack(bundle, redis_url=redis_server.url, targets=2, log_folder=folder, flags=all_flags) as stack:
        yield stack


@pytest.fixture
def paged(redis_url: str, paged_stack: LocalStack) -> Iterator[Client]:
    with Client(paged_stack.address) as client:
        yield client


@pytest.mark.parametrize("mode", MODES, ids=pb.Mode.Name)
def test_lists_are_those_of_the_host(
    client: Client, paged: Client, catalogue: Catalogue, mode: pb.Mode.ValueType
) -> None:
    """Cold, then on the device's own prefix, then for a history that is longer by one item."""
    for seed in range(3):
        drawn = {"seed": seed} if mode == pb.MODE_EXACT_SAMPLING else {}
        history = random_history(catalogue, WINDOW - 1, seed=700 + seed)
        for items in (history, history, [*history, *random_history(catalogue, 1, seed=seed)]):
            expected = client.recommend(items, mode=mode, **drawn)
            assert_near(paged.recommend(items, mode=mode, **drawn), expected)


def test_many_requests_at_once_share_passes_and_get_their_own_lists(
    client: Client, paged: Client, catalogue: Catalogue
) -> None:
    """Histories of all lengths: their trees run together, each by its own pages."""
    requests = [request_of(random_history(catalogue, 1 + n % WINDOW, seed=800 + n)) for n in range(16)]
    expected = client.batch(requests)
    for index, result in paged.batch(requests).items():
        assert_near(result.response, expected[index].response)


def test_a_hit_is_on_the_device_and_another_replica_finds_it_in_redis(
    paged_stack: LocalStack, redis_url: str, bundle: Path, catalogue: Catalogue
) -> None:
    """Then that one has it on its device too."""
    manifest, user_key = Bundle(bundle).manifest, b"visitor1"
    columns = catalogue.codes[catalogue.find(random_history(catalogue, WINDOW, seed=900))]
    tokens = np.asarray(manifest.target.code_tokens)[columns + catalogue.trie.codebook_offset]
    prompt = manifest.target.prompt.tokens(list(tokens))

    def tokens_by_tier(replica: ServiceProcess) -> dict[str, int]:
        start = target_pb2.EvaluateStart(
            model_version=manifest.model_version("target"), prompt=wire.to_array(prompt), user_key=user_key
        )
        nodes = wire.to_array(np.array([ROOT], dtype=np.int32))
        with models(replica.address) as channel, EvaluateStream(channel) as stream:
            return dict(stream.ask(target_pb2.EvaluateRequest(start=start, nodes=nodes)).statistics.cached_tokens)

    one, two = paged_stack.targets
    assert set(tokens_by_tier(one).values()) == {0}
    found = dict[str, int]()

    def is_kept(replica: ServiceProcess, tier: str) -> bool:
        found.clear()
        found.update(tokens_by_tier(replica))
        return found[tier] > 0

    until(lambda: is_kept(one, "device"))
    on_device = found["device"]
    assert (found["memory"], found["redis"]) == (0, 0)
    # The other replica keeps what it finds or computes: so it is asked once, when Redis has everything.
    with redis.Redis.from_url(redis_url) as store:
        until(lambda: store.hlen(user_blocks_name(user_key)) > 0)
    assert is_kept(two, "redis")
    assert found["redis"] == on_device
    assert is_kept(two, "device")
    assert (found["device"], found["redis"]) == (on_device, 0)


def test_streams_beyond_the_pool_are_refused_and_those_that_run_end_well(
    bundle: Path, catalogue: Catalogue, owned: ExitStack, log_folder: Path
) -> None:
    """The refusal is RESOURCE_EXHAUSTED and names the setting. A place is free again when a stream ends."""
    flags = {"bundle": bundle, "threads": 1, "warm-up-seconds": 0, "kv-paged": "always", "kv-device-mb": 1}
    service = ServiceProcess("target_service", flags, log_folder / "small-pool.log")
    owned.callback(service.kill)
    service.start()
    version = Bundle(bundle).manifest.model_version("target")
    open_streams = [EvaluateStream(owned.enter_context(models(service.address))) for _ in range(64)]
    refusal: grpc.RpcError | None = None
    served = []
    for number, stream in enumerate(open_streams):
        message = first_message(version, [ROOT])
        message.start.prompt.CopyFrom(array([3 + number // 5 % 5, 3 + number % 5] + [3] * 198, "int64"))
        try:
            stream.ask(message)
            served.append(stream)
        except grpc.RpcError as error:
            refusal = error
            break
    assert refusal is not None
    assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "kv_device_mb" in (refusal.details() or "")
    assert served
    served.pop(0).end()
    done = threading.Event()

    def again() -> bool:
        with models(service.address) as channel, EvaluateStream(channel) as stream:
            try:
                stream.ask(first_message(version, [ROOT]))
            except grpc.RpcError:
                return False
        done.set()
        return True

    until(again)
    assert done.wait(LIVENESS_SECONDS)
    for stream in served:
        stream.end()
