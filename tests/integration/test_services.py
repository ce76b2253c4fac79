"""The draft and the target as processes, asked directly: what they refuse, health under load, and the end of a process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from atspeed.v1 import draft_pb2, recommendation_pb2, target_pb2, types_pb2
from grpc_health.v1 import health_pb2

from client.local_stack import LocalStack, ServiceProcess
from engine.bundle import Bundle, ModelEntry
from engine.catalogue import Catalogue
from engine.trie import ROOT
from service_kit import wire
from tests.bundles import random_history
from tests.serving import (
    DRAFT,
    LEVELS,
    LIVENESS_SECONDS,
    RECOMMENDATION,
    TARGET,
    WINDOW,
    Client,
    EvaluateStream,
    FakeDraft,
    HealthWatch,
    assert_same_list,
    check_health,
    draft_stub,
    empty_plan,
    models,
    new_bundle,
    new_catalogue,
    refused,
    target_stub,
    until,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
STALE = grpc.StatusCode.FAILED_PRECONDITION
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Change = Callable[[Any], object]


def array(values: Any, dtype: str) -> types_pb2.Array:
    return wire.to_array(np.asarray(values, dtype=dtype))


@pytest.fixture(scope="module")
def entry(bundle: Path) -> ModelEntry:
    return Bundle(bundle).manifest.target


@pytest.fixture
def target(stack: LocalStack) -> Iterator[grpc.Channel]:
    with models(stack.targets[0].address) as channel:
        yield channel


@pytest.fixture
def draft(stack: LocalStack) -> Iterator[grpc.Channel]:
    with models(stack.drafts[0].address) as channel:
        yield channel


SERVED: dict[str, str] = {}
"""The model versions of the session's bundle, by role."""


@pytest.fixture(scope="module", autouse=True)
def served(bundle: Path) -> None:
    manifest = Bundle(bundle).manifest
    SERVED.update({role: manifest.model_version(role) for role in ("target", "draft")})


def first_message(nodes: list[int] | None = None) -> target_pb2.EvaluateRequest:
    """A good first message."""
    start = target_pb2.EvaluateStart(model_version=SERVED["target"], prompt=array([1, 3, 4, 5, 6, 2], "int64"))
    return target_pb2.EvaluateRequest(start=start, nodes=array([ROOT] if nodes is None else nodes, "int32"))


def next_message(nodes: list[int]) -> target_pb2.EvaluateRequest:
    return target_pb2.EvaluateRequest(nodes=array(nodes, "int32"))


def plan_request(**fields: Any) -> draft_pb2.PlanRequest:
    """A good request for a plan from the root."""
    zero = array([0.0], "float64")
    return draft_pb2.PlanRequest(
        **{
            "model_version": SERVED["draft"],
            "prompt": array([1, 3, 4, 5, 6, 2], "int64"),
            "beams": array([ROOT], "int32"),
            "scores": zero,
            "weights": zero,
            "priorities": zero,
            "beam_width": 5,
            "width": 10,
            "proposal": draft_pb2.PROPOSAL_TOP,
            **fields,
        }
    )


def put(path: str, value: Any) -> Change:
    """A change that sets a field, a message or a scalar."""
    *parents, name = path.split(".")

    def change(message: Any) -> None:
        for parent in parents:
            message = getattr(message, parent)
        if hasattr(value, "DESCRIPTOR"):
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)

    return change


