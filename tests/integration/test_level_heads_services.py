"""A draft with heads behind the real services: lists of the target alone, in every mode that promises it, with and without it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import random_history, write_bundle
from tests.catalogues import new_catalogue
from tests.serving import LIVENESS_SECONDS, WINDOW, Client, assert_same_list


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return new_catalogue()


@pytest.fixture(scope="module")
def stack(
    catalogue: Catalogue, redis_server: LocalRedis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalStack]:
    bundle = write_bundle(
        tmp_path_factory.mktemp("heads"), catalogue, draft_heads=True, max_items=WINDOW, allow_empty_history=True
    )
    kept: dict[str, object] = {"redis-timeout-seconds": 10, "threads": 1, "warm-up-seconds": 0}
    flags = {
        "draft": kept | {"batch-tokens": 1000, "batch-delay-ms": 20},
        "target": kept,
        "orchestrator": {"redis-timeout-seconds": 10, "draft-timeout-seconds": 30, "planner": "fixed", "max-batch": 32},
    }
    folder = tmp_path_factory.mktemp("logs")
    with LocalStack(bundle.root, redis_url=redis_server.url, log_folder=folder, flags=flags) as stack:
        yield stack


@pytest.fixture
def client(redis_url: str, stack: LocalStack) -> Iterator[Client]:
    with Client(stack.address) as client:
        yield client


def test_lists_are_the_targets_with_the_draft_and_without_it(
    client: Client, stack: LocalStack, catalogue: Catalogue
) -> None:
    """Strict lists, asked for together so that prompts share a pass of the draft; then with the draft killed."""
    histories = [random_history(catalogue, length, seed=length) for length in range(WINDOW + 1)] * 2
    fields = [{"k": 1 + 7 * (n % 3)} for n in range(len(histories))]
    asked = list(zip(histories, fields, strict=True))
    expected = [client.recommend(history, mode=pb.MODE_TARGET_ONLY, **one) for history, one in asked]
    with ThreadPoolExecutor(len(histories)) as pool:
        calls = [pool.submit(client.recommend, history, mode=pb.MODE_STRICT, **one) for history, one in asked]
        replies = [call.result(LIVENESS_SECONDS) for call in calls]
    for reply, wanted in zip(replies, expected, strict=True):
        assert_same_list(reply, wanted)
        assert reply.exactness.exact
        assert not reply.degraded_reasons
        assert 0 < reply.statistics.draft_passes <= reply.statistics.target_passes
        assert reply.statistics.nodes_drafted > 0
    assert min(reply.statistics.target_passes for reply in replies) < expected[0].statistics.target_passes
    stack.drafts[0].stop()
    for (history, one), wanted in list(zip(asked, expected, strict=True))[:3]:
        reply = client.recommend(history, mode=pb.MODE_STRICT, **one)
        assert_same_list(reply, wanted)
        assert reply.degraded_reasons
