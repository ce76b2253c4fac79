"""The demo's table, sentences and token tree, without services."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from atspeed.cli.demo.speed import PLAIN, STRICT, Pair, choice, compare, slower, speed_table
from atspeed.cli.demo.token_tree import TokenTree
from atspeed.engine.search.mode import Mode
from atspeed.local.recommender import Recommender, RecommenderOptions
from atspeed.training.data import Movie
from atspeed_client import Recommendation, RecommendRequest
from atspeed_client.reading import to_recommendation
from atspeed_client.v1 import recommendation_pb2 as pb
from orchestrator.planning.planner import PlanLimits, PlannerKind

BUNDLE = Path(__file__).parents[3] / "bundles" / "movielens-100k"


def reply(ms: float, passes: int, **statistics: float) -> Recommendation:
    times = pb.StageTimes(total_ms=ms)
    return to_recommendation(
        pb.RecommendResponse(statistics=pb.Statistics(target_passes=passes, stage_times=times, **statistics)),  # type: ignore[arg-type]
        "",
    )


def shown(*what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=120)
    for one in what:
        console.print(one)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def pair(strict_ms: float, *, asked: int) -> Pair:
    strict = reply(strict_ms, 1, nodes_asked=asked, expected_passes=1.25, expected_ms=31.0, nodes_prefetched=6)
    return Pair([reply(40.0, 3)] * 3, [strict] * 3)


def test_table_has_times_passes_and_nodes() -> None:
    text = shown(speed_table({5: pair(32.0, asked=24)}, "a title"))
    assert text.splitlines()[-2].split() == ["5", "40.0", "32.0", "1.25", "3.00", "1.00", "24"]


def test_the_choice_names_what_was_expected_and_measured() -> None:
    drafted = choice(5, pair(32.0, asked=24))
    assert "24 nodes from the draft" in drafted
    assert "1.2 of 3 target passes and 31 ms" in drafted
    assert "(measured 32, plain 40 ms)" in drafted
    assert "no draft" in (alone := choice(5, pair(39.0, asked=0)))
    assert "prefetches: 6.0 a list" in alone


def test_a_loss_is_said() -> None:
    assert not slower({1: pair(40.0, asked=1)})
    assert not slower({1: pair(40.1, asked=1)})
    assert "K = 5, 10%." in slower({1: pair(39.0, asked=1), 5: pair(44.0, asked=0)})


async def test_modes_take_turns_after_lists_that_are_not_counted() -> None:
    """Every user in both modes, as often in first place as in second."""
    asked: list[tuple[int, Mode, int]] = []

    async def ask(user: int, mode: Mode, k: int) -> Recommendation:
        asked.append((user, mode, k))
        return reply(float(len(asked)), 1)

    pairs = await compare(ask, 4, (1, 5), 2)
    counted = asked[-2 * 2 * 4 * 2 :]
    assert {mode for _, mode, _ in asked[: -len(counted)]} == {STRICT}
    for k in (1, 5):
        assert len(pairs[k].plain) == len(pairs[k].strict) == 8
        order = [mode for _, mode, width in counted if width == k]
        assert [order[index : index + 2].count(PLAIN) for index in range(0, 16, 2)] == [1] * 8
        assert order[::2].count(PLAIN) == 4


@pytest.fixture(scope="module")
def tree() -> TokenTree:
    """A search with a fixed plan on the shipped bundle."""
    options = RecommenderOptions(threads=1, warm_up_seconds=0, plan_limits=PlanLimits(kind=PlannerKind.FIXED))
    with Recommender(BUNDLE, options) as recommender:
        ids = [recommender.catalogue.id_of(item) for item in range(recommender.catalogue.items)]
        movies = {item: Movie(f"Movie {number}", 1990, ()) for number, item in enumerate(ids) if number % 2}
        history = [ids[3], ids[7]]
        found = recommender.diagnose(RecommendRequest(history=history, k=4, beam_width=4))
        assert [item.item_id for item in found.items] == recommender.recommend(history, k=4, beam_width=4).item_ids
        return TokenTree(found, recommender.catalogue, movies)


def test_tree_shows_every_evaluated_node_and_the_whole_list(tree: TokenTree) -> None:
    memo, text = tree.found.diagnostics.memo, shown(tree.drawn())
    assert sum("── " in line for line in text.splitlines()) == len(memo.evaluated) - 1
    for place, item in enumerate(tree.found.items, start=1):
        title = tree.movies[item.item_id].title if item.item_id in tree.movies else item.item_id
        assert f"{place}. {title}" in text


def test_counts_are_those_of_the_search(tree: TokenTree) -> None:
    """The table's columns against the memo's own counts."""
    rows = [line.split() for line in shown(tree.counts()).splitlines()]
    numbers = np.array([row[1:] for row in rows if row and row[0].isdigit()], dtype=int)
    used, wasted, prefetched_used, prefetched_wasted, missed, _ = numbers.sum(axis=0).tolist()
    nodes = tree.found.diagnostics.nodes
    assert (used, used + wasted) == (nodes.used, nodes.drafted)
    assert prefetched_used == nodes.prefetched_used
    assert prefetched_used + prefetched_wasted == nodes.prefetched
    assert missed == nodes.recovered
    assert numbers.sum() == len(tree.found.diagnostics.memo.evaluated) - 1
