"""Recommend and RecommendBatch as a client meets them: what is refused and how, and what a reply says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import types_pb2

from client.local_stack import LocalStack, ServiceProcess
from engine.bundle import read_manifest, write_manifest
from engine.catalogue import Catalogue
from tests.bundles import random_history
from tests.integration.conftest import LIMITS
from tests.serving import (
    LEVELS,
    LIVENESS_SECONDS,
    RECOMMENDATION,
    WINDOW,
    Client,
    assert_same_list,
    ids,
    recovered,
    refused,
    request_of,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
MODES = [
    pb.MODE_TARGET_ONLY,
    pb.MODE_STRICT,
    pb.MODE_TOLERANCE,
    pb.MODE_RELAXED_SAMPLING,
    pb.MODE_EXACT_SAMPLING,
]
SAMPLING = [pb.MODE_RELAXED_SAMPLING, pb.MODE_EXACT_SAMPLING]
PLAIN = [mode for mode in MODES if mode not in SAMPLING]
LONG = "x" * 257
NAN = math.nan


@pytest.fixture(scope="session")
def history(catalogue: Catalogue) -> list[str]:
    return random_history(catalogue, WINDOW, seed=5)


@pytest.fixture(scope="module")
def lenient(
    bundle: Path, shared_stack: LocalStack, tmp_path_factory: pytest.TempPathFactory, log_folder: Path
) -> Iterator[Client]:
    """An orchestrator whose bundle allows an empty history, before the same models."""
    root = tmp_path_factory.mktemp("lenient")
    (root / "catalogue").symlink_to(bundle / "catalogue")
    write_manifest(root, read_manifest(bundle).model_copy(update={"allow_empty_history": True}))
    flags = shared_stack.orchestrators[0].flags | {"bundle": root}
    service = ServiceProcess("orchestrator", flags, log_folder / "lenient.log")
    service.start()
    with Client(service.address) as client:
        yield client
    service.stop()


def numbered(count: int) -> list[str]:
    return [f"unknown-{n}" for n in range(count)]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("k", {"k": 0}),
    ("k", {"k": LIMITS["max-k"] + 1}),
    ("k", {"k": 2**32 - 1}),
    ("beam_width", {"k": 5, "beam_width": 4}),
    ("least_beam_width", {"k": 5, "beam_width": 9, "least_beam_width": 4}),
    ("least_beam_width", {"k": 5, "beam_width": 9, "least_beam_width": 10}),
    ("priority", {"priority": 9}),
    ("beam_width", {"beam_width": LIMITS["max-beam-width"] + 1}),
    ("mode", {"mode": 6}),
    ("mode", {"mode": -1}),
    ("tolerance", {"mode": pb.MODE_TOLERANCE, "tolerance": -0.1}),
    ("tolerance", {"mode": pb.MODE_TOLERANCE, "tolerance": NAN}),
    ("tolerance", {"mode": pb.MODE_TOLERANCE, "tolerance": math.inf}),
    *[("tolerance", {"mode": mode, "tolerance": 0.1}) for mode in MODES if mode != pb.MODE_TOLERANCE],
    *[("temperature", {"mode": mode, "temperature": value}) for mode in SAMPLING for value in (0.0, -1.0, NAN, 1e9)],
    *[("temperature", {"mode": mode, "temperature": 1.0}) for mode in PLAIN],
    ("temperature", {"temperature": 1.0}),
    *[("seed", {"mode": mode, "seed": 0}) for mode in PLAIN],
    ("excluded_item_ids", {"excluded_item_ids": numbered(LIMITS["max-candidate-items"] + 1)}),
    ("allowed_item_ids", {"allowed_item_ids": numbered(LIMITS["max-candidate-items"] + 1)}),
    ("excluded_item_ids[1]", {"excluded_item_ids": ["item-1", LONG]}),
    ("allowed_item_ids[1]", {"allowed_item_ids": ["item-1", LONG]}),
    ("allowed_item_ids[0]", {"allowed_item_ids": [""]}),
    ("tenant", {"tenant": LONG}),
    ("tenant", {"tenant": "é" * 129}),
]
SUBJECTS: list[tuple[grpc.StatusCode, str, dict[str, Any]]] = [
    (INVALID, "subject", {}),
    (INVALID, "history", {"history": pb.History()}),
    (INVALID, "history", {"history": pb.History(item_ids=["nobody-knows", "this-either"])}),
    (INVALID, "history", {"history": pb.History(item_ids=["item-1"] * (LIMITS["max-history-items"] + 1))}),
    (INVALID, "history[1]", {"history": pb.History(item_ids=["item-1", LONG])}),
    (INVALID, "history[0]", {"history": pb.History(item_ids=["", "item-1"])}),
    (INVALID, "user_id", {"user_id": ""}),
    (INVALID, "user_id", {"user_id": LONG}),
    (grpc.StatusCode.NOT_FOUND, "user_id", {"user_id": "nobody"}),
]


class TestRefused:
    """Every refusal names its field, and the call after it is served."""

    @pytest.mark.parametrize(("field", "fields"), REFUSED, ids=[f"{f}-{n}" for n, (f, _) in enumerate(REFUSED)])
    def test_a_bad_field(self, client: Client, history: list[str], field: str, fields: dict[str, Any]) -> None:
        with refused(INVALID, field):
            client.recommend(history, **fields)
        assert len(client.recommend(history).items) == 5

    @pytest.mark.parametrize(("code", "field", "subject"), SUBJECTS)
    def test_a_bad_subject(
        self, client: Client, history: list[str], code: grpc.StatusCode, field: str, subject: dict[str, Any]
    ) -> None:
        with refused(code, field):
            client.recommend(**subject)
        assert len(client.recommend(history).items) == 5

    def test_a_stored_history_of_unknown_items_only(self, client: Client, history: list[str]) -> None:
        client.record("user", ["nobody-knows", "this-either"])
        with refused(INVALID, "user_id"):
            client.recommend(user_id="user")
        client.record("user", history)
        assert len(client.recommend(user_id="user").items) == 5

    def test_a_message_beyond_the_limit(self, client: Client, history: list[str]) -> None:
        """The transport itself refuses it, so no field is named."""
        with pytest.raises(grpc.RpcError) as refusal:
            client.recommend(history, tenant="x" * 33_600_000)
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(client.recommend(history).items) == 5

    @pytest.mark.parametrize("method", ["Recommend", "RecommendBatch", "RecordEvents", "GetHistory", "ForgetUser"])
    @pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05ab", b"\x0a\x01\xff", b"\x1a\xff\xff\xff\xff\x0f"])
    def test_bytes_that_are_no_message(self, client: Client, history: list[str], method: str, data: bytes) -> None:
        """The answer is ours, without a word from the protobuf library."""
        path = f"/{RECOMMENDATION}/{method}"
        call: Any = client.channel.unary_stream if method == "RecommendBatch" else client.channel.unary_unary
        with pytest.raises(grpc.RpcError) as refusal:
            list(call(path)(data, timeout=LIVENESS_SECONDS))
        assert refusal.value.code() is INVALID
        assert refusal.value.details() == "request: not a valid message of this method"
        assert len(client.recommend(history).items) == 5

    def test_a_batch_that_is_too_large(self, client: Client, history: list[str]) -> None:
        with refused(INVALID, "requests"):
            client.batch([request_of(history)] * (LIMITS["max-batch"] + 1))
        assert len(client.batch([request_of(history)] * LIMITS["max-batch"])) == LIMITS["max-batch"]


class TestHistories:
    def test_unknown_items_are_skipped_and_listed(self, client: Client, history: list[str]) -> None:
        reply = client.recommend(["ghost", *history[:2], "phantom", *history[2:], "ghost"])
        assert list(reply.unknown_history_item_ids) == ["ghost", "phantom", "ghost"]
        assert reply.history_items_used == len(history)
        assert_same_list(reply, client.recommend(history))

    def test_only_the_window_counts(self, client: Client, catalogue: Catalogue) -> None:
        """A history longer than the window is served with its newest items: the list is the window's own."""
        long = random_history(catalogue, LIMITS["max-history-items"], seed=9)
        reply = client.recommend(long)
        assert reply.history_items_used == WINDOW
        assert reply.statistics.prompt_tokens == 2 + WINDOW * LEVELS
        assert_same_list(reply, client.recommend(long[-WINDOW:]))
        assert ids(reply) != ids(client.recommend(long[:WINDOW]))

    def test_a_short_history_is_used_whole(self, client: Client, history: list[str]) -> None:
        reply = client.recommend(history[:3])
        assert reply.history_items_used == 3
        assert reply.statistics.prompt_tokens == 2 + 3 * LEVELS

    def test_a_stored_history_gives_the_list_of_the_same_inline(self, client: Client, history: list[str]) -> None:
        client.record("user", history)
        assert_same_list(client.recommend(user_id="user"), client.recommend(history))

    def test_a_history_has_an_order(self, client: Client, history: list[str]) -> None:
        assert ids(client.recommend(history, k=10)) != ids(client.recommend(history[::-1], k=10))

    def test_without_any_where_the_bundle_allows_it(
        self, lenient: Client, client: Client, stack: LocalStack, history: list[str]
    ) -> None:
        """An unknown user, an empty history and one of unknown items only are then the same: an empty prompt."""
        assert lenient.info().allows_empty_history
        replies = [
            lenient.recommend(user_id="nobody"),
            lenient.recommend([]),
            lenient.recommend(["nobody-knows"]),
        ]
        assert [list(reply.unknown_history_item_ids) for reply in replies] == [[], [], ["nobody-knows"]]
        for reply in replies:
            assert reply.history_items_used == 0
            assert reply.statistics.prompt_tokens == 2
            assert len(reply.items) == 5
            assert_same_list(reply, replies[0])
        assert_same_list(lenient.recommend(history), client.recommend(history))


