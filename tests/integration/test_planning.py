"""The planner on real services: it learns what passes cost, predicts, and changes no list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import pytest

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import random_history
from tests.serving import Client, assert_same_list, until


@pytest.fixture(scope="module")
def planning(shared_stack: LocalStack, log_folder: Path) -> Iterator[Client]:
    """An orchestrator that plans by what it learns, before the shared stack's models."""
    flags = cast("Mapping[str, object]", shared_stack.orchestrators[0].flags)
    service = ServiceProcess("orchestrator", {**flags, "planner": "adaptive"}, log_folder / "planning.log")
    service.start()
    try:
        with Client(service.address) as client:
            yield client
    finally:
        service.stop()


def test_plans_are_decided_by_what_passes_cost(planning: Client, catalogue: Catalogue) -> None:
    """On any machine: once the curves are known, every reply has its expected and predicted times."""
    history = random_history(catalogue, 6, 1)
    until(lambda: planning.recommend(history).statistics.target_predicted_ms > 0)
    for seed in range(30):
        history = random_history(catalogue, 1 + seed % 8, seed)
        strict = planning.recommend(history, k=10)
        assert_same_list(strict, planning.recommend(history, k=10, mode=pb.MODE_TARGET_ONLY))
        took = strict.statistics
        assert took.expected_passes >= 1
        assert took.expected_ms > 0
        assert took.target_predicted_ms > 0
        assert took.nodes_drafted <= took.nodes_proposed <= took.nodes_asked
        assert (took.draft_predicted_ms > 0) == (took.draft_passes > 0) == (took.nodes_asked > 0)
