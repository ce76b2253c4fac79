"""A draft that ends, hangs or sends invalid replies costs passes, never a list (method, section 4)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.trie import Trie
from atspeed.local.stack import LocalStack
from atspeed.rpc import wire
from atspeed.v1 import draft_pb2, types_pb2
from atspeed.v1 import recommendation_pb2 as pb
from tests.faults.conftest import Case, asking, assert_all_right
from tests.serving import (
    LEVELS,
    Client,
    FakeDraft,
    PlanAnswer,
    empty_plan,
    ids,
    resume,
    storm,
    suspend,
    until,
)


def array(values: Any, dtype: str) -> types_pb2.Array:
    return wire.to_array(np.asarray(values, dtype=dtype))


def plan(proposed: Any, believed: Any = None, /, **fields: Any) -> draft_pb2.PlanResponse:
    """A reply as an honest draft would spell it, whatever it holds."""
    node = np.asarray(proposed, dtype=np.int32)
    return draft_pb2.PlanResponse(
        **{
            "nodes": array(node, "int32"),
            "scores": array(np.zeros(node.shape) if believed is None else believed, "float64"),
            "margins": array(np.zeros(node.shape), "float64"),
            "model_version": "fake",
            **fields,
        }
    )


def saying(reply: draft_pb2.PlanResponse | bytes) -> PlanAnswer:
    data = reply if isinstance(reply, bytes) else reply.SerializeToString()
    return lambda request, context: data


def failing(code: grpc.StatusCode, details: str) -> PlanAnswer:
    def answer(request: draft_pb2.PlanRequest, context: grpc.ServicerContext) -> bytes:
        context.abort(code, details)
        raise AssertionError("unreachable")

    return answer


class TestStopped:
    def degraded_then_well(
        self, client: Client, cases: list[Case], breaks: Callable[[], object], mends: Callable[[], object]
    ) -> None:
        """All lists are right before, during and after the fault, and replies are degraded only during it."""
        assert not client.recommend(cases[0].history).degraded
        replies = storm(asking(client, cases * 2), {8: breaks})
        assert_all_right(replies, cases * 2)
        degraded = [reply for reply in replies if reply.degraded]
        assert 0 < len(degraded) < len(replies)
        for reply in degraded:
            assert blames_the_draft(reply)
            assert reply.statistics.nodes_recovered > 0
        mends()
        until(lambda: not client.recommend(cases[0].history).degraded)
        until(lambda: self.plans_are_used(client, cases[:6]))

    def plans_are_used(self, client: Client, cases: list[Case]) -> bool:
        """Return true if one of these lists, all of them right, used a node of a plan."""
        replies = storm(asking(client, cases), {})
        assert_all_right(replies, cases)
        return any(reply.statistics.nodes_used for reply in replies)

    def test_killed(self, stack: LocalStack, client: Client, cases: list[Case]) -> None:
        (draft,) = stack.drafts
        self.degraded_then_well(client, cases, draft.kill, draft.start)

    def test_hanging(self, stack: LocalStack, client: Client, cases: list[Case]) -> None:
        (draft,) = stack.drafts
        self.degraded_then_well(client, cases, lambda: suspend(draft), lambda: resume(draft))

    def test_drained(self, stack: LocalStack, client: Client, cases: list[Case]) -> None:
        """A draft that is stopped in order takes part until it is gone."""
        (draft,) = stack.drafts
        replies = storm(asking(client, cases * 2), {8: draft.stop})
        assert_all_right(replies, cases * 2)
        assert client.recommend(cases[0].history).degraded
        assert {backend.name: backend.available for backend in client.info().backends}["draft"] is False

    def test_every_mode_answers_without_it(self, stack: LocalStack, client: Client, cases: list[Case]) -> None:
        history = cases[0].history
        sampled = client.recommend(history, mode=pb.MODE_EXACT_SAMPLING, seed=5)
        (draft,) = stack.drafts
        draft.kill()
        for mode in (pb.MODE_STRICT, pb.MODE_TOLERANCE, pb.MODE_RELAXED_SAMPLING, pb.MODE_EXACT_SAMPLING):
            reply = client.recommend(history, mode=mode)
            assert (len(reply.items), reply.degraded) == (5, True)
            assert reply.versions.draft_model == ""
        alone = client.recommend(history, mode=pb.MODE_TARGET_ONLY)
        assert not alone.degraded
        assert ids(client.recommend(history, mode=pb.MODE_EXACT_SAMPLING, seed=5)) == ids(sampled)


def deep_orphans(trie: Trie) -> list[int]:
    return list(range(int(trie.level_start[2]), int(trie.level_start[2]) + 5))


def lone_evaluation(trie: Trie, **wrong: types_pb2.Array) -> types_pb2.Evaluation:
    """The root's children, with fields exchanged."""
    children = trie.children(0)
    parts = {
        "node": array([0], "int32"),
        "child_start": array([0, len(children)], "int64"),
        "child": array(children, "int32"),
        "logp": array(np.full(len(children), -2.0), "float32"),
        "log_mass": array([0.0], "float32"),
    }
    return types_pb2.Evaluation(**(parts | wrong))


