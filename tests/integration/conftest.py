"""One stack for all tests that leave its services as they found them: a draft, a target and an orchestrator as processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from tests.bundles import new_bundle, random_history
from tests.catalogues import new_catalogue
from tests.serving import WINDOW, Client

LIMITS = {"max-history-items": 60, "max-candidate-items": 500, "max-batch": 16, "max-k": 50, "max-beam-width": 100}


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return new_catalogue()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Path:
    return new_bundle(tmp_path_factory.mktemp("bundle"), catalogue)


@pytest.fixture(scope="session")
def history(catalogue: Catalogue) -> list[str]:
    """A history as long as the window."""
    return random_history(catalogue, WINDOW, seed=5)


@pytest.fixture(scope="session")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def shared_stack(bundle: Path, redis_server: LocalRedis, log_folder: Path) -> Iterator[LocalStack]:
    """Time-outs that no load of the machine reaches, and plans that depend on no time: tests see decisions of the services."""
    patient: dict[str, object] = {"redis-timeout-seconds": 10}
    flags: dict[str, dict[str, object]] = {
        "draft": patient | {"kv-redis": "always"},
        "target": patient | {"threads": 1, "kv-redis": "always"},
        "orchestrator": patient | LIMITS | {"draft-timeout-seconds": 30, "planner": "fixed"},
    }
    with LocalStack(bundle, redis_url=redis_server.url, log_folder=log_folder, flags=flags) as stack:
        yield stack


@pytest.fixture
def stack(redis_url: str, shared_stack: LocalStack) -> LocalStack:
    """The shared stack over an empty Redis."""
    return shared_stack


@pytest.fixture
def owned() -> Iterator[ExitStack]:
    """Resources that are released at the end of the test, also after a failure."""
    with ExitStack() as owned:
        yield owned


@pytest.fixture
def client(stack: LocalStack) -> Iterator[Client]:
    with Client(stack.address) as client:
        yield client