class TestModes:
    @pytest.mark.parametrize("seed", range(6))
    def test_strict_is_the_targets_own_list(self, client: Client, catalogue: Catalogue, seed: int) -> None:
        history = random_history(catalogue, 3 + seed, seed)
        alone = client.recommend(history, k=20, mode=pb.MODE_TARGET_ONLY)
        for mode in (pb.MODE_UNSPECIFIED, pb.MODE_STRICT, pb.MODE_TOLERANCE):
            reply = client.recommend(history, k=20, mode=mode)
            assert_same_list(reply, alone)
            assert reply.exactness.exact
            assert reply.exactness.largest_slack == 0

    def test_replies_name_the_mode_and_the_rule(self, client: Client, history: list[str]) -> None:
        replies = {mode: client.recommend(history, mode=mode) for mode in (pb.MODE_UNSPECIFIED, *MODES)}
        assert {mode: reply.mode for mode, reply in replies.items()} == {
            pb.MODE_UNSPECIFIED: pb.MODE_STRICT,
            **{mode: mode for mode in MODES},
        }
        assert {reply.scoring_rule for reply in replies.values()} == {types_pb2.SCORING_RULE_VOCAB}
        assert not any(reply.degraded or reply.degraded_reasons for reply in replies.values())
        assert [replies[mode].exactness.exact for mode in MODES] == [True, True, True, False, True]

    @pytest.mark.parametrize("tolerance", [0.5, 3.0, 100.0])
    def test_tolerance_reports_the_slack_that_it_used(
        self, client: Client, catalogue: Catalogue, tolerance: float
    ) -> None:
        """A list that differs from the strict one says by how much a beam gave way, and never by more than allowed."""
        for seed in range(5):
            history = random_history(catalogue, 6, seed)
            reply = client.recommend(history, k=10, beam_width=10, mode=pb.MODE_TOLERANCE, tolerance=tolerance)
            assert 0 <= reply.exactness.largest_slack <= tolerance
            assert reply.exactness.exact or reply.exactness.largest_slack > 0
            strict = client.recommend(history, k=10, beam_width=10)
            assert reply.statistics.target_passes <= strict.statistics.target_passes
            if reply.exactness.exact:
                assert_same_list(reply, strict)

    @pytest.mark.parametrize("mode", SAMPLING)
    def test_a_seed_fixes_the_list(self, client: Client, history: list[str], mode: pb.Mode.ValueType) -> None:
        lists = {
            seed: [ids(client.recommend(history, mode=mode, seed=seed, k=10)) for _ in range(2)]
            for seed in (0, 1, 2, 2**64 - 1)
        }
        assert all(first == second for first, second in lists.values())
        assert len({tuple(first) for first, _ in lists.values()}) > 1

    @pytest.mark.parametrize("mode", SAMPLING)
    def test_a_fresh_seed_is_returned_and_reproduces(
        self, client: Client, history: list[str], mode: pb.Mode.ValueType
    ) -> None:
        first, second = (client.recommend(history, mode=mode) for _ in range(2))
        assert first.HasField("seed")
        assert first.seed != second.seed
        again = client.recommend(history, mode=mode, seed=first.seed)
        assert again.seed == first.seed
        assert ids(again) == ids(first)

    def test_other_modes_return_no_seed(self, client: Client, history: list[str]) -> None:
        assert not any(client.recommend(history, mode=mode).HasField("seed") for mode in PLAIN)

    def test_exact_sampling_does_not_depend_on_the_draft(self, client: Client, history: list[str]) -> None:
        """Draft and target share the noise, so a colder draw of the same seed is another list, and a wider beam the same."""
        wide = client.recommend(history, mode=pb.MODE_EXACT_SAMPLING, seed=7, k=5, beam_width=60)
        narrow = client.recommend(history, mode=pb.MODE_EXACT_SAMPLING, seed=7, k=5, beam_width=5)
        assert ids(wide) == ids(narrow)

    def test_a_cold_sample_begins_greedily(self, client: Client, history: list[str]) -> None:
        """Close to temperature 0 every step takes its likeliest code, whatever the seed."""
        cold = [
            client.recommend(history, mode=pb.MODE_EXACT_SAMPLING, seed=seed, temperature=0.01).items[0]
            for seed in range(4)
        ]
        assert len({item.item_id for item in cold}) == 1
        warm = [
            client.recommend(history, mode=pb.MODE_EXACT_SAMPLING, seed=seed, temperature=10).items[0]
            for seed in range(4)
        ]
        assert len({item.item_id for item in warm}) > 1


