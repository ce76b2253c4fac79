"""The recommender in one process gives the lists of the services, and their errors."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.errors import BundleError
from atspeed.engine.model import tree_evaluator
from atspeed.engine.model.invariance import Moved
from atspeed.engine.search.mode import Mode
from atspeed.local.recommender import Recommender, RecommenderOptions
from atspeed.local.stack import LocalStack
from atspeed_client import CallError, DegradedReason, Recommendation, RecommendRequest, UsageError
from atspeed_client import Client as PythonClient
from orchestrator.planning.planner import PlanLimits, PlannerKind
from tests.bundles import random_history, write_bundle
from tests.corrupt_models import corrupt, next_in_line
from tests.oracles.models import Models
from tests.serving import WINDOW

# As the services of these tests: plans that no timing decides.
OPTIONS = RecommenderOptions(
    threads=1, warm_up_seconds=0, max_history_items=60, plan_limits=PlanLimits(kind=PlannerKind.FIXED, patience=10_000)
)
HISTORIES = 12
K = 4


@pytest.fixture(scope="module")
def recommender(bundle: Path) -> Iterator[Recommender]:
    with Recommender(bundle, OPTIONS) as recommender:
        yield recommender


@pytest.fixture
def client(stack: LocalStack) -> Iterator[PythonClient]:
    with PythonClient(stack.address, timeout_seconds=60) as client:
        yield client


def assert_same_list(reply: Recommendation, expected: Recommendation) -> None:
    """Equal items in equal order, with the same scores bit for bit."""
    assert [(item.item_id, item.score) for item in reply.items] == [
        (item.item_id, item.score) for item in expected.items
    ]


@pytest.fixture(scope="module")
def histories(catalogue: Catalogue) -> list[list[str]]:
    return [random_history(catalogue, 1 + seed % 10, seed) for seed in range(HISTORIES)]


OPTIONS_OF_REQUESTS: list[dict[str, Any]] = [
    {},
    {"exclude_seen": True},
    {"beam_widths": [7, 12, 20], "k": 20},
    *({"mode": mode, "seed": 5} for mode in (Mode.EXACT_SAMPLING, Mode.RELAXED_SAMPLING)),
]


class TestLists:
    @pytest.mark.parametrize("options", OPTIONS_OF_REQUESTS)
    def test_equal_the_services(
        self, client: PythonClient, recommender: Recommender, histories: list[list[str]], options: dict[str, Any]
    ) -> None:
        for history in histories:
            request = RecommendRequest(history=history, **options)
            assert_same_list(recommender.send(request), client.send(request))

    def test_without_the_draft(
        self, client: PythonClient, bundle: Path, recommender: Recommender, histories: list[list[str]]
    ) -> None:
        with Recommender(bundle, RecommenderOptions(threads=1, draft=False, warm_up_seconds=0)) as alone:
            for history in histories:
                request = RecommendRequest(history=history)
                reply = alone.send(request)
                assert_same_list(reply, client.send(request))
                assert reply.statistics.draft_passes == 0

    def test_of_many_requests_come_in_their_order(self, recommender: Recommender, histories: list[list[str]]) -> None:
        requests = [RecommendRequest(history=history, mode=Mode.TARGET_ONLY) for history in histories * 3]
        alone = [recommender.send(request) for request in requests[:HISTORIES]] * 3
        for reply, expected in zip(recommender.recommend_many(iter(requests), concurrency=5), alone, strict=True):
            assert isinstance(reply, Recommendation)
            assert_same_list(reply, expected)

    def test_of_many_requests_fail_alone(self, recommender: Recommender, histories: list[list[str]]) -> None:
        asked = [histories[0], ["no such item"], histories[1]]
        outcomes = list(recommender.recommend_many(RecommendRequest(history=history) for history in asked))
        assert [type(outcome) for outcome in outcomes] == [
            Recommendation,
            CallError,
            Recommendation,
        ]

    def test_restricted(self, recommender: Recommender, histories: list[list[str]]) -> None:
        """Exclusions and allow-lists: the list without them, filtered."""
        for history in histories[:4]:
            whole = recommender.recommend(history, k=20).item_ids
            assert recommender.recommend(history, k=20, allowed=whole[3:9]).item_ids == whole[3:9]
            assert not set(whole[:5]) & set(recommender.recommend(history, k=20, excluded=whole[:5]).item_ids)

    def test_say_what_served_them(
        self, recommender: Recommender, client: PythonClient, histories: list[list[str]]
    ) -> None:
        reply = recommender.recommend(histories[0])
        assert reply.versions == client.info().versions
        assert reply.statistics.target_passes >= 1
        assert reply.exactness.exact
        assert not reply.degraded

    def test_are_not_called_exact_where_the_check_at_the_load_finds_another_bit(
        self, bundle: Path, histories: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Replies on a machine whose kernels give other bits are not `exact`."""
        found = Moved(trees=1, nodes=9, moved=1, largest=1e-6)
        monkeypatch.setattr(tree_evaluator, "check_invariance", lambda *_, **__: found)
        with Recommender(bundle, RecommenderOptions(threads=1, draft=False, warm_up_seconds=0)) as elsewhere:
            reply = elsewhere.recommend(histories[0])
        assert reply.items
        assert not reply.exactness.exact


