"""A T5 behind the real services, with a Llama as its draft: lists, prefix cache, erasure."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.kv.redis_store import user_blocks_name
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.user_key import user_cache_key
from tests.bundles import random_history, write_bundle
from tests.catalogues import new_catalogue
from tests.serving import (
    LIVENESS_SECONDS,
    WINDOW,
    Client,
    assert_same_list,
    recovered,
    request_of,
    until,
)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return new_catalogue()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Path:
    root = tmp_path_factory.mktemp("t5")
    return write_bundle(
        root, catalogue, architecture="t5", draft_architecture="llama", max_items=WINDOW, allow_empty_history=True
    ).root


@pytest.fixture(scope="module")
def stack(bundle: Path, redis_server: LocalRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    kept: dict[str, object] = {"kv-redis": "always", "redis-timeout-seconds": 10, "threads": 1, "warm-up-seconds": 0}
    flags = {
        "draft": kept,
        # Long passes share a batch with others: prompts of several lengths, at several passes.
        "target": kept | {"batch-tokens": 1000, "batch-delay-ms": 20},
        "orchestrator": {"redis-timeout-seconds": 10, "draft-timeout-seconds": 30, "planner": "fixed", "max-batch": 32},
    }
    folder = tmp_path_factory.mktemp("logs")
    with LocalStack(bundle, redis_url=redis_server.url, log_folder=folder, flags=flags) as stack:
        yield stack


@pytest.fixture
def client(redis_url: str, stack: LocalStack) -> Iterator[Client]:
    with Client(stack.address) as client:
        yield client


def prompt_tokens(bundle: Path, history: list[str]) -> int:
    """The encoder's prompt of a full window's prompt, or of a shorter one."""
    prompt = Bundle(bundle).manifest.target.prompt
    return len(history) * 4 + len(prompt.suffix)


def test_requests_of_all_lengths_get_their_own_lists_at_the_same_time(client: Client, catalogue: Catalogue) -> None:
    """Strict lists, asked for together, are those of the target alone, asked for one by one. The draft has random weights."""
    histories = [random_history(catalogue, length, seed=length) for length in range(WINDOW + 1)] * 2
    fields = [{"k": 1 + 7 * (n % 3)} for n in range(len(histories))]
    expected = [
        client.recommend(history, mode=pb.MODE_TARGET_ONLY, **one)
        for history, one in zip(histories, fields, strict=True)
    ]
    with ThreadPoolExecutor(len(histories)) as pool:
        calls = [
            pool.submit(client.recommend, h, mode=pb.MODE_STRICT, **one)
            for h, one in zip(histories, fields, strict=True)
        ]
        replies = [call.result(LIVENESS_SECONDS) for call in calls]
    for reply, wanted in zip(replies, expected, strict=True):
        assert_same_list(reply, wanted)
        assert reply.exactness.exact
        assert not reply.degraded_reasons
    assert max(reply.statistics.nodes_drafted for reply in replies) > 0
    batch = client.batch([request_of(h, mode=pb.MODE_STRICT, **one) for h, one in zip(histories, fields, strict=True)])
    for index, wanted in enumerate(expected):
        assert_same_list(batch[index].response, wanted)


def test_a_prompt_comes_from_memory_and_after_a_restart_from_redis(
    client: Client, stack: LocalStack, bundle: Path, catalogue: Catalogue, redis_url: str
) -> None:
    """All of it; of a history with one more item nothing, since the encoder reads all of it anew."""
    history = random_history(catalogue, WINDOW - 1, seed=50)
    client.record("reader", history)
    first = client.recommend(user_id="reader")
    assert sum(first.statistics.cached_tokens.values()) == 0
    again = client.recommend(user_id="reader")
    assert again.statistics.cached_tokens["memory"] == prompt_tokens(bundle, history)
    name = user_blocks_name(user_cache_key("", "reader"))
    with redis.Redis.from_url(redis_url) as store:
        until(lambda: bool(store.exists(name)))
    (target,) = stack.targets
    target.stop()
    target.start()
    recovered(client, history)
    fetched = client.recommend(user_id="reader")
    assert fetched.statistics.cached_tokens["redis"] == prompt_tokens(bundle, history)
    for reply in (again, fetched):
        assert_same_list(reply, first)
    client.record("reader", random_history(catalogue, 1, seed=51))
    assert sum(client.recommend(user_id="reader").statistics.cached_tokens.values()) == 0


def test_nothing_of_a_forgotten_user_is_left(client: Client, catalogue: Catalogue, redis_url: str) -> None:
    history = random_history(catalogue, WINDOW, seed=60)
    names = {user: user_blocks_name(user_cache_key("", user)) for user in ("leaver", "stayer")}
    for user in names:
        client.record(user, history)
        client.recommend(user_id=user)
    with redis.Redis.from_url(redis_url) as store:
        until(lambda: all(store.exists(name) for name in names.values()))
        client.stub.ForgetUser(pb.ForgetUserRequest(user_id="leaver"), timeout=LIVENESS_SECONDS)
        assert store.exists(names["leaver"]) == 0
        client.record("leaver", history)
        # Memory drops the blocks when the erasure arrives; no block of the user is kept for a while.
        until(lambda: not sum(client.recommend(user_id="leaver").statistics.cached_tokens.values()))
        assert store.exists(names["leaver"]) == 0
    assert client.recommend(user_id="stayer").statistics.cached_tokens["memory"] > 0