def invalid_replies(trie: Trie) -> dict[str, draft_pb2.PlanResponse | bytes]:
    """Replies that no honest draft gives."""
    first = int(trie.level_start[1])
    inner = int(trie.level_start[LEVELS])
    return {
        "random bytes": np.random.default_rng(0).bytes(300),
        "one bad byte": b"\xff",
        "truncated": plan([1, 2, 3]).SerializeToString()[:-3],
        "version that is no text": b"\x32\x02\xff\xfe",
        "orphans": plan(deep_orphans(trie)),
        "descending": plan([first + 1, first]),
        "repeated": plan([first, first]),
        "the root": plan([0, first]),
        "negative": plan([-5, first]),
        "no such node": plan([first, 2**31 - 1]),
        "leaves": plan([*trie.with_ancestors([trie.nodes - 1]).tolist()]),
        "too many": plan(range(1, inner)),
        "NaN": plan([first], [np.nan]),
        "infinite": plan([first], [-np.inf]),
        "fewer scores": plan([first, first + 1], [0.0]),
        "no scores": draft_pb2.PlanResponse(nodes=array([first], "int32")),
        "NaN margin": plan([first], margins=array([np.nan], "float64")),
        "no margins": plan([first], margins=array([], "float64")),
        "margins of another type": plan([first], margins=array([0], "int64")),
        "a child above its parent": plan([first, int(trie.children(first)[0])], margins=array([0.0, 1.0], "float64")),
        "nodes of another type": plan([first], nodes=array([first], "int64")),
        "scores of another type": plan([first], scores=array([0], "int64")),
        "two axes": plan([first], nodes=array([[first]], "int32")),
        "wrong length": plan(
            [first], nodes=types_pb2.Array(dtype=types_pb2.DATA_TYPE_INT32, shape=[9], data=b"\1\0\0\0")
        ),
        "huge shape": plan([first], nodes=types_pb2.Array(dtype=types_pb2.DATA_TYPE_INT32, shape=[2**62], data=b"")),
        "huge message": plan([first], nodes=types_pb2.Array(dtype=types_pb2.DATA_TYPE_INT32, data=bytes(40_000_000))),
        "times beyond all bounds": plan([first], statistics=types_pb2.PassStatistics(forward_ms=2.0**64)),
        "passes beyond all bounds": plan([first], passes=2**31 - 1),
        "version beyond all bounds": plan([first], model_version="v" * 5_000_000),
        "evaluation of another type": plan([first], evaluation=lone_evaluation(trie, node=array([0], "int64"))),
        "evaluation of no nodes": plan([first], evaluation=lone_evaluation(trie, child_start=array([], "int64"))),
        "children of others": plan([first], evaluation=lone_evaluation(trie, node=array([1], "int32"))),
        "NaN evaluation": plan(
            [first], evaluation=lone_evaluation(trie, logp=array(np.full(len(trie.children(0)), np.nan), "float32"))
        ),
        "positive evaluation": plan(
            [first], evaluation=lone_evaluation(trie, logp=array(np.full(len(trie.children(0)), 5.0), "float32"))
        ),
    }


