"""A target as a process, asked directly: what it refuses, and what its evaluations hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.search.trie import ROOT
from atspeed.local.stack import LocalStack
from atspeed.rpc import wire
from atspeed.v1 import target_pb2, types_pb2
from tests.messages import Change, array, first_message, malformed, next_message, put
from tests.serving import LEVELS, LIVENESS_SECONDS, TARGET, EvaluateStream, models, refused

INVALID = grpc.StatusCode.INVALID_ARGUMENT
STALE = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture(scope="module")
def entry(bundle: Path) -> ModelEntry:
    return Bundle(bundle).manifest.target


@pytest.fixture(scope="module")
def version(bundle: Path) -> str:
    """The model's."""
    return Bundle(bundle).manifest.model_version("target")


@pytest.fixture
def target(stack: LocalStack) -> Iterator[grpc.Channel]:
    with models(stack.targets[0].address) as channel:
        yield channel


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
        (INVALID, "start.beam_width", put("start.beam_width", 2**31 - 1)),
        (INVALID, "start.beam_width", put("start.beam_width", -1)),
        (INVALID, "start.max_children", put("start.max_children", -1)),
        *[
            (INVALID, "start.beam_widths", lambda request, widths=widths: request.start.beam_widths.extend(widths))
            for widths in ([0, 3], [4, 2], [3] * (LEVELS + 1))
        ],
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

    @pytest.mark.parametrize("beam_width", [0, 3])
    @pytest.mark.parametrize(("code", "field", "change"), START)
    def test_a_bad_first_message(
        self,
        target: grpc.Channel,
        version: str,
        catalogue: Catalogue,
        code: grpc.StatusCode,
        field: str,
        change: Change,
        beam_width: int,
    ) -> None:
        """The message is refused with or without an autonomous search."""
        bad = first_message(version)
        bad.start.beam_width = beam_width
        change(bad)
        with refused(code, field), EvaluateStream(target) as stream:
            stream.ask(bad)
        self.still_well(target, version, catalogue)

    @pytest.mark.parametrize(("name", "change"), ARRAYS, ids=[name for name, _ in ARRAYS])
    def test_an_array_that_is_none(
        self, target: grpc.Channel, version: str, catalogue: Catalogue, name: str, change: Change
    ) -> None:
        bad = first_message(version)
        change(bad)
        with refused(INVALID, name.split(":")[0]), EvaluateStream(target) as stream:
            stream.ask(bad)
        self.still_well(target, version, catalogue)

    def test_a_leaf(self, target: grpc.Channel, version: str, catalogue: Catalogue) -> None:
        with refused(INVALID, "nodes"), EvaluateStream(target) as stream:
            stream.ask(first_message(version, [ROOT, catalogue.trie.nodes - 1]))
        self.still_well(target, version, catalogue)

    def test_an_orphan(self, target: grpc.Channel, version: str, catalogue: Catalogue) -> None:
        """A node whose parent the stream has not evaluated, in the first pass or in a later one."""
        trie = catalogue.trie
        grandchild = int(trie.children(int(trie.children(1)[0]))[0])
        with refused(INVALID, "nodes"), EvaluateStream(target) as stream:
            stream.ask(first_message(version, [ROOT, 1, grandchild]))
        with EvaluateStream(target) as stream:
            stream.ask(first_message(version, [ROOT, 1]))
            with refused(INVALID, "nodes"):
                stream.ask(next_message([grandchild]))
        self.still_well(target, version, catalogue)

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
        self,
        target: grpc.Channel,
        version: str,
        catalogue: Catalogue,
        field: str,
        second: target_pb2.EvaluateRequest | str,
    ) -> None:
        """The root twice, a node twice, no node, a second start: the first answer stands, the stream ends."""
        with EvaluateStream(target) as stream:
            assert stream.ask(first_message(version, [ROOT, 1])).evaluation.node.shape == [2]
            with refused(INVALID, field):
                stream.ask(first_message(version, [2]) if isinstance(second, str) else second)
        self.still_well(target, version, catalogue)

    def test_a_stream_without_start(self, target: grpc.Channel, version: str, catalogue: Catalogue) -> None:
        with refused(INVALID, "start"), EvaluateStream(target) as stream:
            stream.ask(next_message([ROOT]))
        self.still_well(target, version, catalogue)

    @pytest.mark.parametrize("position", [0, 1])
    def test_bytes_that_are_no_message(
        self, target: grpc.Channel, version: str, catalogue: Catalogue, position: int
    ) -> None:
        messages = [first_message(version).SerializeToString()] * position + [b"\x12\x7fab"]
        call: Any = target.stream_stream(f"/{TARGET}/Evaluate")
        replies = call(iter(messages), timeout=LIVENESS_SECONDS)
        with refused(INVALID, "request"):
            for _ in range(position + 1):
                next(replies)
        self.still_well(target, version, catalogue)

    def test_an_empty_stream_is_no_fault(self, target: grpc.Channel, version: str, catalogue: Catalogue) -> None:
        with EvaluateStream(target) as stream:
            assert stream.end() == []
        self.still_well(target, version, catalogue)

    def still_well(self, channel: grpc.Channel, version: str, catalogue: Catalogue) -> None:
        with EvaluateStream(channel) as stream:
            reply = stream.ask(first_message(version, [ROOT, 1]))
            assert len(stream.end()) == 0
        wire.evaluation(reply.evaluation, "evaluation", catalogue.trie)


