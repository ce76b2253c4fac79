"""The draft's replicas over a stub: one that is sick is passed by, and only failures in a row let the draft rest."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import PlanSize, Proposal
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import Pruning
from atspeed.rpc import wire
from atspeed.rpc.affinity import Routes
from atspeed.v1 import draft_pb2
from orchestrator.model_clients.draft_client import DraftClient, DraftSession
from orchestrator.model_clients.model_request import ModelRequest
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import World

TRIE = World.random(NaiveTrie({"a": (0, 1, 0), "b": (1, 0, 0)}, [2, 2, 1]), ScoringRule.VOCAB, 1).trie
TIMEOUT = 8.0


class Replica:
    """Answers with these nodes, or fails; remembers how long it was given, and how many levels it was asked for."""

    def __init__(self, failure: grpc.StatusCode | None = None, nodes: Sequence[int] = ()) -> None:
        self.failure, self.nodes, self.timeouts, self.levels = failure, nodes, list[float](), list[int]()

    async def Plan(self, request: draft_pb2.PlanRequest, *, timeout: float, metadata: object) -> Any:  # noqa: ASYNC109, N802
        """One call."""
        self.timeouts.append(timeout)
        self.levels.append(request.levels)
        if self.failure is not None:
            raise grpc.aio.AioRpcError(self.failure, grpc.aio.Metadata(), grpc.aio.Metadata())
        zeros = wire.to_array(np.zeros(len(self.nodes)))
        nodes = wire.to_array(np.array(self.nodes, dtype=np.int32))
        return draft_pb2.PlanResponse(nodes=nodes, scores=zeros, margins=zeros, model_version="v")


def client(in_turn: Replica, own: Replica | None = None) -> DraftClient:
    routes: Routes[Any] = Routes(in_turn, own, max_calls=4)
    return DraftClient(routes, TRIE, "v", timeout=TIMEOUT, backoff_seconds=60.0)


def asked(draft: DraftClient, seconds: float = math.inf, affinity: str = "ann") -> list[str]:
    """One request's plan: why there was none."""
    degraded: list[str] = []
    question = ModelRequest(np.array([1]), Pruning.none(), Deadline(100.0), affinity=affinity)
    session: DraftSession = draft.session(question, Proposal.TOP, degraded)
    asyncio.run(session.plan(Beams.root(), PlanSize(1, 2, 2), seconds))
    assert len(session.usage.waits) == (0 if degraded == ["draft: left alone after a recent failure"] else 1)
    return degraded


@pytest.mark.parametrize("failure", [grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE])
def test_one_sick_replica_costs_no_plan_and_never_lets_the_draft_rest(failure: grpc.StatusCode) -> None:
    sick, well = Replica(failure), Replica()
    draft = client(well, sick)
    for _ in range(10):
        assert asked(draft) == []
    assert not draft.resting
    assert sick.timeouts == [TIMEOUT / 2] * 10
    assert all(0.4 * TIMEOUT < seconds <= TIMEOUT for seconds in well.timeouts)


def test_failures_in_a_row_let_it_rest() -> None:
    replica = Replica(grpc.StatusCode.UNAVAILABLE)
    draft = client(replica)
    for _ in range(2):
        assert asked(draft) == ["draft: UNAVAILABLE"]
    replica.failure = None
    assert asked(draft) == []
    replica.failure = grpc.StatusCode.UNAVAILABLE
    for _ in range(3):
        assert not draft.resting
        assert asked(draft) == ["draft: UNAVAILABLE"]
    assert draft.resting
    assert asked(draft) == ["draft: left alone after a recent failure"]


def test_what_a_request_itself_is_refused_for_is_not_tried_again() -> None:
    refusing, other = Replica(grpc.StatusCode.INVALID_ARGUMENT), Replica()
    draft = client(other, refusing)
    for _ in range(5):
        assert asked(draft) == ["draft: INVALID_ARGUMENT"]
    assert (other.timeouts, draft.resting) == ([], False)


@pytest.mark.parametrize(("levels", "planned"), [(None, [1, 2, 3, 4]), (1, [1, 2]), (2, [1, 2, 3, 4])])
def test_levels_that_were_not_asked_for_are_left_out(levels: int | None, planned: list[int]) -> None:
    """A draft of an older release does not know of the limit and plans all levels."""
    replica, question = Replica(nodes=[1, 2, 3, 4]), ModelRequest(np.array([1]), Pruning.none(), Deadline(100.0))
    session = client(replica).session(question, Proposal.TOP, [])
    plan = asyncio.run(session.plan(Beams.root(), PlanSize(2, 4, 4, levels), math.inf))
    assert (plan.node.tolist(), replica.levels) == (planned, [levels or 0])


def test_a_plan_gets_the_time_that_it_may_pay_in() -> None:
    own, other = Replica(), Replica()
    draft = client(other, own)
    assert asked(draft, seconds=0.5) == asked(draft, seconds=0.5, affinity="") == []
    assert (own.timeouts, other.timeouts) == ([0.25], [0.5])
