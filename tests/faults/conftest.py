"""A stack to break: a draft, two targets that take every prompt from Redis, an orchestrator; and lists to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import new_bundle, random_history
from tests.catalogues import new_catalogue
from tests.serving import Client, FakeDraft, assert_same_list, recovered, resume, until


@dataclass(frozen=True)
class Case:
    """A history, and the target's own list for it from before anything broke."""

    history: Sequence[str]
    expected: pb.RecommendResponse


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return new_catalogue(seed=2)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Path:
    return new_bundle(tmp_path_factory.mktemp("bundle"), catalogue)


@pytest.fixture(scope="session")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def shared_stack(bundle: Path, redis_server: LocalRedis, log_folder: Path) -> Iterator[LocalStack]:
    flags: dict[str, dict[str, object]] = {
        "draft": {"redis-timeout-seconds": 1, "kv-redis": "always"},
        "target": {"redis-timeout-seconds": 1, "threads": 1, "kv-memory-mb": 0, "kv-redis": "always"},
        "orchestrator": {
            "redis-timeout-seconds": 1,
            "draft-timeout-seconds": 4,  # half of it, which the first of two attempts has, is longer than a wait for Redis
            "draft-backoff-seconds": 0.2,
            "planner": "fixed",  # the draft is asked, whether it pays or not
        },
    }
    with LocalStack(bundle, redis_url=redis_server.url, targets=2, log_folder=log_folder, flags=flags) as stack:
        yield stack


@pytest.fixture(scope="session")
def cases(shared_stack: LocalStack, catalogue: Catalogue) -> list[Case]:
    histories = [random_history(catalogue, 1 + seed % 12, seed) for seed in range(24)]
    with Client(shared_stack.address) as client:
        return [Case(h, client.recommend(h, k=20, mode=pb.MODE_TARGET_ONLY)) for h in histories]


@pytest.fixture
def stack(redis_url: str, shared_stack: LocalStack, cases: list[Case]) -> Iterator[LocalStack]:
    """The stack over an empty Redis, all of it alive; what the test breaks is mended after it."""
    yield shared_stack
    for service in shared_stack.services:
        resume(service)
        if not service.running:
            service.start()
    # An orchestrator that was refused by the draft lets one request try it again, and answers those beside it without a plan.
    with Client(shared_stack.address) as client:
        until(lambda: not recovered(client, cases[0].history).degraded)


@pytest.fixture
def client(stack: LocalStack) -> Iterator[Client]:
    with Client(stack.address) as client:
        yield client


@pytest.fixture(scope="session")
def fake_draft() -> Iterator[FakeDraft]:
    with FakeDraft() as draft:
        yield draft


@pytest.fixture(scope="session")
def misled_address(fake_draft: FakeDraft, shared_stack: LocalStack, log_folder: Path) -> Iterator[str]:
    """An orchestrator before the same targets that asks the fake draft, every time and with patience, and nobody else."""
    patience = {
        "draft": fake_draft.address,
        "draft-timeout-seconds": 30,
        "draft-backoff-seconds": 0,
        "target-prefetch": False,
    }
    service = ServiceProcess("orchestrator", shared_stack.orchestrators[0].flags | patience, log_folder / "misled.log")
    service.start()
    yield service.address
    service.stop()


@pytest.fixture
def misled(misled_address: str, stack: LocalStack) -> Iterator[Client]:
    with Client(misled_address) as client:
        yield client


def asking(client: Client, cases: Sequence[Case], **fields: Any) -> list[Callable[[], pb.RecommendResponse]]:
    """One call for each case."""
    return [partial(client.recommend, case.history, **{"k": 20, **fields}) for case in cases]


def assert_all_right(replies: Sequence[pb.RecommendResponse], cases: Sequence[Case]) -> None:
    """Every request gets the target's own list, and a degraded reply gives its reason."""
    for reply, case in zip(replies, cases, strict=True):
        assert_same_list(reply, case.expected)
        assert reply.exactness.exact
        assert reply.degraded == bool(reply.degraded_reasons)