INVALID = sorted(invalid_replies(Trie.from_paths(np.array([[0] * LEVELS, [1] * LEVELS]), (2,) * LEVELS)))
ERRORS = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
REASONS = {
    grpc.StatusCode.UNAVAILABLE: pb.DEGRADED_REASON_DRAFT_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: pb.DEGRADED_REASON_DRAFT_DEADLINE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: pb.DEGRADED_REASON_DRAFT_BUSY,
    grpc.StatusCode.FAILED_PRECONDITION: pb.DEGRADED_REASON_DRAFT_VERSION,
    grpc.StatusCode.INVALID_ARGUMENT: pb.DEGRADED_REASON_DRAFT_REFUSED,
    grpc.StatusCode.UNAUTHENTICATED: pb.DEGRADED_REASON_DRAFT_ACCESS_DENIED,
    grpc.StatusCode.PERMISSION_DENIED: pb.DEGRADED_REASON_DRAFT_ACCESS_DENIED,
}


def blames_the_draft(reply: pb.RecommendResponse) -> bool:
    """Return whether every reason of a reply is a failure of the draft."""
    names = [pb.DegradedReason.Name(reason) for reason in reply.degraded_reasons]
    return all(name.startswith("DEGRADED_REASON_DRAFT_") for name in names)


class TestInvalidReplies:
    @pytest.mark.parametrize("name", INVALID)
    def test_is_noticed(
        self, misled: Client, fake_draft: FakeDraft, catalogue: Catalogue, cases: list[Case], name: str
    ) -> None:
        """Lists are the target's own, and replies are degraded by the draft."""
        fake_draft.answer = saying(invalid_replies(catalogue.trie)[name])
        replies = storm(asking(misled, cases[:4]), {})
        assert fake_draft.was_asked()
        assert_all_right(replies, cases[:4])
        for reply in replies:
            assert len(reply.degraded_reasons) == 1
            assert blames_the_draft(reply)
            assert reply.statistics.nodes_drafted == 0
            assert reply.versions.draft_model == ""

    @pytest.mark.parametrize("name", INVALID)
    def test_relaxed_sampling_answers_too(
        self, misled: Client, fake_draft: FakeDraft, catalogue: Catalogue, cases: list[Case], name: str
    ) -> None:
        fake_draft.answer = saying(invalid_replies(catalogue.trie)[name])
        reply = misled.recommend(cases[0].history, mode=pb.MODE_RELAXED_SAMPLING, seed=1)
        assert fake_draft.was_asked()
        assert (len(reply.items), reply.degraded) == (5, True)

    @pytest.mark.parametrize("code", ERRORS)
    def test_errors_are_named(
        self, misled: Client, fake_draft: FakeDraft, cases: list[Case], code: grpc.StatusCode
    ) -> None:
        """The reply names the kind of failure and repeats no text of the draft."""
        fake_draft.answer = failing(code, "a secret path, é漢 " + "x" * 2000)
        replies = storm(asking(misled, cases[:2]), {})
        assert fake_draft.was_asked()
        assert_all_right(replies, cases[:2])
        assert [list(reply.degraded_reasons) for reply in replies] == [
            [REASONS.get(code, pb.DEGRADED_REASON_DRAFT_FAILED)]
        ] * 2
        assert not any("secret" in str(reply) for reply in replies)

    def test_a_draft_that_fails_half_way(
        self, misled: Client, fake_draft: FakeDraft, catalogue: Catalogue, cases: list[Case]
    ) -> None:
        """Its first plan is of little use, and when it is asked again it fails: in a mode whose misses are planned for, since the
        target does not go on by itself.
        """
        little = plan([int(catalogue.trie.level_start[1])])

        def answer(request: draft_pb2.PlanRequest, context: grpc.ServicerContext) -> bytes:
            nodes = np.frombuffer(request.beams.data, dtype="<i4")
            return saying(little if nodes.tolist() == [0] else b"\xff")(request, context)

        fake_draft.answer = answer
        replies = storm(asking(misled, cases, mode=pb.MODE_TOLERANCE), {})
        assert_all_right(replies, cases)
        assert all(reply.degraded for reply in replies)

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.binary(max_size=120))
    def test_any_bytes(self, misled: Client, fake_draft: FakeDraft, cases: list[Case], data: bytes) -> None:
        """Bytes may happen to be an empty plan; whatever they are, the list is right."""
        fake_draft.answer = saying(data)
        reply = misled.recommend(cases[1].history, k=20)
        assert_all_right([reply], cases[1:2])
        assert blames_the_draft(reply)

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        nodes=st.lists(st.integers(-2, 1200), max_size=30),
        scores=st.lists(st.floats(), max_size=30),
        in_order=st.booleans(),
        mode=st.sampled_from([pb.MODE_STRICT, pb.MODE_TOLERANCE, pb.MODE_EXACT_SAMPLING, pb.MODE_RELAXED_SAMPLING]),
    )
    def test_any_plan(
        self,
        misled: Client,
        fake_draft: FakeDraft,
        cases: list[Case],
        nodes: list[int],
        scores: list[float],
        in_order: bool,
        mode: pb.Mode.ValueType,
    ) -> None:
        if in_order:
            nodes = sorted(set(nodes))
        fake_draft.answer = saying(plan(nodes, (scores * 30)[: len(nodes)]))
        reply = misled.recommend(cases[2].history, k=20, mode=mode)
        assert len(reply.items) == 20
        if mode in (pb.MODE_STRICT, pb.MODE_TOLERANCE):
            assert_all_right([reply], cases[2:3])