def malformed(field: str, dtype: str, wrong_dtype: str) -> list[tuple[str, Change]]:
    """Every way in which an Array can be none."""
    good = np.ones(4, dtype=dtype).tobytes()
    data_type = array([], dtype).dtype
    arrays = {
        "dtype": array([1], wrong_dtype),
        "no dtype": types_pb2.Array(shape=[4], data=good),
        "unknown dtype": types_pb2.Array(dtype=99, shape=[4], data=good),  # type: ignore[arg-type]
        "scalar": types_pb2.Array(dtype=data_type, data=good[: len(good) // 4]),
        "two axes": types_pb2.Array(dtype=data_type, shape=[2, 2], data=good),
        "negative": types_pb2.Array(dtype=data_type, shape=[-4], data=good),
        "too few bytes": types_pb2.Array(dtype=data_type, shape=[4], data=good[:-1]),
        "too many bytes": types_pb2.Array(dtype=data_type, shape=[4], data=good + b"\0"),
        "huge": types_pb2.Array(dtype=data_type, shape=[2**62], data=good),
    }
    return [(f"{field}: {name}", put(field, value)) for name, value in arrays.items()]


class TestTargetRefuses:
    """Each refusal ends its stream, names the field, and leaves the service as it was."""

    START: tuple[tuple[grpc.StatusCode, str, Change], ...] = (
        (STALE, "start.model_version", put("start.model_version", "another")),
        (STALE, "start.model_version", put("start.model_version", "")),
        (INVALID, "prompt", put("start.prompt", types_pb2.Array())),
        (INVALID, "prompt", put("start.prompt", array([], "int64"))),
        (INVALID, "prompt", put("start.prompt", array([1, -1], "int64"))),
        (INVALID, "prompt", put("start.prompt", array([1, 10_000], "int64"))),
        (INVALID, "prompt", put("start.prompt", array([1, 2**62], "int64"))),
        (INVALID, "prompt", put("start.prompt", array([3] * 254, "int64"))),
        (INVALID, "start.pruned", put("start.pruned", array([3, 2], "int32"))),
        (INVALID, "start.pruned", put("start.pruned", array([10**6], "int32"))),
        (INVALID, "start.kept", put("start.kept", array([3, 2], "int32"))),
        *[
            (
                INVALID,
                "start.perturbation.temperature",
                put("start.perturbation", types_pb2.Perturbation(temperature=t)),
            )
            for t in (0.0, -1.0, float("nan"), float("inf"))
        ],
        (INVALID, "nodes", put("nodes", types_pb2.Array())),
        (INVALID, "nodes", put("nodes", array([], "int32"))),
        (INVALID, "nodes", put("nodes", array([0, 2, 1], "int32"))),
        (INVALID, "nodes", put("nodes", array([0, 0], "int32"))),
        (INVALID, "nodes", put("nodes", array([0, 1, 1], "int32"))),
        (INVALID, "nodes", put("nodes", array([-1, 0], "int32"))),
        (INVALID, "nodes", put("nodes", array([0, 10**6], "int32"))),
        (INVALID, "nodes", put("nodes", array([1, 2], "int32"))),
        (INVALID, "nodes", put("nodes", array(range(5000), "int32"))),
    )
    ARRAYS = (
        *malformed("start.prompt", "int64", "int32"),
        *malformed("start.pruned", "int32", "int64"),
        *malformed("start.kept", "int32", "int64"),
        *malformed("nodes", "int32", "float32"),
    )

    @pytest.mark.parametrize(("code", "field", "change"), START)
    def test_a_bad_first_message(
        self, target: grpc.Channel, catalogue: Catalogue, code: grpc.StatusCode, field: str, change: Change
    ) -> None:
        bad = first_message()
        change(bad)
        with refused(code, field), EvaluateStream(target) as stream:
            stream.ask(bad)
        self.still_well(target, catalogue)

    @pytest.mark.parametrize(("name", "change"), ARRAYS, ids=[name for name, _ in ARRAYS])
    def test_an_array_that_is_none(self, target: grpc.Channel, catalogue: Catalogue, name: str, change: Change) -> None:
        bad = first_message()
        change(bad)
        with refused(INVALID, name.split(":")[0]), EvaluateStream(target) as stream:
            stream.ask(bad)
        self.still_well(target, catalogue)

    def test_a_leaf(self, target: grpc.Channel, catalogue: Catalogue) -> None:
        with refused(INVALID, "nodes"), EvaluateStream(target) as stream:
            stream.ask(first_message([ROOT, catalogue.trie.nodes - 1]))
        self.still_well(target, catalogue)

    def test_an_orphan(self, target: grpc.Channel, catalogue: Catalogue) -> None:
        """A node whose parent the stream has not evaluated, in the first pass or in a later one."""
        trie = catalogue.trie
        grandchild = int(trie.children(int(trie.children(1)[0]))[0])
        with refused(INVALID, "nodes"), EvaluateStream(target) as stream:
            stream.ask(first_message([ROOT, 1, grandchild]))
        with EvaluateStream(target) as stream:
            stream.ask(first_message([ROOT, 1]))
            with refused(INVALID, "nodes"):
                stream.ask(next_message([grandchild]))
        self.still_well(target, catalogue)

    @pytest.mark.parametrize(
        ("field", "second"),
        [
            ("nodes", next_message([ROOT, 2])),
            ("nodes", next_message([1])),
            ("nodes", next_message([])),
            ("start", "first again"),
        ],
    )
    def test_a_bad_second_message(
        self, target: grpc.Channel, catalogue: Catalogue, field: str, second: target_pb2.EvaluateRequest | str
    ) -> None:
        """The root twice, a node twice, no node, a second start: the first answer stands, the stream ends."""
        with EvaluateStream(target) as stream:
            assert stream.ask(first_message([ROOT, 1])).evaluation.node.shape == [2]
            with refused(INVALID, field):
                stream.ask(first_message([2]) if isinstance(second, str) else second)
        self.still_well(target, catalogue)

    def test_a_stream_without_start(self, target: grpc.Channel, catalogue: Catalogue) -> None:
        with refused(INVALID, "start"), EvaluateStream(target) as stream:
            stream.ask(next_message([ROOT]))
        self.still_well(target, catalogue)

    @pytest.mark.parametrize("position", [0, 1])
    def test_bytes_that_are_no_message(self, target: grpc.Channel, catalogue: Catalogue, position: int) -> None:
        messages = [first_message().SerializeToString()] * position + [b"\x12\x7fab"]
        call: Any = target.stream_stream(f"/{TARGET}/Evaluate")
        replies = call(iter(messages), timeout=LIVENESS_SECONDS)
        with refused(INVALID, "request"):
            for _ in range(position + 1):
                next(replies)
        self.still_well(target, catalogue)

    def test_an_empty_stream_is_no_fault(self, target: grpc.Channel, catalogue: Catalogue) -> None:
        with EvaluateStream(target) as stream:
            assert stream.end() == []
        self.still_well(target, catalogue)

    def still_well(self, channel: grpc.Channel, catalogue: Catalogue) -> None:
        with EvaluateStream(channel) as stream:
            reply = stream.ask(first_message([ROOT, 1]))
            assert len(stream.end()) == 0
        wire.evaluation(reply.evaluation, "evaluation", catalogue.trie)


class TestTarget:
    def test_all_children_of_the_nodes_asked_for(self, target: grpc.Channel, catalogue: Catalogue) -> None:
        """0 children mean all; probabilities of a node's children sum to less than one under rule `vocab`."""
        trie = catalogue.trie
        with EvaluateStream(target) as stream:
            reply = stream.ask(first_message([ROOT, 1, 2]))
        evaluation = wire.evaluation(reply.evaluation, "evaluation", trie)
        assert evaluation.node.tolist() == [ROOT, 1, 2]
        for node, children in evaluation.items():
            assert sorted(children.node.tolist()) == trie.children(node).tolist()
            assert (np.diff(children.logp) <= 0).all()
            assert np.exp(children.logp.astype(np.float64)).sum() <= 1 + 1e-4
            assert children.log_mass == pytest.approx(np.log(np.exp(children.logp.astype(np.float64)).sum()), abs=1e-4)

    def test_one_pass_or_several_say_the_same(self, target: grpc.Channel, catalogue: Catalogue) -> None:
        """The keys and values of a stream's nodes stay, so descendants may come later."""
        trie = catalogue.trie
        child = int(trie.children(1)[0])
        with EvaluateStream(target) as stream:
            together = stream.ask(first_message([ROOT, 1, child]))
        with EvaluateStream(target) as stream:
            apart = [
                stream.ask(first_message()),
                stream.ask(next_message([1])),
                stream.ask(next_message([child])),
            ]
        expected = dict(wire.evaluation(together.evaluation, "evaluation", trie).items())
        for reply in apart:
            for node, children in wire.evaluation(reply.evaluation, "evaluation", trie).items():
                assert children.node.tolist() == expected[node].node.tolist()
                assert children.logp == pytest.approx(expected[node].logp, abs=1e-4)
        assert {reply.model_version for reply in apart} == {together.model_version}

    def test_pruning_removes_children_and_changes_no_score(self, target: grpc.Channel, catalogue: Catalogue) -> None:
        trie = catalogue.trie
        cut = trie.children(ROOT)[1:4]
        pruned = first_message()
        pruned.start.pruned.CopyFrom(array(cut, "int32"))
        with EvaluateStream(target) as one, EvaluateStream(target) as other:
            before, after = one.ask(first_message()), other.ask(pruned)
        (full,) = dict(wire.evaluation(before.evaluation, "evaluation", trie).items()).values()
        (rest,) = dict(wire.evaluation(after.evaluation, "evaluation", trie).items()).values()
        live = ~np.isin(full.node, cut)
        assert rest.node.tolist() == full.node[live].tolist()
        assert rest.logp == pytest.approx(full.logp[live], abs=1e-5)
        assert rest.log_mass < full.log_mass

    def test_what_is_kept_is_all_that_there_is(self, target: grpc.Channel, catalogue: Catalogue) -> None:
        """An allow-list names what is left. Both forms in one message would be a contradiction."""
        kept = catalogue.pruning(allowed=np.array([0, 5])).kept
        assert kept is not None
        request = first_message()
        request.start.kept.CopyFrom(array(kept.tolist(), "int32"))
        with EvaluateStream(target) as stream:
            evaluation = wire.evaluation(stream.ask(request).evaluation, "evaluation", catalogue.trie)
        level = catalogue.trie.level(1)
        assert sorted(evaluation.child.tolist()) == kept[(kept >= level.start) & (kept < level.stop)].tolist()
        request.start.pruned.CopyFrom(array([3], "int32"))
        with refused(INVALID, "start.kept"), EvaluateStream(target) as stream:
            stream.ask(request)

    def test_a_pruned_root_has_no_children(self, target: grpc.Channel, catalogue: Catalogue) -> None:
        request = first_message()
        request.start.pruned.CopyFrom(array(catalogue.trie.children(ROOT), "int32"))
        with EvaluateStream(target) as stream:
            evaluation = wire.evaluation(stream.ask(request).evaluation, "evaluation", catalogue.trie)
        assert (evaluation.node.tolist(), evaluation.child.tolist()) == ([ROOT], [])
        assert evaluation.log_mass.tolist() == [-np.inf]

    def test_the_longest_prompt_is_served(self, target: grpc.Channel, catalogue: Catalogue, entry: ModelEntry) -> None:
        """The prompt and the codes below it fit the model's positions to the last one."""
        longest = entry.max_positions - (LEVELS - 1)
        trie = catalogue.trie
        first = first_message([ROOT, *trie.with_ancestors([int(trie.level_start[LEVELS]) - 1]).tolist()])
        first.start.prompt.CopyFrom(array([3] * longest, "int64"))
        with EvaluateStream(target) as stream:
            reply = stream.ask(first)
        assert reply.statistics.new_tokens == longest + LEVELS - 1
        wire.evaluation(reply.evaluation, "evaluation", trie)


class TestDraftRefuses:
    """Each refusal names the field, and the next plan is made."""

    FIELDS: tuple[tuple[grpc.StatusCode, str, Change], ...] = (
        (STALE, "model_version", put("model_version", "another")),
        (INVALID, "prompt", put("prompt", types_pb2.Array())),
        (INVALID, "prompt", put("prompt", array([1, -1], "int64"))),
        (INVALID, "prompt", put("prompt", array([1, 10_000], "int64"))),
        (INVALID, "prompt", put("prompt", array([3] * 254, "int64"))),
        (INVALID, "pruned", put("pruned", array([3, 2], "int32"))),
        (INVALID, "pruned", put("pruned", array([-3], "int32"))),
        (INVALID, "kept", put("kept", array([10**6], "int32"))),
        (INVALID, "beams", put("beams", types_pb2.Array())),
        (INVALID, "beams", put("beams", array([2, 1], "int32"))),
        (INVALID, "beams", put("beams", array([1, 1], "int32"))),
        (INVALID, "beams", put("beams", array([10**6], "int32"))),
        (INVALID, "beams", put("beams", array([0, 1], "int32"))),
        *[
            (INVALID, name, put(name, array(values, "float64")))
            for name in ("scores", "weights", "priorities")
            for values in ([float("nan")], [float("inf")], [0.0, 0.0])
        ],
        (INVALID, "scores", put("scores", types_pb2.Array())),
        *[(INVALID, name, put(name, 1_000_000)) for name in ("beam_width", "width", "max_nodes")],
        *[(INVALID, name, put(name, 0)) for name in ("beam_width", "width")],
        (INVALID, "proposal", put("proposal", draft_pb2.PROPOSAL_UNSPECIFIED)),
        (INVALID, "proposal", put("proposal", 9)),
        (INVALID, "perturbation", put("proposal", draft_pb2.PROPOSAL_PERTURBED)),
        (INVALID, "perturbation", put("proposal", draft_pb2.PROPOSAL_SAMPLE)),
        *[
            (INVALID, "perturbation.temperature", put("perturbation", types_pb2.Perturbation(temperature=t)))
            for t in (0.0, -1.0, float("nan"), float("inf"))
        ],
    )
    ARRAYS = (
        *malformed("prompt", "int64", "int32"),
        *malformed("pruned", "int32", "int64"),
        *malformed("kept", "int32", "int64"),
        *malformed("beams", "int32", "int64"),
        *malformed("scores", "float64", "float32"),
        *malformed("weights", "float64", "float32"),
        *malformed("priorities", "float64", "float32"),
    )

    @pytest.mark.parametrize(("code", "field", "change"), FIELDS)
    def test_a_bad_field(
        self, draft: grpc.Channel, catalogue: Catalogue, code: grpc.StatusCode, field: str, change: Change
    ) -> None:
        bad = plan_request()
        change(bad)
        with refused(code, field):
            draft_stub(draft).Plan(bad, timeout=LIVENESS_SECONDS)
        self.still_well(draft, catalogue)

    @pytest.mark.parametrize(("name", "change"), ARRAYS, ids=[name for name, _ in ARRAYS])
    def test_an_array_that_is_none(self, draft: grpc.Channel, catalogue: Catalogue, name: str, change: Change) -> None:
        bad = plan_request()
        change(bad)
        with refused(INVALID, name.split(":")[0]):
            draft_stub(draft).Plan(bad, timeout=LIVENESS_SECONDS)
        self.still_well(draft, catalogue)

    @pytest.mark.parametrize("leaf", [False, True])
    def test_beams_without_a_level_below(self, draft: grpc.Channel, catalogue: Catalogue, leaf: bool) -> None:
        """Leaves are refused; a beam of the last inner level is fine and has nothing to plan."""
        node = catalogue.trie.nodes - 1 if leaf else int(catalogue.trie.level_start[LEVELS]) - 1
        request = plan_request(beams=array([node], "int32"))
        if leaf:
            with refused(INVALID, "beams"):
                draft_stub(draft).Plan(request, timeout=LIVENESS_SECONDS)
        else:
            plan = draft_stub(draft).Plan(request, timeout=LIVENESS_SECONDS)
            assert wire.node_ids(plan.nodes, "nodes", catalogue.trie).tolist() == []
        self.still_well(draft, catalogue)

    def still_well(self, channel: grpc.Channel, catalogue: Catalogue) -> None:
        plan = draft_stub(channel).Plan(plan_request(), timeout=LIVENESS_SECONDS)
        assert len(wire.node_ids(plan.nodes, "nodes", catalogue.trie)) > 0


class TestDraft:
    @pytest.mark.parametrize(
        "proposal", [draft_pb2.PROPOSAL_TOP, draft_pb2.PROPOSAL_PERTURBED, draft_pb2.PROPOSAL_SAMPLE]
    )
    def test_a_plan_is_closed_and_within_its_size(
        self, draft: grpc.Channel, catalogue: Catalogue, proposal: draft_pb2.Proposal.ValueType
    ) -> None:
        trie = catalogue.trie
        request = plan_request(proposal=proposal, perturbation=types_pb2.Perturbation(seed=3, temperature=1.0), width=7)
        reply = draft_stub(draft).Plan(request, timeout=LIVENESS_SECONDS)
        nodes = wire.node_ids(reply.nodes, "nodes", trie)
        assert np.bincount(trie.depth(nodes), minlength=LEVELS).max() <= 7
        assert set(trie.parent[nodes].tolist()) <= {ROOT, *nodes.tolist()}
        assert len(wire.vector(reply.scores, "scores", "float64")) == len(nodes)
        assert reply.passes == LEVELS - 1
        assert draft_stub(draft).Plan(request, timeout=LIVENESS_SECONDS).nodes == reply.nodes

    @pytest.mark.parametrize("width", [10, 100])
    @pytest.mark.parametrize("limit", [1, 5, 12])
    def test_a_small_plan_is_closed_and_has_what_was_asked_for(
        self, draft: grpc.Channel, catalogue: Catalogue, limit: int, width: int
    ) -> None:
        request = plan_request(max_nodes=limit, width=width)
        reply = draft_stub(draft).Plan(request, timeout=LIVENESS_SECONDS)
        nodes = wire.node_ids(reply.nodes, "nodes", catalogue.trie)
        assert len(nodes) == limit
        assert set(catalogue.trie.parent[nodes].tolist()) <= {ROOT, *nodes.tolist()}

    def test_without_a_limit_every_level_has_its_width(self, draft: grpc.Channel, catalogue: Catalogue) -> None:
        reply = draft_stub(draft).Plan(plan_request(width=4), timeout=LIVENESS_SECONDS)
        nodes = wire.node_ids(reply.nodes, "nodes", catalogue.trie)
        assert np.bincount(catalogue.trie.depth(nodes))[1:].tolist() == [4] * (LEVELS - 1)

    def test_a_plan_is_for_a_beam_width(self, draft: grpc.Channel, catalogue: Catalogue) -> None:
        """Which nodes are worth the same budget depends on how many beams the search has."""
        plans = [
            draft_stub(draft).Plan(plan_request(max_nodes=20, width=20, beam_width=k), timeout=LIVENESS_SECONDS)
            for k in (1, 20)
        ]
        assert plans[0].nodes != plans[1].nodes

    def test_weights_and_priorities_belong_to_perturbed_plans(self, draft: grpc.Channel, catalogue: Catalogue) -> None:
        """The contract names them for PROPOSAL_PERTURBED only, so another proposal does without."""
        full = draft_stub(draft).Plan(plan_request(), timeout=LIVENESS_SECONDS)
        bare = plan_request()
        bare.ClearField("weights")
        bare.ClearField("priorities")
        assert draft_stub(draft).Plan(bare, timeout=LIVENESS_SECONDS).nodes == full.nodes
        bare.proposal = draft_pb2.PROPOSAL_PERTURBED
        bare.perturbation.CopyFrom(types_pb2.Perturbation(seed=1, temperature=1.0))
        with refused(INVALID, "weights"):
            draft_stub(draft).Plan(bare, timeout=LIVENESS_SECONDS)


class TestHealth:
    def test_every_service_says_that_it_serves(self, stack: LocalStack) -> None:
        names = {"draft_service": DRAFT, "target_service": TARGET, "orchestrator": RECOMMENDATION}
        for service in stack.services:
            with models(service.address) as channel:
                for name in ("", names[service.module]):
                    assert check_health(channel, name) == SERVING

    def test_health_answers_while_the_model_computes(
        self, tmp_path_factory: pytest.TempPathFactory, log_folder: Path
    ) -> None:
        """Several probes, one after the other, are answered before a long pass that was asked for first."""
        catalogue = new_catalogue(seed=3, items=3000)
        bundle = new_bundle(tmp_path_factory.mktemp("large"), catalogue)
        flags = {"bundle": bundle, "threads": 1}
        service = ServiceProcess("target_service", flags, log_folder / "busy.log")
        service.start()
        nodes = list(range(min(4096, int(catalogue.trie.level_start[LEVELS]))))
        long = first_message(nodes)
        long.start.model_version = Bundle(bundle).manifest.model_version("target")
        long.start.prompt.CopyFrom(array([3] * 250, "int64"))
        with models(service.address) as channel, ThreadPoolExecutor(1) as pool, EvaluateStream(channel) as stream:
            check_health(channel, TARGET)
            stream.send(long)
            answer = pool.submit(stream.receive)
            probes = 0
            while not answer.done():
                assert check_health(channel, TARGET) == SERVING
                probes += not answer.done()
            assert answer.result(LIVENESS_SECONDS).statistics.new_tokens == 250 + len(nodes) - 1
        service.stop()
        assert probes >= 5


class TestEnd:
    """SIGTERM: no new calls, running ones are answered, and the process ends with 0."""

    def test_a_target_finishes_its_streams(self, bundle: Path, catalogue: Catalogue, log_folder: Path) -> None:
        service = ServiceProcess("target_service", {"bundle": bundle, "threads": 1}, log_folder / "ending.log")
        service.start()
        process = service.process
        assert process is not None
        with (
            models(service.address) as channel,
            HealthWatch(service.address, TARGET) as watch,
            EvaluateStream(channel) as stream,
        ):
            stream.ask(first_message())
            assert watch.next() == SERVING
            process.send_signal(signal.SIGTERM)
            assert watch.next() == NOT_SERVING
            assert stream.ask(next_message([1])).evaluation.node.shape == [1]
            assert stream.end() == []
            assert process.wait(LIVENESS_SECONDS) == 0
        service.stop()

    def test_an_orchestrator_answers_what_it_has_begun(
        self, stack: LocalStack, client: Client, catalogue: Catalogue, log_folder: Path
    ) -> None:
        """Calls that wait for their plan when the signal comes get their lists; later ones find nobody."""
        histories = [random_history(catalogue, WINDOW, seed=seed) for seed in range(3)]
        expected = [client.recommend(history) for history in histories]
        release = threading.Event()

        def slow(request: draft_pb2.PlanRequest, context: grpc.ServicerContext) -> bytes:
            release.wait(LIVENESS_SECONDS)
            return empty_plan(request, context)

        with FakeDraft() as draft, ThreadPoolExecutor(len(histories)) as pool:
            draft.answer = slow
            flags = stack.orchestrators[0].flags | {"draft": draft.address, "draft-timeout-seconds": 60}
            service = ServiceProcess("orchestrator", flags, log_folder / "ending-orchestrator.log")
            service.start()
            process = service.process
            assert process is not None
            with Client(service.address) as ending, HealthWatch(service.address, RECOMMENDATION) as watch:
                calls = [pool.submit(ending.recommend, history) for history in histories]
                assert all(draft.asked.acquire(timeout=LIVENESS_SECONDS) for _ in histories)
                assert watch.next() == SERVING
                process.send_signal(signal.SIGTERM)
                assert watch.next() == NOT_SERVING
                with Client(service.address) as late:
                    until(lambda: self.is_gone(late))
                assert not any(call.done() for call in calls)
                release.set()
                for call, reply in zip(calls, expected, strict=True):
                    assert_same_list(call.result(), reply)
                assert process.wait(LIVENESS_SECONDS) == 0
            service.stop()

    def test_calls_that_do_not_end_are_cut_off(self, bundle: Path, catalogue: Catalogue, log_folder: Path) -> None:
        """A client that never ends its stream cannot keep the process alive beyond the grace that it was given."""
        flags = {"bundle": bundle, "threads": 1, "drain-seconds": 0.2}
        service = ServiceProcess("target_service", flags, log_folder / "cut-off.log")
        service.start()
        process = service.process
        assert process is not None
        with models(service.address) as channel, EvaluateStream(channel) as stream:
            stream.ask(first_message())
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIVENESS_SECONDS) == 0
            with pytest.raises(grpc.RpcError) as end:
                stream.receive()
            assert end.value.code() in {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
        service.stop()

    def is_gone(self, client: Client) -> bool:
        """Whether new calls are no longer taken."""
        try:
            client.stub.GetHistory(recommendation_pb2.GetHistoryRequest(user_id="user"), timeout=LIVENESS_SECONDS)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAVAILABLE
        return False


def test_a_busy_target_is_not_the_callers_fault(
    bundle: Path, catalogue: Catalogue, client: Client, tmp_path: Path
) -> None:
    """A target that serves as many calls as it may sends the orchestrator away; the caller may come again."""
    flags = {"target": {"max-running": 1, "max-queued": 0, "threads": 1}}
    with (
        LocalStack(bundle, drafts=0, log_folder=tmp_path, flags=flags) as busy,
        models(busy.targets[0].address) as channel,
        Client(busy.address) as caller,
        EvaluateStream(channel) as stream,
    ):
        history = random_history(catalogue, 5, seed=1)
        stream.ask(first_message())
        with pytest.raises(grpc.RpcError) as refusal:
            caller.recommend(history)
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        stream.end()
        assert_same_list(caller.recommend(history), client.recommend(history))


def test_model_info_is_what_the_bundle_says(
    target: grpc.Channel, draft: grpc.Channel, bundle: Path, catalogue: Catalogue
) -> None:
    manifest = Bundle(bundle).manifest
    assert manifest.draft is not None
    answers = {
        SERVED["target"]: target_stub(target)
        .GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest(), timeout=LIVENESS_SECONDS)
        .model,
        SERVED["draft"]: draft_stub(draft)
        .GetModelInfo(draft_pb2.DraftServiceGetModelInfoRequest(), timeout=LIVENESS_SECONDS)
        .model,
    }
    for version, model in answers.items():
        assert model.model_version == version
        assert model.catalogue_version == catalogue.version
        assert (model.architecture, model.precision, model.provider) == ("llama", "float32", "cpu")
        assert model.scoring_rule == types_pb2.SCORING_RULE_VOCAB
        assert model.max_positions == 256
