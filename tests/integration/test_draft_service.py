"""A draft as a process, asked directly: what it refuses, and what its plans hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.trie import ROOT
from atspeed.local.stack import LocalStack
from atspeed.rpc import wire
from atspeed.v1 import draft_pb2, types_pb2
from tests.messages import Change, array, malformed, put
from tests.serving import LEVELS, LIVENESS_SECONDS, draft_stub, models, refused

INVALID = grpc.StatusCode.INVALID_ARGUMENT
STALE = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture(scope="module")
def version(bundle: Path) -> str:
    """The model's."""
    return Bundle(bundle).manifest.model_version("draft")


@pytest.fixture
def draft(stack: LocalStack) -> Iterator[grpc.Channel]:
    with models(stack.drafts[0].address) as channel:
        yield channel


def plan_request(version: str, **fields: Any) -> draft_pb2.PlanRequest:
    """A good request for a plan from the root, of a draft that serves this model version."""
    zero = array([0.0], "float64")
    return draft_pb2.PlanRequest(
        **{
            "model_version": version,
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


class TestDraftRefuses:
    """Each refusal names the field, and the next plan is made."""

    FIELDS: tuple[tuple[grpc.StatusCode, str, Change], ...] = (
        (STALE, "model_version", put("model_version", "another")),
        (INVALID, "prompt", put("prompt", types_pb2.Array())),
        (INVALID, "prompt", put("prompt", array([1, -1], "int64"))),
        (INVALID, "prompt", put("prompt", array([1, 10_000], "int64"))),
        (INVALID, "prompt", put("prompt", array([3] * 254, "int64"))),
        *[
            (INVALID, "beam_widths", lambda request, widths=widths: request.beam_widths.extend(widths))
            for widths in ([0, 5], [6, 2], [5] * (LEVELS + 1))
        ],
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
        (INVALID, "levels", put("levels", LEVELS + 1)),
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
        self, draft: grpc.Channel, version: str, catalogue: Catalogue, code: grpc.StatusCode, field: str, change: Change
    ) -> None:
        bad = plan_request(version)
        change(bad)
        with refused(code, field):
            draft_stub(draft).Plan(bad, timeout=LIVENESS_SECONDS)
        self.still_well(draft, version, catalogue)

    @pytest.mark.parametrize(("name", "change"), ARRAYS, ids=[name for name, _ in ARRAYS])
    def test_an_array_that_is_none(
        self, draft: grpc.Channel, version: str, catalogue: Catalogue, name: str, change: Change
    ) -> None:
        bad = plan_request(version)
        change(bad)
        with refused(INVALID, name.split(":")[0]):
            draft_stub(draft).Plan(bad, timeout=LIVENESS_SECONDS)
        self.still_well(draft, version, catalogue)

    @pytest.mark.parametrize("leaf", [False, True])
    def test_beams_without_a_level_below(
        self, draft: grpc.Channel, version: str, catalogue: Catalogue, leaf: bool
    ) -> None:
        """Leaves are refused; a beam of the last inner level is fine and has nothing to plan."""
        node = catalogue.trie.nodes - 1 if leaf else int(catalogue.trie.level_start[LEVELS]) - 1
        request = plan_request(version, beams=array([node], "int32"))
        if leaf:
            with refused(INVALID, "beams"):
                draft_stub(draft).Plan(request, timeout=LIVENESS_SECONDS)
        else:
            plan = draft_stub(draft).Plan(request, timeout=LIVENESS_SECONDS)
            assert wire.node_ids(plan.nodes, "nodes", catalogue.trie).tolist() == []
        self.still_well(draft, version, catalogue)

    def still_well(self, channel: grpc.Channel, version: str, catalogue: Catalogue) -> None:
        plan = draft_stub(channel).Plan(plan_request(version), timeout=LIVENESS_SECONDS)
        assert len(wire.node_ids(plan.nodes, "nodes", catalogue.trie)) > 0


class TestDraft:
    @pytest.mark.parametrize(
        "proposal", [draft_pb2.PROPOSAL_TOP, draft_pb2.PROPOSAL_PERTURBED, draft_pb2.PROPOSAL_SAMPLE]
    )
    def test_a_plan_is_closed_and_within_its_size(
        self, draft: grpc.Channel, version: str, catalogue: Catalogue, proposal: draft_pb2.Proposal.ValueType
    ) -> None:
        trie = catalogue.trie
        request = plan_request(
            version, proposal=proposal, perturbation=types_pb2.Perturbation(seed=3, temperature=1.0), width=7
        )
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
        self, draft: grpc.Channel, version: str, catalogue: Catalogue, limit: int, width: int
    ) -> None:
        request = plan_request(version, max_nodes=limit, width=width)
        reply = draft_stub(draft).Plan(request, timeout=LIVENESS_SECONDS)
        nodes = wire.node_ids(reply.nodes, "nodes", catalogue.trie)
        assert len(nodes) == limit
        assert set(catalogue.trie.parent[nodes].tolist()) <= {ROOT, *nodes.tolist()}

    @pytest.mark.parametrize("levels", range(1, LEVELS + 1))
    def test_levels_are_passes(self, draft: grpc.Channel, version: str, catalogue: Catalogue, levels: int) -> None:
        """A plan has as many nodes as asked for, or as there are."""
        reply = draft_stub(draft).Plan(plan_request(version, levels=levels), timeout=LIVENESS_SECONDS)
        nodes = wire.node_ids(reply.nodes, "nodes", catalogue.trie)
        assert reply.passes == int(catalogue.trie.depth(nodes).max()) == min(levels, LEVELS - 1)

    def test_without_a_limit_every_level_has_its_width(
        self, draft: grpc.Channel, version: str, catalogue: Catalogue
    ) -> None:
        reply = draft_stub(draft).Plan(plan_request(version, width=4), timeout=LIVENESS_SECONDS)
        nodes = wire.node_ids(reply.nodes, "nodes", catalogue.trie)
        assert np.bincount(catalogue.trie.depth(nodes))[1:].tolist() == [4] * (LEVELS - 1)

    def test_a_plan_is_for_a_beam_width(self, draft: grpc.Channel, version: str, catalogue: Catalogue) -> None:
        """The nodes of a plan of one size depend on the number of beams of the search."""
        plans = [
            draft_stub(draft).Plan(
                plan_request(version, max_nodes=20, width=20, beam_width=k), timeout=LIVENESS_SECONDS
            )
            for k in (1, 20)
        ]
        assert plans[0].nodes != plans[1].nodes

    def test_a_plan_is_for_the_beam_widths_of_its_levels(self, draft: grpc.Channel, version: str) -> None:
        """Equal widths are one width; a wider level gets more of the budget."""
        fields = {"max_nodes": 20, "width": 20, "beam_width": 20}
        plans = [
            draft_stub(draft).Plan(plan_request(version, **fields, beam_widths=widths), timeout=LIVENESS_SECONDS)
            for widths in ([], [20], [20, 20], [1, 20])
        ]
        assert plans[0].nodes == plans[1].nodes == plans[2].nodes != plans[3].nodes

    def test_weights_and_priorities_belong_to_perturbed_plans(
        self, draft: grpc.Channel, version: str, catalogue: Catalogue
    ) -> None:
        """The contract names them for PROPOSAL_PERTURBED only, so another proposal does without."""
        full = draft_stub(draft).Plan(plan_request(version), timeout=LIVENESS_SECONDS)
        bare = plan_request(version)
        bare.ClearField("weights")
        bare.ClearField("priorities")
        assert draft_stub(draft).Plan(bare, timeout=LIVENESS_SECONDS).nodes == full.nodes
        bare.proposal = draft_pb2.PROPOSAL_PERTURBED
        bare.perturbation.CopyFrom(types_pb2.Perturbation(seed=1, temperature=1.0))
        with refused(INVALID, "weights"):
            draft_stub(draft).Plan(bare, timeout=LIVENESS_SECONDS)
