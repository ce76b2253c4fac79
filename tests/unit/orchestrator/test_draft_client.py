"""Client of the draft over stub replicas: retries on another replica, and the circuit breaker."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest

from atspeed.concurrency.circuit_breaker import CircuitBreaker
from atspeed.concurrency.deadline import Deadline
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import PlanSize, Proposal
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import Pruning
from atspeed.rpc import wire
from atspeed.rpc.affinity import Routes
from atspeed.rpc.grpc_status import PUSHBACK_HEADER
from atspeed.v1 import draft_pb2, recommendation_pb2
from orchestrator.degraded_reason import DegradedReason
from orchestrator.model_clients.draft_client import DraftClient
from orchestrator.model_clients.model_request import ModelRequest
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import World

TRIE = World.random(NaiveTrie({"a": (0, 1, 0), "b": (1, 0, 0)}, [2, 2, 1]), ScoringRule.VOCAB, 1).trie
TIMEOUT = 8.0


class Replica:
    """Answers with these nodes, or fails; remembers how long it was given, and how many levels it was asked for."""

    def __init__(
        self, failure: grpc.StatusCode | None = None, nodes: Sequence[int] = (), retry_ms: str | None = None
    ) -> None:
        self.failure = failure
        self.nodes = nodes
        self.trailers = grpc.aio.Metadata(*([(PUSHBACK_HEADER, retry_ms)] if retry_ms else []))
        self.timeouts: list[float] = []
        self.levels: list[int] = []

    async def Plan(self, request: draft_pb2.PlanRequest, *, timeout: float, metadata: object) -> Any:  # noqa: ASYNC109, N802
        """One call."""
        self.timeouts.append(timeout)
        self.levels.append(request.levels)
        if self.failure is not None:
            raise grpc.aio.AioRpcError(self.failure, grpc.aio.Metadata(), self.trailers)
        zeros = wire.to_array(np.zeros(len(self.nodes)))
        nodes = wire.to_array(np.array(self.nodes, dtype=np.int32))
        return draft_pb2.PlanResponse(nodes=nodes, scores=zeros, margins=zeros, model_version="v")


def client(in_turn: Replica, own: Replica | None = None) -> DraftClient:
    routes: Routes[Any] = Routes(in_turn, own, max_calls=4)
    return DraftClient(routes, TRIE, "v", timeout=TIMEOUT, backoff_seconds=60.0)


def plan_once(draft: DraftClient, seconds: float = math.inf, affinity: str = "ann") -> DegradedReason | None:
    """One request's plan: why it was none."""
    request = ModelRequest(np.array([1]), Pruning.none(), Deadline(100.0), affinity=affinity)
    session = draft.session(request, Proposal.TOP)
    asyncio.run(session.plan(Beams.root(), PlanSize(BeamWidths.of(1), 2, 2), seconds))
    assert len(session.usage.waits) == (0 if session.degraded_reason is DegradedReason.DRAFT_CIRCUIT_OPEN else 1)
    return session.degraded_reason


@pytest.mark.parametrize("failure", [grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE])
def test_draft_client_with_one_failing_replica_gets_plans_from_another_and_stays_closed(
    failure: grpc.StatusCode,
) -> None:
    sick, well = Replica(failure), Replica()
    draft = client(well, sick)
    for _ in range(10):
        assert plan_once(draft) is None
    assert not draft.circuit.is_open
    assert sick.timeouts == [TIMEOUT / 2] * 10
    assert all(0.4 * TIMEOUT < seconds <= TIMEOUT for seconds in well.timeouts)


