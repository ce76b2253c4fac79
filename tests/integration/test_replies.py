"""Replies of each mode: the list, its items, the effect of exclusions, and statistics."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import redis

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.local.stack import LocalStack
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import types_pb2
from tests.bundles import random_history
from tests.integration.conftest import LIMITS
from tests.serving import LEVELS, MODES, PLAIN, SAMPLING, WINDOW, Client, assert_same_list, ids, recovered


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
        """A list that differs from the strict one has the largest slack of its beams, never more than allowed."""
        for seed in range(5):
            history = random_history(catalogue, 6, seed)
            reply = client.recommend(history, k=10, beam_width=10, mode=pb.MODE_TOLERANCE, tolerance=tolerance)
            assert 0 <= reply.exactness.largest_slack <= tolerance
            assert reply.exactness.exact or reply.exactness.largest_slack > 0
            strict = client.recommend(history, k=10, beam_width=10, mode=pb.MODE_TOLERANCE, tolerance=0.0)
            assert reply.statistics.target_passes <= strict.statistics.target_passes
            if reply.exactness.exact:
                assert_same_list(reply, strict)

    @pytest.mark.parametrize("mode", SAMPLING)
    def test_a_seed_fixes_the_list(self, client: Client, history: list[str], mode: pb.Mode.ValueType) -> None:
        lists = {
            seed: [ids(client.recommend(history, mode=mode, seed=seed, k=10)) for _ in range(2)]
            for seed in (0, 1, 2, 2**63 - 1)
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
        assert (info.shortest_path, info.longest_path, info.scores_tail) == (LEVELS, LEVELS, False)
        assert (list(info.level_sizes), info.items_per_path) == (list(catalogue.trie.codebook_sizes), 0)
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
        assert list(reply.fewer_than_k_reasons) == []
        assert reply.fewer_than_k_description == ""
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

    def test_ids_that_the_catalogue_does_not_know_are_counted(self, client: Client, history: list[str]) -> None:
        """Misspelt exclusions and allow-lists change nothing, so the reply is the only place that shows them."""
        excluded, allowed = ["item-1", "ghost", "ghost"], ["item-2", "item-3", "phantom"]
        reply = client.recommend(history, excluded_item_ids=excluded, allowed_item_ids=allowed, exclude_seen=True)
        assert (reply.unknown_excluded_items, reply.unknown_allowed_items) == (2, 1)
        plain = client.recommend(history, exclude_seen=True)
        assert (plain.unknown_excluded_items, plain.unknown_allowed_items) == (0, 0)
        nothing = client.recommend(history, allowed_item_ids=["phantom"])
        assert (nothing.unknown_allowed_items, list(nothing.items)) == (1, [])

    def test_exclusion_changes_no_score(self, client: Client, history: list[str]) -> None:
        """The remaining items keep their order and their scores: nothing is renormalised."""
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
        assert list(reply.fewer_than_k_reasons) == [pb.FEWER_THAN_K_REASON_FILTERED]
        assert (
            reply.fewer_than_k_description == f"only {len(allowed)} of 30 items are left after exclusions and filters"
        )

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
            assert reply.fewer_than_k_description.startswith("only 0 of 5 items")
            assert reply.statistics.target_passes == 0
            assert not reply.degraded

    def test_all_that_can_be_found_is_a_full_list(self, client: Client, history: list[str]) -> None:
        assert client.recommend(history, k=50, beam_width=100).fewer_than_k_description == ""


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
        assert sum(statistics.cached_tokens.values()) < statistics.prompt_tokens
        parts = (times.history_ms, times.draft_ms, times.target_ms, times.selection_ms)
        assert sum(parts) == pytest.approx(times.total_ms, abs=1e-5)
        assert 0 < times.target_forward_ms <= times.target_ms
        if mode == pb.MODE_TARGET_ONLY:
            assert (statistics.draft_passes, statistics.nodes_drafted, times.draft_ms) == (0, 0, 0)
            assert statistics.target_passes == LEVELS
        else:
            assert statistics.draft_passes >= LEVELS - 1
            assert statistics.nodes_drafted > 0
            assert 0 < times.draft_forward_ms <= times.draft_ms

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
        assert (first.statistics.cached_tokens["memory"], first.statistics.cached_tokens["redis"]) == (0, 0)
        blocks = (second.statistics.prompt_tokens - 1) // LEVELS
        assert (second.statistics.cached_tokens["memory"], second.statistics.cached_tokens["redis"]) == (
            LEVELS * blocks,
            0,
        )
        assert_same_list(second, first)

    def test_one_more_item_is_all_that_is_computed(self, client: Client, catalogue: Catalogue) -> None:
        """Besides the item its suffix is computed: this bundle's prompts begin with one token and end with another."""
        history = random_history(catalogue, WINDOW, seed=1004)
        client.recommend(history[:-1])
        longer = client.recommend(history).statistics
        assert longer.prompt_tokens - longer.cached_tokens["memory"] == 1 + LEVELS + 1

    def test_tenants_share_no_cache(self, client: Client, catalogue: Catalogue) -> None:
        history = random_history(catalogue, WINDOW, seed=1002)
        replies = [client.recommend(history, tenant=tenant) for tenant in ("one", "other", "one")]
        assert [reply.statistics.cached_tokens["memory"] for reply in replies] == [0, 0, 4 * WINDOW]
        for reply in replies:
            assert_same_list(reply, replies[0])

    def test_after_a_restart_of_the_target_a_prompt_comes_from_redis(
        self, redis_url: str, stack: LocalStack, client: Client, catalogue: Catalogue
    ) -> None:
        with redis.Redis.from_url(redis_url) as store:
            # After a failure of Redis, maybe one that an earlier test made, the target leaves it out for a second.
            for seed in range(2000, 2020):
                history = random_history(catalogue, WINDOW, seed)
                before = client.recommend(history, mode=pb.MODE_TARGET_ONLY)  # so that the draft writes nothing
                assert sum(before.statistics.cached_tokens.values()) == 0
                time.sleep(0.5)  # it is written after the reply
                if store.dbsize():
                    break
        (target,) = stack.targets
        target.stop()
        target.start()
        after = recovered(client, history)
        assert (after.statistics.cached_tokens["memory"], after.statistics.cached_tokens["redis"]) == (0, 4 * WINDOW)
        assert_same_list(after, before)