class TestReply:
    def test_ranks_scores_and_paths(self, client: Client, catalogue: Catalogue, history: list[str]) -> None:
        reply = client.recommend(history, k=30, beam_width=60)
        assert [item.rank for item in reply.items] == list(range(1, 31))
        scores = [item.score for item in reply.items]
        assert scores == sorted(scores, reverse=True)
        assert len(set(ids(reply))) == 30
        for item in reply.items:
            (index,) = catalogue.find([item.item_id])
            assert index >= 0
            assert tuple(item.code_path) == tuple(catalogue.codes[index])
            assert item.origin in (pb.ORIGIN_DRAFTED, pb.ORIGIN_RECOVERED, pb.ORIGIN_FORCED)

    def test_fewer_asked_is_a_beginning_of_more(self, client: Client, history: list[str]) -> None:
        many = client.recommend(history, k=20, beam_width=30)
        assert ids(client.recommend(history, k=3, beam_width=30)) == ids(many)[:3]

    def test_options_leave_parts_out(self, client: Client, history: list[str]) -> None:
        full = client.recommend(history)
        no_paths = client.recommend(history, reply_options=pb.ReplyOptions(omit_code_paths=True))
        assert not any(item.code_path for item in no_paths.items)
        assert no_paths.HasField("statistics")
        no_statistics = client.recommend(history, reply_options=pb.ReplyOptions(omit_statistics=True))
        assert not no_statistics.HasField("statistics")
        assert all(item.code_path for item in no_statistics.items)
        assert ids(full) == ids(no_paths) == ids(no_statistics)

    def test_versions_are_those_of_the_models_that_answered(self, client: Client, history: list[str]) -> None:
        info = client.info()
        backends = {backend.name: backend for backend in info.backends}
        target, draft = backends["target"].model, backends["draft"].model
        reply = client.recommend(history)
        assert reply.versions == info.versions
        assert reply.versions.target_model == target.model_version
        assert reply.versions.draft_model == draft.model_version
        assert {reply.versions.catalogue} == {target.catalogue_version, draft.catalogue_version}
        assert client.recommend(history, mode=pb.MODE_TARGET_ONLY).versions.draft_model == ""

    def test_the_service_says_what_it_is(self, client: Client, catalogue: Catalogue) -> None:
        info = client.info()
        assert (info.catalogue_items, info.levels, info.history_window) == (catalogue.items, LEVELS, WINDOW)
        assert (info.max_k, info.max_beam_width) == (LIMITS["max-k"], LIMITS["max-beam-width"])
        assert sorted(info.modes) == sorted(MODES)
        assert not info.allows_empty_history
        assert {backend.name: backend.available for backend in info.backends} == {
            "target": True,
            "draft": True,
            "redis": True,
        }
        assert info.started_at.seconds > 0


