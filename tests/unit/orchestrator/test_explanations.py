"""Explanations against the naive search: every node, every place of an absent item, and the wider list."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.bundle.titles import Titles
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.scoring import ScoringRule
from atspeed.errors import ResourceExhaustedError
from atspeed.rpc.admission import Admission, Admitted, Priority
from orchestrator.explanation.absent_items import Slot
from orchestrator.explanation.explain import ExplainParams, explain
from orchestrator.explanation.explanation import (
    Explanation,
    ItemExplanation,
    ItemOutcome,
    NodeOrigin,
    SearchNode,
    Stage,
)
from orchestrator.explanation.recording import Recording
from orchestrator.explanation.search_tree import search_tree
from orchestrator.recommend import Recommender
from orchestrator.recommendation import RecommendParams
from tests.oracles.naive_search import naive_beam_search, width_of
from tests.oracles.naive_trie import Path as CodePath
from tests.oracles.served_tables import SECONDS, Tailed, ask, expected, items_of, served, tailed
from tests.oracles.worlds import World, run_now
from tests.profiles import either

EVALUATED = {NodeOrigin.ROOT, NodeOrigin.DRAFTED, NodeOrigin.PREFETCHED, NodeOrigin.RECOVERED}
Levels = list[list[tuple[CodePath, float]]]


class Case(NamedTuple):
    """A recommender, what it stands on, and a request."""

    made: Tailed
    service: Recommender
    target: World
    draft: World
    params: RecommendParams
    limit: int | None
    wider: int

    def alive(self, path: CodePath) -> bool:
        return self.made.naive.alive(path, self.refused, self.params.allowed or None)

    @property
    def refused(self) -> set[str]:
        return {*self.params.excluded, *((self.params.history or ()) if self.params.exclude_seen else ())}

    def levels(self, widths: tuple[int, ...]) -> Levels:
        """The beams of every level by the naive search; none at all if no item is left."""
        if not any(self.alive(path) for path in self.made.naive.items.values()):
            return []
        return naive_beam_search(self.made.naive, self.target.model, widths, self.alive)

    def explained(self, items: list[str]) -> Explanation:
        return run_now(self.explanation(items, slots()))

    async def explanation(self, items: list[str], slot: Slot) -> Explanation:
        asked = ExplainParams(self.params, items, self.wider)
        recording, deadline = Recording(), Deadline(SECONDS)
        recording.admitted()
        listed = await self.service.recommend(self.params, deadline, opened=recording.opened)
        return await explain(self.service, asked, listed, recording.ended(), slot, deadline)


def slots(*, taken: int = 0) -> Slot:
    """The slots of a service with one, of which other calls may hold some."""
    admission = Admission(1, 0)
    admission.running = taken
    return lambda: admission.slot(Priority.INTERACTIVE)


@asynccontextmanager
async def waited() -> AsyncIterator[Admitted]:
    """A slot that was not free at once."""
    yield Admitted(waited=True)


def case(seed: int, rule: ScoringRule, agreement: float | None) -> Case:
    rng = np.random.default_rng(seed)
    made, limit = tailed(rng), [None, 1, 2][rng.integers(3)]
    service, target, draft = served(made, rule, seed, limit, agreement, nodes=rng.choice([0.4, 1.0, 3.0]))
    widths = BeamWidths.of(*rng.integers(1, 7, rng.integers(1, made.naive.levels + 1)).tolist())
    ids = sorted(made.naive.items)
    excluded, allowed = (rng.permutation(ids)[: rng.integers(most)].tolist() for most in (4, len(ids)))
    params = RecommendParams(
        k=int(rng.integers(1, widths.at(made.naive.levels) + 1)),
        beam_widths=widths,
        history=rng.permutation(ids)[:3].tolist(),
        excluded=excluded,
        allowed=allowed if rng.random() < 0.3 else (),
        exclude_seen=bool(rng.random() < 0.3),
        items_per_path=[None, None, 1, 3][rng.integers(4)],
    )
    return Case(made, service, target, draft, params, limit, wider=int(rng.integers(widths.largest, 15)))


seeds, rules = st.integers(0, 2**32 - 2), st.sampled_from(ScoringRule)
agreements = st.sampled_from([None, 0.0, 0.7, 1.0])


@settings(max_examples=either(8, 300))
@given(seeds, rules, agreements)
def test_the_list_is_that_of_recommend_and_the_tree_is_that_of_the_naive_search(
    seed: int, rule: ScoringRule, agreement: float | None
) -> None:
    one = case(seed, rule, agreement)
    listed = items_of(ask(one.service, one.params))
    for _ in range(3):  # the prefetch learns from earlier requests
        found = one.explained([])
        assert items_of(found.recommendation) == listed
        levels = one.levels(one.params.beam_widths.listed)
        paths = paths_of(found.tree.nodes)
        beams = {path: rank for level in levels for rank, (path, _) in enumerate(level, start=1)}
        assert {path: node.beam_rank for path, node in paths.items() if node.used} == beams
        for level in levels:
            assert {path: paths[path].score for path, _ in level} == dict(level)
        assert_probabilities(one, paths)
        assert_counts(found)


def paths_of(nodes: list[SearchNode] | tuple[SearchNode, ...] | object) -> dict[CodePath, SearchNode]:
    """The nodes by path, parents first."""
    assert isinstance(nodes, list | tuple)
    found: list[CodePath] = []
    for node in nodes:
        found.append((*found[node.parent], node.code) if node.parent >= 0 else ())
        assert len(found[-1]) == node.level
    assert len(set(found)) == len(found)
    return dict(zip(found, nodes, strict=True))


def assert_probabilities(one: Case, paths: dict[CodePath, SearchNode]) -> None:
    """p of all that the target returned, q of all that the draft proposed."""
    for path, node in paths.items():
        if path and node.log_p is not None:
            assert node.log_p == one.target.model(path[:-1], path[-1])
        if node.log_q is not None:
            assert node.origin is NodeOrigin.DRAFTED
            assert node.log_q == pytest.approx(one.draft.model(path[:-1], path[-1]), abs=1e-9)
        if node.used:
            assert node.log_p is not None
        assert (node.log_q is not None) == (node.origin is NodeOrigin.DRAFTED)


def assert_counts(found: Explanation) -> None:
    """The tree has as many nodes of each kind as the statistics say."""
    memo, counts, nodes = (
        found.recommendation.diagnostics.memo,
        found.recommendation.diagnostics.nodes,
        found.tree.nodes,
    )
    drafted = [node for node in nodes if node.origin is NodeOrigin.DRAFTED]
    prefetched = [node for node in nodes if node.origin is NodeOrigin.PREFETCHED]
    assert (len(drafted), sum(node.used for node in drafted)) == (counts.drafted, counts.used)
    assert (len(prefetched), sum(node.used for node in prefetched)) == (counts.prefetched, counts.prefetched_used)
    assert sum(node.origin is NodeOrigin.RECOVERED for node in nodes) == counts.recovered
    made = {node.pass_number for node in nodes if node.origin in EVALUATED}
    assert made - {0} == set(range(1, memo.passes + 1))
    assert 0 not in made or not nodes[0].pass_number  # the root needs no pass if it has one child
    assert not any(node.pass_number for node in nodes if node.origin is NodeOrigin.UNEVALUATED)
    assert [span.pass_number for span in found.stages if span.stage is Stage.PASS] == [*range(1, memo.passes + 1)]
    ends = [0, *(span.start_ns + span.duration_ns for span in found.stages)]
    assert [span.start_ns for span in found.stages] == ends[:-1]


@settings(max_examples=either(15, 400))
@given(seeds, rules, agreements)
def test_the_place_of_every_item_is_that_of_the_naive_search(
    seed: int, rule: ScoringRule, agreement: float | None
) -> None:
    one = case(seed, rule, agreement)
    ids = [*sorted(one.made.naive.items), "unheard of"]
    levels, wider = one.levels(one.params.beam_widths.listed), one.levels((one.wider,))
    unlimited = [item for item, *_ in listed(one, levels, 10**6)]
    among_wider = [item for item, *_ in listed(one, wider, one.wider)]
    for found in one.explained(ids).items:
        if found.item_id == "unheard of":
            assert (found.outcome, found.path, found.score) == (ItemOutcome.UNKNOWN_ITEM, (), None)
            continue
        path = one.made.naive.items[found.item_id]
        lost = next((n for n, level in enumerate(levels) if path[:n] not in dict(level)), 0)
        rank = unlimited.index(found.item_id) + 1 if found.item_id in unlimited else 0
        assert (found.lost_level, found.rank) == (lost, rank)
        assert found.outcome is outcome(one, found.item_id, lost, rank)
        assert_steps(one, found, path, levels, lost)
        if found.outcome is ItemOutcome.OUTSIDE_BEAM:
            expected_rank = among_wider.index(found.item_id) + 1 if found.item_id in among_wider else 0
            assert found.wider_rank == expected_rank


def listed(one: Case, levels: Levels, k: int) -> list[tuple[str, float, CodePath, int]]:
    params = replace(one.params, k=k, excluded=sorted(one.refused))
    return expected(one.made, levels[-1] if levels else [], params, one.limit)


def outcome(one: Case, item: str, lost: int, rank: int) -> ItemOutcome:
    if one.params.allowed and item not in one.params.allowed:
        return ItemOutcome.NOT_ALLOWED
    if item in one.params.excluded:
        return ItemOutcome.EXCLUDED
    if item in one.refused:
        return ItemOutcome.SEEN
    if lost:
        return ItemOutcome.OUTSIDE_BEAM
    if not rank:
        return ItemOutcome.ITEMS_PER_PATH
    return ItemOutcome.IN_LIST if rank <= one.params.k else ItemOutcome.BEYOND_K


def assert_steps(one: Case, found: ItemExplanation, path: CodePath, levels: Levels, lost: int) -> None:
    """Each prefix has its score, and its rank among all children of the beams above."""
    score = 0.0
    assert tuple(step.code for step in found.path) == path
    for level, step in enumerate(found.path, start=1):
        prefix = path[:level]
        score += one.target.model(prefix[:-1], prefix[-1])
        assert (step.score, step.beam_width) == (score, width_of(one.params.beam_widths.listed, level))
        if not levels or (lost and level > lost):
            assert step.rank == 0
            continue
        rivals = [
            (-(above + one.target.model(beam, code)), (*beam, code))
            for beam, above in levels[level - 1]
            for code in one.made.naive.children(beam)
            if one.alive((*beam, code))
        ]
        assert step.rank == 1 + sum(rival < (-score, prefix) for rival in rivals)
    assert found.score == score


@settings(max_examples=either(6, 100))
@given(seeds, st.sampled_from([Mode.EXACT_SAMPLING, Mode.RELAXED_SAMPLING, Mode.TOLERANCE]))
def test_modes_that_are_no_beam_search_have_a_tree_and_answers_too(seed: int, mode: Mode) -> None:
    one = case(seed, ScoringRule.TRIE, 0.7)
    sampling = {"seed": seed} if mode is not Mode.TOLERANCE else {"tolerance": 0.5}
    one = one._replace(params=replace(one.params, mode=mode, **sampling))
    found = one.explained(sorted(one.made.naive.items))
    nodes = paths_of(found.tree.nodes)
    for item in found.recommendation.items:
        leaf = one.made.naive.items[item.item_id]
        assert nodes[leaf].used
        assert item.item_id in nodes[leaf].item_ids
    in_list = {item.item_id for item in found.items if item.outcome is ItemOutcome.IN_LIST}
    assert in_list == {item.item_id for item in found.recommendation.items}


@settings(max_examples=either(8, 200))
@given(seeds, st.integers(1, 40))
def test_a_tree_that_does_not_fit_keeps_the_beams_and_the_most_probable_nodes(seed: int, limit: int) -> None:
    one = case(seed, ScoringRule.VOCAB, 0.0)
    recording = Recording()
    recording.admitted()
    recommendation = run_now(one.service.recommend(one.params, Deadline(SECONDS), opened=recording.opened))
    recorded = recording.ended()
    whole = search_tree(recommendation, recorded, one.service.catalogue)
    cut = search_tree(recommendation, recorded, one.service.catalogue, limit)
    assert len(cut.nodes) == min(limit, len(whole.nodes))
    assert len(cut.nodes) + cut.left_out == len(whole.nodes)
    kept, every = paths_of(cut.nodes), paths_of(whole.nodes)  # closed: every parent is there
    left_out = [node for path, node in every.items() if path not in kept]
    if any(node.used for node in left_out):
        assert all(node.used for node in kept.values())


def with_lost_items() -> tuple[Case, list[str]]:
    """A list with items that a wider beam may find."""
    one = next(one for seed in range(100) if lost_of(one := case(seed, ScoringRule.TRIE, 0.7)) and one.wider > 8)
    return one, lost_of(one)


def lost_of(one: Case) -> list[str]:
    found = one.explained(sorted(one.made.naive.items)).items
    return [item.item_id for item in found if item.outcome is ItemOutcome.OUTSIDE_BEAM]


def test_under_load_searches_for_absent_items_are_refused_like_other_calls() -> None:
    one, lost = with_lost_items()
    assert run_now(one.explanation([], slots(taken=1))).items == []
    assert run_now(one.explanation(["unheard of"], slots(taken=1))).wider_beam_width == 0
    with pytest.raises(ResourceExhaustedError, match="serves as many requests as it may"):
        run_now(one.explanation(lost, slots(taken=1)))


@pytest.mark.parametrize("least", [None, 1, 2])
def test_a_wider_list_that_had_to_wait_narrows_if_the_request_allows_it(least: int | None) -> None:
    one, lost = with_lost_items()
    one = one._replace(params=replace(one.params, k=1, beam_widths=BeamWidths.of(3), least_beam_width=least), wider=12)
    width = {None: 12, 1: 4, 2: 8}[least]
    found = run_now(one.explanation(lost, waited))
    narrow = one._replace(wider=width).explained(lost)
    assert (found.wider_beam_width, found.items) == (width, narrow.items)
    assert one.explained(lost).wider_beam_width == 12


def test_titles_are_those_of_the_items_that_the_reply_names() -> None:
    one = case(7, ScoringRule.TRIE, 1.0)
    catalogue = one.service.catalogue
    one.service.catalogue = catalogue.with_titles({item: f"Title of {item}" for item in one.made.naive.items})
    found = one.explained(["unheard of"])
    named = {*found.history_item_ids, *(item.item_id for item in found.recommendation.items)}
    assert found.titles == {item: f"Title of {item}" for item in named}
    assert one.params.history is not None
    assert list(found.history_item_ids) == list(one.params.history)


def test_items_without_a_title_are_left_out() -> None:
    one = case(7, ScoringRule.TRIE, 1.0)
    first, second = [one.service.catalogue.id_of(item) for item in range(2)]
    assert one.service.catalogue.titles_of([first]) == {}
    titled = one.service.catalogue.with_titles({first: "Amélie (2001)"})
    assert isinstance(titled.titles, Titles)
    assert titled.titles_of([first, second, "unheard of"]) == {first: "Amélie (2001)"}
    assert titled.version == one.service.catalogue.version


def test_a_request_that_is_not_explained_makes_no_call_of_an_explanation() -> None:
    """So it costs nothing: the same calls as ever, none of which is in the package."""
    one = case(7, ScoringRule.TRIE, 0.7)
    called: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _argument: object) -> None:
        called[Path(frame.f_code.co_filename).parent.name] += event == "call"

    def calls_of(work: Callable[[], object]) -> Counter[str]:
        called.clear()
        sys.setprofile(note)
        try:
            work()
        finally:
            sys.setprofile(None)
        return called.copy()

    assert calls_of(lambda: ask(one.service, one.params))["explanation"] == 0
    assert calls_of(lambda: one.explained([]))["explanation"] > 0