class TestCallers:
    def test_threads(self, recommender: Recommender, histories: list[list[str]]) -> None:
        expected = [recommender.recommend(history) for history in histories]
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(lambda history: recommender.recommend(history), histories))
        for reply, one in zip(replies, expected, strict=True):
            assert_same_list(reply, one)

    def test_a_running_event_loop(self, recommender: Recommender, histories: list[list[str]]) -> None:
        """A notebook's cell runs inside a loop."""

        async def cell() -> list[str]:
            return recommender.recommend(histories[0]).item_ids

        assert asyncio.run(cell()) == recommender.recommend(histories[0]).item_ids

    def test_many_given_up_in_the_middle(self, recommender: Recommender, histories: list[list[str]]) -> None:
        """The rest is cancelled, and the recommender serves on."""
        lists = recommender.recommend_many(RecommendRequest(history=history) for history in histories)
        first = next(lists)
        assert isinstance(first, Recommendation)
        lists.close()
        assert_same_list(recommender.recommend(histories[0]), first)


class TestErrors:
    def test_a_stored_user(self, recommender: Recommender) -> None:
        with pytest.raises(CallError, match=r"UNIMPLEMENTED: user_id: .* give the history"):
            recommender.send(RecommendRequest("alice"))

    def test_a_history_without_a_known_item(self, recommender: Recommender) -> None:
        with pytest.raises(CallError, match=r"history: none of its 1 history items is in the catalogue"):
            recommender.recommend(["no such item"])

    def test_a_limit(self, recommender: Recommender) -> None:
        with pytest.raises(CallError, match=r"history: has 61 items, at most 60 are allowed"):
            recommender.recommend(["item-1"] * 61)

    def test_a_folder_without_a_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=r"manifest\.json"):
            Recommender(tmp_path)

    def test_no_time_left(self, bundle: Path, histories: list[list[str]]) -> None:
        options = RecommenderOptions(threads=1, warm_up_seconds=0, timeout_seconds=1e-6)
        with Recommender(bundle, options) as hurried, pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
            hurried.recommend(histories[0])

    def test_a_closed_recommender(self, bundle: Path) -> None:
        closed = Recommender(bundle, OPTIONS)
        closed.close()
        closed.close()
        with pytest.raises(UsageError, match="the recommender is closed"):
            closed.recommend(["item-1"])
        with pytest.raises(UsageError, match="the recommender is closed"):
            closed.diagnose(RecommendRequest(history=["item-1"]))


def test_a_planned_code_without_numbers(tmp_path: Path, catalogue: Catalogue) -> None:
    """A plan never decides whether there is a list: it is searched again without the plan."""
    whole = Models.load(write_bundle(tmp_path / "whole", catalogue, max_items=WINDOW))
    corrupted = asyncio.run(next_in_line(whole, K, 2 * K))
    with Recommender(whole.bundle.root, OPTIONS) as healthy:
        expected = [healthy.recommend(history, k=K, beam_width=K) for history in corrupted.histories]
    shutil.copytree(whole.bundle.root, tmp_path / "corrupt")
    corrupt(tmp_path / "corrupt", "target", [corrupted.token])
    with Recommender(tmp_path / "corrupt", OPTIONS) as sick:
        replies = [sick.recommend(history, k=K, beam_width=K) for history in corrupted.histories]
        for reply, one in zip(replies, expected, strict=True):
            assert_same_list(reply, one)
        assert any(DegradedReason.PLAN_UNANSWERED in reply.degraded_reasons for reply in replies)
        with pytest.raises(CallError, match=r"UNAVAILABLE: .* gives no list"):
            sick.recommend(corrupted.histories[0], k=2 * K, beam_width=2 * K, mode=Mode.TARGET_ONLY)