class TestCandidates:
    def test_items_of_one_path_stand_together(self, client: Client, catalogue: Catalogue, history: list[str]) -> None:
        """They share their score and path, and stand in the order of their ids."""
        leaves, counts = np.unique(catalogue.leaf_of(np.arange(catalogue.items)), return_counts=True)
        shared = [[catalogue.id_of(item) for item in catalogue.items_of(leaf)] for leaf in leaves[counts > 1]]
        assert shared
        allowed = list(itertools.chain.from_iterable(shared))
        reply = client.recommend(history, k=len(allowed), beam_width=len(allowed), allowed_item_ids=allowed)
        assert sorted(ids(reply)) == sorted(allowed)
        assert reply.fewer_than_k_reason == ""
        for group in shared:
            items = [item for item in reply.items if item.item_id in group]
            assert [item.item_id for item in items] == sorted(group, key=str.encode)
            assert len({item.score for item in items}) == 1
            assert [item.rank for item in items] == list(range(items[0].rank, items[0].rank + len(group)))

    def test_a_shared_path_can_be_cut_in_two(self, client: Client, catalogue: Catalogue, history: list[str]) -> None:
        """k and exclusions count items, not paths."""
        leaves, counts = np.unique(catalogue.leaf_of(np.arange(catalogue.items)), return_counts=True)
        group = [catalogue.id_of(item) for item in catalogue.items_of(leaves[counts > 1][0])]
        assert ids(client.recommend(history, k=1, allowed_item_ids=group)) == group[:1]
        assert ids(client.recommend(history, k=1, allowed_item_ids=group, excluded_item_ids=group[:1])) == group[1:2]

    @pytest.mark.parametrize("mode", MODES)
    def test_seen_items_are_left_out(self, client: Client, history: list[str], mode: pb.Mode.ValueType) -> None:
        likely = ids(client.recommend(history, k=10))
        seen = likely[:4]
        reply = client.recommend([*seen, *history], k=20, exclude_seen=True, mode=mode)
        assert len(reply.items) == 20
        assert not set(ids(reply)) & {*seen, *history}

    def test_seen_means_the_whole_history_not_only_the_window(self, client: Client, history: list[str]) -> None:
        likely = ids(client.recommend(history, k=10))
        assert not set(likely) & set(ids(client.recommend([*likely, *history], k=20, exclude_seen=True)))

    @pytest.mark.parametrize("mode", MODES)
    def test_excluded_items_are_left_out(self, client: Client, history: list[str], mode: pb.Mode.ValueType) -> None:
        out = ids(client.recommend(history, k=10))[::2]
        reply = client.recommend(history, k=10, excluded_item_ids=[*out, "unknown"], mode=mode)
        assert len(reply.items) == 10
        assert not set(out) & set(ids(reply))

    def test_exclusion_changes_no_score(self, client: Client, history: list[str]) -> None:
        """What is left keeps its order and its scores: nothing is renormalised."""
        before = client.recommend(history, k=20, beam_width=100)
        out = ids(before)[:3]
        after = client.recommend(history, k=17, beam_width=100, excluded_item_ids=out)
        assert ids(after) == ids(before)[3:]
        assert [item.score for item in after.items] == pytest.approx([i.score for i in before.items][3:], abs=1e-3)

    @pytest.mark.parametrize("mode", MODES)
    def test_only_allowed_items(
        self, client: Client, catalogue: Catalogue, history: list[str], mode: pb.Mode.ValueType
    ) -> None:
        allowed = sorted(set(random_history(catalogue, 12, seed=3)))
        reply = client.recommend(history, k=30, allowed_item_ids=[*allowed, "unknown"], mode=mode)
        assert sorted(ids(reply)) == allowed
        assert reply.fewer_than_k_reason == f"only {len(allowed)} of 30 items are left after exclusions and filters"

    @pytest.mark.parametrize("mode", MODES)
    def test_nothing_left_is_an_empty_list_and_no_error(
        self, client: Client, history: list[str], mode: pb.Mode.ValueType
    ) -> None:
        for fields in (
            {"allowed_item_ids": ["item-1"], "excluded_item_ids": ["item-1"]},
            {"allowed_item_ids": ["unknown"]},
            {"allowed_item_ids": history, "exclude_seen": True},
        ):
            reply = client.recommend(history, mode=mode, **fields)
            assert ids(reply) == []
            assert reply.fewer_than_k_reason.startswith("only 0 of 5 items")
            assert reply.statistics.target_passes == 0
            assert not reply.degraded

    def test_all_that_can_be_found_is_a_full_list(self, client: Client, history: list[str]) -> None:
        assert client.recommend(history, k=50, beam_width=100).fewer_than_k_reason == ""


