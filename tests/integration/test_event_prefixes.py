"""`prefix_on_event` with real services: the next list finds its prompt's keys and values, and stays the same list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import random_history
from tests.observed import scrape
from tests.serving import LIVENESS_SECONDS, WINDOW, Client, assert_same_list, until


@pytest.fixture(scope="module")
def service(shared_stack: LocalStack, log_folder: Path) -> Iterator[ServiceProcess]:
    """An orchestrator beside the shared one, over the same models and Redis."""
    flags = shared_stack.orchestrators[0].flags | {"prefix-on-event": True, "metrics-port": 0}
    service = ServiceProcess("orchestrator", flags, log_folder / "prefix-on-event.log")
    service.start()
    yield service
    service.stop()


@pytest.fixture
def eager(service: ServiceProcess, stack: LocalStack) -> Iterator[Client]:
    with Client(service.address) as client:
        yield client


def count(service: ServiceProcess, outcome: str) -> float:
    return scrape(service).value("atspeed_event_prefixes_total", outcome=outcome)


def cached(reply: pb.RecommendResponse) -> int:
    return sum(reply.statistics.cached_tokens.values())


def recorded(service: ServiceProcess, eager: Client, user: str, history: list[str]) -> None:
    made = count(service, "made")
    eager.record(user, history)
    until(lambda: count(service, "made") == made + 1)


def test_the_next_list_finds_its_prompt_and_is_the_same(
    service: ServiceProcess, eager: Client, client: Client, catalogue: Catalogue
) -> None:
    history = random_history(catalogue, WINDOW, seed=31)
    hits = count(service, "hit")
    recorded(service, eager, "prefixed", history)
    client.record("plain", history)
    fast, plain = eager.recommend(user_id="prefixed"), client.recommend(user_id="plain")
    assert cached(fast) > cached(plain) == 0
    assert_same_list(fast, plain)
    assert count(service, "hit") == hits + 1


def test_a_forgotten_user_has_no_prefix(
    service: ServiceProcess, eager: Client, client: Client, catalogue: Catalogue
) -> None:
    history = random_history(catalogue, WINDOW, seed=32)
    wasted = count(service, "wasted")
    recorded(service, eager, "forgotten", history)
    assert eager.stub.ForgetUser(pb.ForgetUserRequest(user_id="forgotten"), timeout=LIVENESS_SECONDS).existed
    assert count(service, "wasted") == wasted + 1

    def erased() -> bool:
        client.record("forgotten", history)  # by the orchestrator without prefixes
        found = cached(client.recommend(user_id="forgotten"))
        client.stub.ForgetUser(pb.ForgetUserRequest(user_id="forgotten"), timeout=LIVENESS_SECONDS)
        return found == 0

    until(erased)