class TestTarget:
    def test_all_children_of_the_nodes_asked_for(
        self, target: grpc.Channel, version: str, catalogue: Catalogue
    ) -> None:
        """0 children mean all; probabilities of a node's children sum to less than one under rule `vocab`."""
        trie = catalogue.trie
        with EvaluateStream(target) as stream:
            reply = stream.ask(first_message(version, [ROOT, 1, 2]))
        evaluation = wire.evaluation(reply.evaluation, "evaluation", trie)
        assert evaluation.node.tolist() == [ROOT, 1, 2]
        for node, children in evaluation.items():
            assert sorted(children.node.tolist()) == trie.children(node).tolist()
            assert (np.diff(children.logp) <= 0).all()
            assert np.exp(children.logp.astype(np.float64)).sum() <= 1 + 1e-4
            assert children.log_mass == pytest.approx(np.log(np.exp(children.logp.astype(np.float64)).sum()), abs=1e-4)

    def test_one_pass_or_several_say_the_same(self, target: grpc.Channel, version: str, catalogue: Catalogue) -> None:
        """The keys and values of a stream's nodes stay, so descendants may come later."""
        trie = catalogue.trie
        child = int(trie.children(1)[0])
        with EvaluateStream(target) as stream:
            together = stream.ask(first_message(version, [ROOT, 1, child]))
        with EvaluateStream(target) as stream:
            apart = [
                stream.ask(first_message(version)),
                stream.ask(next_message([1])),
                stream.ask(next_message([child])),
            ]
        expected = dict(wire.evaluation(together.evaluation, "evaluation", trie).items())
        for reply in apart:
            for node, children in wire.evaluation(reply.evaluation, "evaluation", trie).items():
                assert children.node.tolist() == expected[node].node.tolist()
                assert children.logp == pytest.approx(expected[node].logp, abs=1e-4)
        assert {reply.model_version for reply in apart} == {together.model_version}

    @pytest.mark.parametrize("noise", [None, types_pb2.Perturbation(seed=7, temperature=1.5)])
    def test_autonomous_search_equals_the_search_pass_by_pass(
        self, target: grpc.Channel, version: str, catalogue: Catalogue, noise: types_pb2.Perturbation | None
    ) -> None:
        """The model gives the same numbers either way. Tests of the autonomous search compare its nodes with the loop's."""
        width, trie = 3, catalogue.trie
        alone, asked = first_message(version), first_message(version)
        for request in (alone, asked):
            request.start.max_children = width
            if noise:
                request.start.perturbation.CopyFrom(noise)
        alone.start.beam_width = width
        with EvaluateStream(target) as stream:
            reply = stream.ask(alone)
        assert len(reply.further) == LEVELS - 1
        assert [further.statistics.new_tokens for further in reply.further] == [width] * (LEVELS - 1)
        with EvaluateStream(target) as stream:
            replies = [stream.ask(asked)]
            for further in reply.further:
                nodes = wire.evaluation(further.evaluation, "evaluation", trie).node
                assert set(trie.parent[nodes].tolist()) <= set(
                    wire.evaluation(replies[-1].evaluation, "evaluation", trie).node.tolist()
                )
                replies.append(stream.ask(next_message(nodes.tolist())))
        made = [reply.evaluation, *(further.evaluation for further in reply.further)]
        for own, wanted in zip(made, replies, strict=True):
            found = wire.evaluation(own, "evaluation", trie)
            expected = wire.evaluation(wanted.evaluation, "evaluation", trie)
            assert found.node.tolist() == expected.node.tolist()
            assert found.child.tolist() == expected.child.tolist()
            assert found.logp == pytest.approx(expected.logp, abs=1e-5)

    def test_looking_ahead_it_makes_fewer_passes_of_the_same_search(
        self, target: grpc.Channel, version: str, catalogue: Catalogue
    ) -> None:
        """Evaluations of one request are prefetched for the next, and no number depends on it."""
        request = first_message(version)
        request.start.max_children = request.start.beam_width = 3
        with EvaluateStream(target) as stream:
            plain = _said(stream.ask(request), catalogue)
        request.start.prefetches = True
        fewest = LEVELS
        for _ in range(100):
            with EvaluateStream(target) as stream:
                reply = stream.ask(request)
            fewest, said = min(fewest, 1 + len(reply.further)), _said(reply, catalogue)
            assert plain.keys() <= said.keys()
            for node, (child, logp) in plain.items():
                assert said[node][0] == child
                assert said[node][1] == pytest.approx(logp, abs=1e-5)
        assert fewest < LEVELS

    def test_pruning_removes_children_and_changes_no_score(
        self, target: grpc.Channel, version: str, catalogue: Catalogue
    ) -> None:
        trie = catalogue.trie
        cut = trie.children(ROOT)[1:4]
        pruned = first_message(version)
        pruned.start.pruned.CopyFrom(array(cut, "int32"))
        with EvaluateStream(target) as one, EvaluateStream(target) as other:
            before, after = one.ask(first_message(version)), other.ask(pruned)
        (full,) = dict(wire.evaluation(before.evaluation, "evaluation", trie).items()).values()
        (rest,) = dict(wire.evaluation(after.evaluation, "evaluation", trie).items()).values()
        live = ~np.isin(full.node, cut)
        assert rest.node.tolist() == full.node[live].tolist()
        assert rest.logp == pytest.approx(full.logp[live], abs=1e-5)
        assert rest.log_mass < full.log_mass

    def test_what_is_kept_is_all_that_there_is(self, target: grpc.Channel, version: str, catalogue: Catalogue) -> None:
        """An allow-list names what is left. Both forms in one message would be a contradiction."""
        kept = catalogue.pruning(allowed=np.array([0, 5])).kept
        assert kept is not None
        request = first_message(version)
        request.start.kept.CopyFrom(array(kept.tolist(), "int32"))
        with EvaluateStream(target) as stream:
            evaluation = wire.evaluation(stream.ask(request).evaluation, "evaluation", catalogue.trie)
        level = catalogue.trie.level(1)
        assert sorted(evaluation.child.tolist()) == kept[(kept >= level.start) & (kept < level.stop)].tolist()
        request.start.pruned.CopyFrom(array([3], "int32"))
        with refused(INVALID, "start.kept"), EvaluateStream(target) as stream:
            stream.ask(request)

    def test_a_pruned_root_has_no_children(self, target: grpc.Channel, version: str, catalogue: Catalogue) -> None:
        request = first_message(version)
        request.start.pruned.CopyFrom(array(catalogue.trie.children(ROOT), "int32"))
        with EvaluateStream(target) as stream:
            evaluation = wire.evaluation(stream.ask(request).evaluation, "evaluation", catalogue.trie)
        assert (evaluation.node.tolist(), evaluation.child.tolist()) == ([ROOT], [])
        assert evaluation.log_mass.tolist() == [-np.inf]

    def test_the_longest_prompt_is_served(
        self, target: grpc.Channel, version: str, catalogue: Catalogue, entry: ModelEntry
    ) -> None:
        """The prompt and the codes below it fit the model's positions to the last one."""
        longest = entry.max_positions - (LEVELS - 1)
        trie = catalogue.trie
        first = first_message(version, [ROOT, *trie.with_ancestors([int(trie.level_start[LEVELS]) - 1]).tolist()])
        first.start.prompt.CopyFrom(array([3] * longest, "int64"))
        with EvaluateStream(target) as stream:
            reply = stream.ask(first)
        assert reply.statistics.new_tokens == longest + LEVELS - 1
        wire.evaluation(reply.evaluation, "evaluation", trie)


def _said(reply: target_pb2.EvaluateResponse, catalogue: Catalogue) -> dict[int, tuple[list[int], list[float]]]:
    """The children of every node that was evaluated, with their log-probabilities."""
    passes = [reply.evaluation, *(further.evaluation for further in reply.further)]
    evaluations = [wire.evaluation(one, "evaluation", catalogue.trie) for one in passes]
    items = [item for evaluation in evaluations for item in evaluation.items()]
    return {node: (children.node.tolist(), children.logp.tolist()) for node, children in items}
