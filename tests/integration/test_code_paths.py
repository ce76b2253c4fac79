"""Lists of code paths with scored tails, unequal lengths, shared tokens and shared paths, through real services."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from atspeed.engine.search.scoring import ScoringRule
from atspeed.local.stack import LocalStack
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import types_pb2
from tests.bundles import TestBundle, random_history, shared_tokens, write_bundle
from tests.catalogues import tailed_catalogue
from tests.oracles.naive_search import naive_beam_search
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.sequence_model import SequenceModel
from tests.serving import ROUNDING, Client, assert_same_list, ids

PER_PATH = 2
CATALOGUE = tailed_catalogue(120, (7, 6, 5), seed=3)
NAIVE = NaiveTrie(
    {CATALOGUE.id_of(item): tuple(CATALOGUE.codes[item].tolist()) for item in range(CATALOGUE.items)},
    CATALOGUE.trie.codebook_sizes,
)
HISTORIES = [random_history(CATALOGUE, 2 + seed, seed) for seed in range(4)]
NO_LIMIT = 1000  # of a path; more than there are items


@pytest.fixture(scope="module", params=["llama", "t5"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    root: Path = tmp_path_factory.mktemp("paths")
    tokens = shared_tokens(CATALOGUE)
    return write_bundle(
        root,
        CATALOGUE,
        architecture=request.param,
        rule=ScoringRule.CODES,
        code_tokens=tokens,
        items_per_path=PER_PATH,
    )


@pytest.fixture(scope="module")
def served(made: TestBundle) -> Iterator[Client]:
    flags: dict[str, dict[str, object]] = {"orchestrator": {"planner": "fixed", "draft-timeout-seconds": 30}}
    with LocalStack(made.root, flags=flags) as stack, Client(stack.address) as client:
        yield client


def in_order(path: tuple[int, ...]) -> list[str]:
    """The items of a path as the catalogue ranks them."""
    return [CATALOGUE.id_of(item) for item in range(CATALOGUE.items) if tuple(CATALOGUE.codes[item]) == path]


def naive_list(made: TestBundle, history: Sequence[str], widths: list[int], limit: int) -> list[tuple[str, float]]:
    """The list from its definition: whole passes over plain sequences, and beam search over padded paths."""
    entry = made.bundle.manifest.target
    prompt = entry.prompt.tokens(CATALOGUE.spelled_tokens(CATALOGUE.find(history), entry.code_tokens))
    model = SequenceModel(made.target, NAIVE, entry.code_tokens, prompt, ScoringRule.CODES)
    leaves = naive_beam_search(NAIVE, model, widths, NAIVE.alive)[-1]
    return [(item, score) for path, score in leaves for item in in_order(path)[:limit]]


@pytest.mark.parametrize("history", HISTORIES)
def test_lists_are_those_of_the_naive_search(served: Client, made: TestBundle, history: list[str]) -> None:
    for widths in ([3], [10], [30], [2, 7, 12], [6, 3, 9, 20]):
        expected = naive_list(made, history, widths, PER_PATH)[: widths[-1]]
        for mode in (pb.MODE_TARGET_ONLY, pb.MODE_STRICT):
            reply = served.recommend(history, k=widths[-1], beam_widths=widths, mode=mode)
            assert ids(reply) == [item for item, _ in expected]
            assert [item.score for item in reply.items] == pytest.approx([s for _, s in expected], abs=ROUNDING)
            assert reply.scoring_rule == types_pb2.SCORING_RULE_CODES
            assert reply.exactness.exact


@pytest.mark.parametrize("history", HISTORIES)
def test_every_exact_policy_lists_the_same_with_and_without_a_draft(served: Client, history: list[str]) -> None:
    alone = served.recommend(history, k=10, mode=pb.MODE_TARGET_ONLY)
    for mode in (pb.MODE_STRICT, pb.MODE_TOLERANCE):
        assert_same_list(served.recommend(history, k=10, mode=mode), alone)
    drawn = served.recommend(history, k=5, beam_width=40, mode=pb.MODE_EXACT_SAMPLING, seed=3)
    assert ids(served.recommend(history, k=5, beam_width=5, mode=pb.MODE_EXACT_SAMPLING, seed=3)) == ids(drawn)
    relaxed = served.recommend(history, k=10, mode=pb.MODE_RELAXED_SAMPLING, seed=3)
    assert not relaxed.degraded
    assert len(set(ids(relaxed))) == len(relaxed.items) > 0


def test_replies_hold_the_codes_before_the_tail_and_count_the_items_of_a_path(served: Client) -> None:
    reply = served.recommend(HISTORIES[0], k=40, beam_width=40)
    lengths = set()
    for item in reply.items:
        (index,) = CATALOGUE.find([item.item_id])
        (codes,) = CATALOGUE.spelled_codes(np.array([index]))
        assert list(item.code_path) == codes.tolist()
        assert item.path_items == len(in_order(tuple(CATALOGUE.codes[index])))
        lengths.add(len(codes))
    assert lengths == {1, 2, 3}
    assert max(item.path_items for item in reply.items) > PER_PATH


def test_the_service_tells_the_form_of_its_paths(served: Client) -> None:
    """Counted in the paths themselves."""
    info, paths = served.info(), set(map(tuple, CATALOGUE.codes.tolist()))
    lengths = {len(CATALOGUE.spelled_codes(np.array([item]))[0]) for item in range(CATALOGUE.items)}
    assert info.items_per_path == PER_PATH
    assert (info.catalogue_items, info.catalogue_paths) == (CATALOGUE.items, len(paths))
    assert list(info.level_sizes) == CATALOGUE.tail_start.tolist()
    assert (info.shortest_path, info.longest_path) == (min(lengths), max(lengths))
    assert info.scores_tail


def test_a_request_may_set_its_own_limit_of_items_per_path(served: Client, made: TestBundle) -> None:
    for limit in (1, 3, NO_LIMIT):
        reply = served.recommend(HISTORIES[1], k=30, beam_width=30, items_per_path=limit)
        assert ids(reply) == [item for item, _ in naive_list(made, HISTORIES[1], [30], limit)][:30]


def test_excluded_items_do_not_count_against_the_limit(served: Client) -> None:
    whole = served.recommend(HISTORIES[2], k=30, beam_width=30, items_per_path=NO_LIMIT)
    shared = next(item for item in whole.items if item.path_items > PER_PATH)
    (index,) = CATALOGUE.find([shared.item_id])
    first, *rest = in_order(tuple(CATALOGUE.codes[index]))
    limited = served.recommend(HISTORIES[2], k=30, beam_width=30, excluded_item_ids=[first])
    assert [item for item in ids(limited) if item in rest] == rest[:PER_PATH]


def test_a_list_that_the_limit_shortens_says_so(served: Client) -> None:
    paths = len(set(NAIVE.items.values()))
    reply = served.recommend(HISTORIES[0], k=100, beam_width=100, items_per_path=1)
    assert len(reply.items) == paths < 100
    assert list(reply.fewer_than_k_reasons) == [pb.FEWER_THAN_K_REASON_ITEMS_PER_PATH]
    assert (
        reply.fewer_than_k_description == f"only {paths} of 100 items came out of the search, at most 1 of a code path"
    )
