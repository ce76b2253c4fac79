"""Explain over real services, and what both clients and the command make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pytest

from atspeed.local.stack import LocalStack
from atspeed_client import AsyncClient, CallError, Explanation, ItemOutcome, NodeOrigin, RecommendRequest, Stage
from atspeed_client import Client as PythonClient
from tests.command_line import run


def narrow(history: list[str], *, exclude_seen: bool = False, excluded: Sequence[str] = ()) -> RecommendRequest:
    """A list of ten from as many beams."""
    return RecommendRequest(history=history, k=10, beam_width=10, exclude_seen=exclude_seen, excluded=excluded)


@pytest.fixture
def client(stack: LocalStack) -> Iterator[PythonClient]:
    with PythonClient(stack.address, timeout_seconds=60) as client:
        yield client


@pytest.fixture
def ranked(client: PythonClient, history: list[str]) -> list[str]:
    """The target's own list of forty."""
    return client.recommend(history=history, k=40, beam_width=100, mode="target-only").item_ids


def test_the_list_of_an_explanation_is_the_list(client: PythonClient, history: list[str]) -> None:
    request = narrow(history)
    listed, found = client.send(request), client.explain(request)
    assert [(item.item_id, item.score) for item in found.response.items] == [
        (item.item_id, item.score) for item in listed.items
    ]
    assert found.response.exactness.exact
    assert (found.items, found.wider_beam_width, found.nodes_left_out) == ((), 0, 0)
    assert list(found.history_item_ids) == history
    assert_whole(found)


def assert_whole(found: Explanation) -> None:
    """The nodes agree with the list and the statistics of the same reply."""
    nodes, took = found.nodes, found.response.statistics
    assert nodes[0].origin is NodeOrigin.ROOT
    assert all(node.parent < place for place, node in enumerate(nodes))
    assert sum(node.origin is NodeOrigin.DRAFTED for node in nodes) == took.nodes_drafted
    assert sum(node.origin is NodeOrigin.RECOVERED for node in nodes) == took.nodes_recovered
    assert sum(node.origin is NodeOrigin.PREFETCHED for node in nodes) == took.nodes_prefetched
    leaves = {item: node for node in nodes for item in node.item_ids}
    assert {item.item_id: item.score for item in found.response.items} == {
        item: node.score for item, node in leaves.items()
    }
    passes = [span for span in found.stages if span.stage is Stage.PASS]
    assert [span.pass_number for span in passes] == [*range(1, took.target_passes + 1)]
    assert all(span.forward_ms > 0 for span in passes)
    last = found.stages[-1]
    assert last.start_ms + last.duration_ms >= took.stage_times.total_ms


def test_the_item_of_rank_25_was_lost_by_a_beam_of_ten(
    client: PythonClient, history: list[str], ranked: list[str]
) -> None:
    """Its rank in the wider list is its rank, and the level that lost it kept ten others that are better there."""
    request = narrow(history)
    (found,) = client.explain(request, items=[ranked[24]], wider_beam_width=100).items
    assert found.wider_rank == 25
    assert found.outcome in {ItemOutcome.OUTSIDE_BEAM, ItemOutcome.BEYOND_K}
    if found.outcome is ItemOutcome.OUTSIDE_BEAM:
        lost = found.path[found.lost_level - 1]
        assert (lost.rank > 10, lost.beam_width) == (True, 10)
        assert f"level {found.lost_level}" in found.description
    (alone,) = client.recommend(history=history, k=1, allowed=[ranked[24]], mode="target-only").items
    assert found.score == alone.score


def test_other_reasons_have_their_names(client: PythonClient, history: list[str], ranked: list[str]) -> None:
    first, third, *_ = [item for item in ranked if item not in history]
    request = narrow(history, exclude_seen=True, excluded=[first])
    second = client.send(request).item_ids[-1]
    asked = [first, history[0], second, "item-of-yesterday"]
    outcomes = [item.outcome for item in client.explain(request, items=asked).items]
    assert outcomes == [ItemOutcome.EXCLUDED, ItemOutcome.SEEN, ItemOutcome.IN_LIST, ItemOutcome.UNKNOWN_ITEM]
    request = RecommendRequest(history=history, allowed=[first], k=1)
    (found,) = client.explain(request, items=[third]).items
    assert found.outcome is ItemOutcome.NOT_ALLOWED
    assert client.explain(request, items=[third]).wider_beam_width == 0


def test_a_stored_user_is_explained_like_the_same_history(client: PythonClient, history: list[str]) -> None:
    client.record("alice", history)
    by_user = client.explain(RecommendRequest("alice", k=10, beam_width=10))
    by_history = client.explain(narrow(history))
    assert by_user.response.items == by_history.response.items
    assert by_user.history_item_ids == by_history.history_item_ids


async def test_the_async_client_explains_too(stack: LocalStack, history: list[str]) -> None:
    async with AsyncClient(stack.address, timeout_seconds=60) as client:
        assert_whole(await client.explain(RecommendRequest(history=history, k=3)))


@pytest.mark.parametrize(
    ("items", "width", "problem"),
    [
        (["a"] * 17, 0, "item_ids: has 17 items, at most 16 are allowed"),
        ([], 9, "wider_beam_width: must be between 10 and 100, got 9"),
        ([], 101, "wider_beam_width: must be between 10 and 100, got 101"),
    ],
)
def test_a_wrong_request_names_the_field(
    client: PythonClient, history: list[str], items: list[str], width: int, problem: str
) -> None:
    with pytest.raises(CallError, match=problem):
        client.explain(narrow(history), items=items, wider_beam_width=width)


def test_the_command_draws_the_search_and_says_why_not(
    stack: LocalStack, history: list[str], ranked: list[str]
) -> None:
    call = ["recommend", "--history", ",".join(history), "--k", 10, "--beam-width", 10, "--address", stack.address]
    shown = run(*call, "--explain", "--why-not", ranked[24])
    assert shown.exit_code == 0, shown.output
    for part in ("root", "pass 1", "time in ms", "history", "selection", f"{ranked[24]}: the search", "rank 25 of"):
        assert part in shown.stdout
    plain = run(*call, "--why-not", ranked[24]).stdout
    assert "time in ms" not in plain
    assert "level 1: code" in plain
    read = json.loads(run(*call, "--explain", "--json").stdout)
    assert read["nodes"][0]["origin"] == "root"
    mistaken = run(*call, "--why-not", "")
    assert mistaken.exit_code == 2
    assert "needs at least one item id" in mistaken.output