class WaitingReplica(Replica):
    """Answers once it has as many calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self._barrier = asyncio.Barrier(calls)

    async def Plan(self, request: draft_pb2.PlanRequest, *, timeout: float, metadata: object) -> Any:  # noqa: ASYNC109, N802
        """One call."""
        await self._barrier.wait()
        return await super().Plan(request, timeout=timeout, metadata=metadata)


async def test_concurrent_plans_that_another_replica_answers_leave_the_circuit_closed() -> None:
    """Four requests meet the sick replica before the other one has answered any of them."""
    sick, well = Replica(grpc.StatusCode.UNAVAILABLE), WaitingReplica(4)
    draft = client(well, sick)
    request = ModelRequest(np.array([1]), Pruning.none(), Deadline(100.0), affinity="ann")
    sessions = [draft.session(request, Proposal.TOP) for _ in range(4)]
    async with asyncio.timeout(TIMEOUT):
        await asyncio.gather(*(s.plan(Beams.root(), PlanSize(BeamWidths.of(1), 2, 2), math.inf) for s in sessions))
    assert [session.degraded_reason for session in sessions] == [None] * 4
    assert (len(sick.timeouts), len(well.timeouts), draft.circuit.is_open) == (4, 4, False)


def test_circuit_opens_after_three_failures_in_a_row() -> None:
    replica = Replica(grpc.StatusCode.UNAVAILABLE)
    draft = client(replica)
    for _ in range(2):
        assert plan_once(draft) is DegradedReason.DRAFT_UNAVAILABLE
    replica.failure = None
    assert plan_once(draft) is None
    replica.failure = grpc.StatusCode.UNAVAILABLE
    for _ in range(3):
        assert not draft.circuit.is_open
        assert plan_once(draft) is DegradedReason.DRAFT_UNAVAILABLE
    assert draft.circuit.is_open
    assert plan_once(draft) is DegradedReason.DRAFT_CIRCUIT_OPEN
    assert len(replica.timeouts) == 6


def test_open_circuit_lets_one_probe_through_whose_success_closes_it() -> None:
    replica = Replica(grpc.StatusCode.UNAVAILABLE)
    draft = client(replica)
    now = [0.0]
    draft.circuit = CircuitBreaker(1, 60.0, clock=lambda: now[0])
    assert plan_once(draft) is DegradedReason.DRAFT_UNAVAILABLE
    now[0] = 61.0
    assert plan_once(draft) is DegradedReason.DRAFT_UNAVAILABLE  # the probe
    assert plan_once(draft) is DegradedReason.DRAFT_CIRCUIT_OPEN
    now[0] = 122.0
    replica.failure = None
    assert plan_once(draft) is None
    assert plan_once(draft) is None


@pytest.mark.parametrize(("hint_ms", "open_at_2"), [("1000", False), ("90000", True), (None, True)])
def test_circuit_is_open_for_the_retry_hint_if_that_is_shorter(hint_ms: str | None, open_at_2: bool) -> None:
    replica = Replica(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_ms=hint_ms)
    draft = client(replica)
    now = [0.0]
    draft.circuit = CircuitBreaker(1, 60.0, clock=lambda: now[0])
    assert plan_once(draft) is DegradedReason.DRAFT_BUSY
    now[0] = 2.0
    assert draft.circuit.is_open is open_at_2
    now[0] = 61.0
    assert not draft.circuit.is_open


def test_request_that_the_draft_refuses_is_not_tried_again() -> None:
    refusing, other = Replica(grpc.StatusCode.INVALID_ARGUMENT), Replica()
    draft = client(other, refusing)
    for _ in range(5):
        assert plan_once(draft) is DegradedReason.DRAFT_REFUSED
    assert (other.timeouts, draft.circuit.is_open) == ([], False)


@pytest.mark.parametrize(("levels", "planned"), [(None, [1, 2, 3, 4]), (1, [1, 2]), (2, [1, 2, 3, 4])])
def test_plan_with_more_levels_than_requested_is_cut(levels: int | None, planned: list[int]) -> None:
    """A draft of an older release does not know of the limit and plans all levels."""
    replica, request = Replica(nodes=[1, 2, 3, 4]), ModelRequest(np.array([1]), Pruning.none(), Deadline(100.0))
    session = client(replica).session(request, Proposal.TOP)
    plan = asyncio.run(session.plan(Beams.root(), PlanSize(BeamWidths.of(2), 4, 4, levels), math.inf))
    assert (plan.node.tolist(), replica.levels) == (planned, [levels or 0])


def test_plan_call_gets_the_seconds_that_the_sizer_grants() -> None:
    own, other = Replica(), Replica()
    draft = client(other, own)
    assert plan_once(draft, seconds=0.5) is plan_once(draft, seconds=0.5, affinity="") is None
    assert (own.timeouts, other.timeouts) == ([0.25], [0.5])


def test_degraded_reasons_have_the_names_of_the_contract() -> None:
    """Every reason has a description too."""
    names = {f"DEGRADED_REASON_{reason.name}" for reason in DegradedReason}
    assert names | {"DEGRADED_REASON_UNSPECIFIED"} == set(recommendation_pb2.DegradedReason.keys())
    assert all(reason.value == reason.name.lower() and reason.description for reason in DegradedReason)