class TestStatistics:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("seed", range(4))
    def test_agree_with_each_other(
        self, client: Client, catalogue: Catalogue, mode: pb.Mode.ValueType, seed: int
    ) -> None:
        reply = client.recommend(random_history(catalogue, 2 + 2 * seed, seed), k=10, mode=mode)
        statistics, times = reply.statistics, reply.statistics.stage_times
        assert 1 <= statistics.target_passes <= LEVELS
        assert statistics.accepted_levels == max(0, LEVELS - statistics.target_passes)
        assert statistics.nodes_used <= statistics.nodes_drafted
        assert statistics.target_retries == 0
        assert (statistics.nodes_recovered > 0) == (statistics.target_passes > 1)
        assert statistics.memory_cached_tokens + statistics.redis_cached_tokens < statistics.prompt_tokens
        assert times.history_ns + times.draft_ns + times.target_ns + times.selection_ns == times.total_ns
        assert 0 < times.target_forward_ns <= times.target_ns
        if mode == pb.MODE_TARGET_ONLY:
            assert (statistics.draft_passes, statistics.nodes_drafted, times.draft_ns) == (0, 0, 0)
            assert statistics.target_passes == LEVELS
        else:
            assert statistics.draft_passes >= LEVELS - 1
            assert statistics.nodes_drafted > 0
            assert 0 < times.draft_forward_ns <= times.draft_ns

    def test_origins_agree_with_what_was_recovered(self, client: Client, catalogue: Catalogue) -> None:
        for seed in range(6):
            history = random_history(catalogue, 5, seed)
            drafted = client.recommend(history, k=20)
            if drafted.statistics.nodes_recovered == 0:
                assert pb.ORIGIN_RECOVERED not in {item.origin for item in drafted.items}
            alone = client.recommend(history, k=20, mode=pb.MODE_TARGET_ONLY)
            assert {item.origin for item in alone.items} == {pb.ORIGIN_RECOVERED}

    def test_forced_items_had_no_alternative(self, client: Client, catalogue: Catalogue) -> None:
        trie, forced = catalogue.trie, 0
        for seed in range(4):
            reply = client.recommend(random_history(catalogue, 5, seed), k=20)
            for item in reply.items:
                above = trie.find(item.code_path[:-2])
                assert above is not None
                if item.origin == pb.ORIGIN_FORCED:
                    forced += 1
                    assert trie.child_count[above] == 1
        assert forced > 0

    def test_speculation_saves_passes(self, client: Client, catalogue: Catalogue) -> None:
        replies = [client.recommend(random_history(catalogue, 6, seed), k=5, beam_width=5) for seed in range(8)]
        assert sum(reply.statistics.accepted_levels for reply in replies) > 0
        assert sum(reply.statistics.nodes_used for reply in replies) > 0

    def test_a_repeated_prompt_comes_from_memory(self, client: Client, catalogue: Catalogue) -> None:
        history = random_history(catalogue, WINDOW, seed=1001)
        first, second = (client.recommend(history) for _ in range(2))
        assert (first.statistics.memory_cached_tokens, first.statistics.redis_cached_tokens) == (0, 0)
        blocks = (second.statistics.prompt_tokens - 1) // LEVELS
        assert (second.statistics.memory_cached_tokens, second.statistics.redis_cached_tokens) == (LEVELS * blocks, 0)
        assert_same_list(second, first)

    def test_one_more_item_is_all_that_is_computed(self, client: Client, catalogue: Catalogue) -> None:
        """And what follows the last item: this bundle's prompts begin with one token and end with another."""
        history = random_history(catalogue, WINDOW, seed=1004)
        client.recommend(history[:-1])
        longer = client.recommend(history).statistics
        assert longer.prompt_tokens - longer.memory_cached_tokens == 1 + LEVELS + 1

    def test_tenants_share_no_cache(self, client: Client, catalogue: Catalogue) -> None:
        history = random_history(catalogue, WINDOW, seed=1002)
        replies = [client.recommend(history, tenant=tenant) for tenant in ("one", "other", "one")]
        assert [reply.statistics.memory_cached_tokens for reply in replies] == [0, 0, 4 * WINDOW]
        for reply in replies:
            assert_same_list(reply, replies[0])

    def test_after_a_restart_of_the_target_a_prompt_comes_from_redis(
        self, stack: LocalStack, client: Client, catalogue: Catalogue
    ) -> None:
        history = random_history(catalogue, WINDOW, seed=1003)
        before = client.recommend(history)
        (target,) = stack.targets
        target.stop()
        target.start()
        after = recovered(client, history)
        assert (after.statistics.memory_cached_tokens, after.statistics.redis_cached_tokens) == (0, 4 * WINDOW)
        assert_same_list(after, before)