class TestSlow:
    def test_a_plan_that_is_late_but_in_time_is_used(
        self, misled: Client, fake_draft: FakeDraft, cases: list[Case]
    ) -> None:
        """It makes the answer late, and nothing else."""
        never = threading.Event()

        def answer(request: draft_pb2.PlanRequest, context: grpc.ServicerContext) -> bytes:
            never.wait(0.2)
            return empty_plan(request, context)

        fake_draft.answer = answer
        replies = storm(asking(misled, cases[:8]), {}, concurrency=8)
        assert_all_right(replies, cases[:8])
        assert not any(reply.degraded for reply in replies)


class TestUseless:
    """A valid plan that foresees nothing: no failure, so nothing to report, and the same list."""

    @pytest.mark.parametrize("seed", range(6))
    def test_random_plans(
        self, misled: Client, fake_draft: FakeDraft, catalogue: Catalogue, cases: list[Case], seed: int
    ) -> None:
        rng, trie = np.random.default_rng(seed), catalogue.trie

        def answer(request: draft_pb2.PlanRequest, context: grpc.ServicerContext) -> bytes:
            beams = np.frombuffer(request.beams.data, dtype="<i4")
            nodes, frontier = [], beams.astype(np.int64)
            while len(frontier) and trie.depth(frontier[:1])[0] < LEVELS - 1:
                _, children = trie.children_of(frontier)
                frontier = np.sort(rng.choice(children, size=min(len(children), 4), replace=False))
                nodes.extend(frontier.tolist())
            return plan(nodes, rng.normal(scale=1e3, size=len(nodes))).SerializeToString()

        fake_draft.answer = answer
        replies = storm(asking(misled, cases), {})
        assert_all_right(replies, cases)
        assert not any(reply.degraded for reply in replies)
        assert sum(reply.statistics.nodes_drafted for reply in replies) > 0
        assert {reply.versions.draft_model for reply in replies} == {"fake"}

    def test_empty_plans(self, misled: Client, fake_draft: FakeDraft, cases: list[Case]) -> None:
        fake_draft.answer = empty_plan
        replies = storm(asking(misled, cases), {})
        assert_all_right(replies, cases)
        assert not any(reply.degraded for reply in replies)
        assert {reply.statistics.target_passes for reply in replies} == {LEVELS}
