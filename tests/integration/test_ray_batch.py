"""Lists of a batch as a Ray Data job, on a cluster of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atspeed.batch.ray_lists import lists_of
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.recommender import Recommender, RecommenderOptions
from tests.bundles import random_history

ray: Any = pytest.importorskip("ray")
pytest.importorskip("ray.data")
pytestmark = [
    pytest.mark.long,  # a cluster and two workers take half a minute to start
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of Ray itself
]
USERS = 600  # more than two workers take at once


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
class TestTwoWorkers:
    def test_every_user_has_the_list_of_target_only_search(self, bundle: Path, catalogue: Catalogue) -> None:
        histories = {
            f"user {number}": random_history(catalogue, 1 + number % 5, number % 20) for number in range(USERS)
        }
        users = ray.data.from_items([{"user_id": user, "history": history} for user, history in histories.items()])
        rows = lists_of(users, bundle, {"k": 7}, workers=2, threads=1).take_all()
        assert sorted(row["user_id"] for row in rows) == sorted(histories)
        found = {row["user_id"]: list(row["item_ids"]) for row in rows}
        with Recommender(bundle, RecommenderOptions(threads=1, warm_up_seconds=0)) as recommender:
            for user in list(histories)[:20]:
                alone = recommender.recommend(histories[user], k=7, mode="target-only")
                assert found[user] == alone.item_ids

    def test_a_user_without_a_list_says_why(self, bundle: Path) -> None:
        users = ray.data.from_items([{"user_id": "stranger", "history": ["no such item"]}])
        (row,) = lists_of(users, bundle, {"k": 7}, workers=1, threads=1).take_all()
        assert row["error"].startswith("INVALID_ARGUMENT: history: none of its 1 history items")
        assert list(row["item_ids"]) == []