class TestBatch:
    def test_every_request_gets_its_own_answer(self, client: Client, catalogue: Catalogue) -> None:
        histories = [random_history(catalogue, 1 + n % 8, seed=n) for n in range(LIMITS["max-batch"])]
        results = client.batch([request_of(history, k=1 + n) for n, history in enumerate(histories)])
        assert sorted(results) == list(range(len(histories)))
        for n, history in enumerate(histories):
            assert_same_list(results[n].response, client.recommend(history, k=1 + n))

    def test_one_failure_is_its_own(self, client: Client, history: list[str]) -> None:
        requests = [
            request_of(history),
            request_of(history, k=0),
            request_of(user_id="nobody"),
            pb.RecommendRequest(k=1),
            request_of(history),
        ]
        results = client.batch(requests)
        assert {index: result.WhichOneof("result") for index, result in results.items()} == {
            0: "response",
            1: "error",
            2: "error",
            3: "error",
            4: "response",
        }
        codes = {index: (results[index].error.code, results[index].error.message.split(":")[0]) for index in (1, 2, 3)}
        assert codes == {1: (3, "k"), 2: (5, "user_id"), 3: (3, "subject")}
        assert_same_list(results[0].response, results[4].response)

    def test_what_is_ready_does_not_wait(self, client: Client, catalogue: Catalogue, history: list[str]) -> None:
        """Requests that fail at once come back before an earlier one that has to be computed."""
        slow = request_of(random_history(catalogue, WINDOW, seed=77), k=50, beam_width=100)
        call = client.stub.RecommendBatch(
            pb.RecommendBatchRequest(requests=[slow, request_of(history, k=0)]), timeout=LIVENESS_SECONDS
        )
        assert [answer.index for answer in call] == [1, 0]

    def test_an_empty_batch_is_an_empty_answer(self, client: Client) -> None:
        assert client.batch([]) == {}


class TestDeadlines:
    @pytest.mark.parametrize("seconds", [0.0001, 0.001])
    def test_too_little_time_is_an_end_not_a_fault(self, client: Client, history: list[str], seconds: float) -> None:
        """The caller learns that its time was over; whoever asks next is served."""
        for _ in range(10):
            with pytest.raises(grpc.RpcError) as late:
                client.recommend(history, timeout=seconds, k=50, beam_width=100)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(client.recommend(history).items) == 5

    def test_a_cancelled_call_leaves_nothing_behind(self, client: Client, catalogue: Catalogue) -> None:
        history = random_history(catalogue, 4, seed=78)
        calls = [client.stub.Recommend.future(request_of(history), timeout=LIVENESS_SECONDS) for _ in range(10)]
        for call in calls:
            call.cancel()
        assert len(client.recommend(history).items) == 5
