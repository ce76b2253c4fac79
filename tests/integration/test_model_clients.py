"""The orchestrator's clients against a target with invalid replies, or none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import PlanSize, Proposal
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning
from atspeed.errors import ResourceExhaustedError, UnavailableError
from atspeed.rpc import wire
from atspeed.rpc.affinity import Routes
from atspeed.rpc.grpc_status import PUSHBACK_HEADER
from atspeed.v1 import draft_pb2_grpc, target_pb2, target_pb2_grpc, types_pb2
from orchestrator.degraded_reason import DegradedReason
from orchestrator.model_clients.draft_client import DraftClient
from orchestrator.model_clients.model_request import ModelRequest, PlanUnansweredError
from orchestrator.model_clients.target_client import TargetClient, TargetSession
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import World

VERSION, ATTEMPTS, SECONDS = "table", 4, 60.0
WORLD = World.random(NaiveTrie({"a": (0, 0), "b": (0, 1), "c": (1, 0), "d": (2, 1)}, (3, 2)), ScoringRule.VOCAB, seed=1)
NOTHING = Pruning.none()
WIDE = BeamWidths.of(100)


@dataclass
class Table(target_pb2_grpc.TargetServiceServicer):
    """A target that answers from a table.

    Attributes:
        full: whether it refuses all calls.
        autonomous: nodes of the pass that its autonomous search makes.
        always: whether it makes that pass unasked too.
        repeats: number of such passes.
        heeds: the pruning that it applies for a request's pruning.
        calls: number of streams.
        messages: number of requests on them.
        fails_with: status of streams in which it may prefetch or gets more nodes than the root.
    """

    full: bool = False
    autonomous: Sequence[int] = ()
    always: bool = False
    repeats: int = 1
    heeds: Callable[[Pruning], Pruning] = lambda pruning: pruning
    forward_ns: int = 1
    calls: int = 0
    messages: int = 0
    fails_with: grpc.StatusCode | None = None

    async def GetModelInfo(  # noqa: N802
        self, request: Any, context: Any
    ) -> target_pb2.TargetServiceGetModelInfoResponse:
        return target_pb2.TargetServiceGetModelInfoResponse()

    async def Evaluate(  # noqa: N802
        self, requests: Any, context: Any
    ) -> AsyncIterator[target_pb2.EvaluateResponse]:
        self.calls += 1
        if self.full:
            context.set_trailing_metadata(((PUSHBACK_HEADER, "250"),))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        pruning = NOTHING
        async for request in requests:
            if request.HasField("start"):
                pruning = self.heeds(wire.pruning(request.start, "start.", WORLD.trie))
            self.messages += 1
            nodes = wire.node_ids(request.nodes, "nodes", WORLD.trie)
            if self.fails_with and (request.start.prefetches or nodes.tolist() != [ROOT]):
                await context.abort(self.fails_with, "because of the plan")
            searches = self.autonomous and (self.always or request.start.beam_width)
            further = [self._pass(np.array(self.autonomous), pruning)] * self.repeats if searches else []
            own = self._pass(nodes, pruning)
            yield target_pb2.EvaluateResponse(
                evaluation=own.evaluation, statistics=own.statistics, model_version=VERSION, further=further
            )

    def _pass(self, nodes: Int64, pruning: Pruning) -> target_pb2.FurtherPass:
        evaluation = wire.to_evaluation(WORLD.evaluate(nodes, pruning, 100))
        return target_pb2.FurtherPass(
            evaluation=evaluation, statistics=types_pb2.PassStatistics(forward_ms=self.forward_ns / 1e6)
        )


@asynccontextmanager
async def asking(
    table: Table,
    pruning: Pruning = NOTHING,
    beam_widths: BeamWidths | None = WIDE,
    *,
    speculates: bool = False,
) -> AsyncIterator[TargetSession]:
    """A session with it, over gRPC."""
    server = grpc.aio.server()
    target_pb2_grpc.add_TargetServiceServicer_to_server(table, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        routes: Routes[Any] = Routes(target_pb2_grpc.TargetServiceStub(channel))
        client = TargetClient(routes, WORLD.trie, VERSION, attempts=ATTEMPTS, pass_seconds=SECONDS)
        session = client.session(
            model_request(pruning),
            max_children=100,
            beam_widths=beam_widths,
            prefetches=speculates,
            speculates=speculates,
        )
        yield session
        session.close()
    await server.stop(None)


def model_request(pruning: Pruning = NOTHING) -> ModelRequest:
    return ModelRequest(np.array([1]), pruning, Deadline(SECONDS))


async def test_full_target_is_called_twice_and_no_more() -> None:
    """Once each of all attempts went there: a service that is short of replicas got several times the calls."""
    table = Table(full=True)
    async with asking(table) as session:
        with pytest.raises(ResourceExhaustedError) as refused:
            await session.evaluate(np.array([ROOT]))
    assert table.calls == 2
    assert refused.value.retry_after_seconds == 0.25


@pytest.mark.parametrize("what", ["excluded", "allowed"])
async def test_reply_with_pruned_children_is_invalid(what: str) -> None:
    """A replica that did not know `kept` once made lists of items that were not allowed."""
    pruning = WORLD.catalogue.pruning(**{"excluded": np.empty(0, dtype=np.int64), what: WORLD.catalogue.find(["d"])})
    for heeds in (lambda _: NOTHING, lambda pruning: pruning):
        table = Table(heeds=heeds)
        async with asking(table, pruning) as session:
            if heeds(pruning) is NOTHING:
                with pytest.raises(UnavailableError, match="invalid answer"):
                    await session.evaluate(np.array([ROOT]))
                assert table.calls == ATTEMPTS
            else:
                evaluation = await session.evaluate(np.array([ROOT]))
                assert pruning.live(evaluation.child).all()


async def test_autonomous_pass_answers_the_next_call_without_a_message() -> None:
    """It counts as the passes that the search would have asked for, whose time is no longer the call's."""
    table = Table(autonomous=[1, 2], forward_ns=1000)
    async with asking(table) as session:
        await session.evaluate(np.array([ROOT]))
        ahead, waited = [session.has_next_pass], session.usage.wait_ns
        evaluation = await session.evaluate(np.array([1, 2]))
        assert [*ahead, session.has_next_pass] == [True, False]
        assert evaluation.node.tolist() == [1, 2]
        assert (session.usage.passes, session.usage.wait_ns, session.usage.waits[1]) == (2, waited, 1000)
        await session.evaluate(np.array([3]))
    assert (table.calls, table.messages, session.usage.passes, session.usage.clean) == (1, 2, 3, True)


async def test_reply_with_unrequested_passes_is_invalid() -> None:
    async with asking(Table(autonomous=[1, 2], always=True), beam_widths=None) as session:
        with pytest.raises(UnavailableError, match="invalid answer"):
            await session.evaluate(np.array([ROOT]))
    assert session.usage.costs == []


async def test_reply_with_more_passes_than_levels_is_retried_without_autonomous_search() -> None:
    """The other replica gets no beam width."""
    table = Table(autonomous=[1, 2], repeats=2)
    async with asking(table) as session:
        await session.evaluate(np.array([ROOT]))
        assert (session.has_next_pass, session.usage.retries, table.calls) == (False, 1, 2)


async def test_autonomous_pass_over_other_beams_is_retried_without_autonomous_search() -> None:
    """The search needs other beams than the pass holds."""
    table = Table(autonomous=[1])
    async with asking(table) as session:
        await session.evaluate(np.array([ROOT]))
        evaluation = await session.evaluate(np.array([2, 3]))
    assert evaluation.node.tolist() == [ROOT, 2, 3]
    assert (table.calls, session.usage.retries) == (2, 1)


async def test_autonomous_pass_may_hold_more_nodes_than_the_search_needs() -> None:
    """The rest of the nodes was prefetched."""
    table = Table(autonomous=[2, 3])
    async with asking(table) as session:
        await session.evaluate(np.array([ROOT, 1]))
        evaluation = await session.evaluate(np.array([2]))
        assert evaluation.node.tolist() == [2, 3]
        assert (table.messages, session.usage.passes, session.has_next_pass) == (1, 2, False)


async def test_reply_with_stats_beyond_the_fields_range_is_invalid() -> None:
    """Their sum would not fit into the reply's field, and the request would fail with it."""
    async with asking(Table(forward_ns=2**63)) as session:
        with pytest.raises(UnavailableError, match="invalid answer"):
            await session.evaluate(np.array([ROOT]))
    assert session.usage.costs == []


async def test_channel_closed_during_a_call_is_an_unavailable_service() -> None:
    """grpc.aio then raises neither of its RPC errors: such a request once ended as an internal error."""
    async with asking(Table()) as session:
        await session.evaluate(np.array([ROOT]))
    with pytest.raises(UnavailableError):
        await session.evaluate(np.array([ROOT]))
    channel = grpc.aio.insecure_channel("127.0.0.1:1")
    stub = draft_pb2_grpc.DraftServiceStub(channel)
    await channel.close()
    routes: Routes[Any] = Routes(stub)
    client = DraftClient(routes, WORLD.trie, VERSION, timeout=SECONDS, backoff_seconds=SECONDS)
    for _ in range(3):
        draft = client.session(model_request(), Proposal.TOP)
        assert not client.circuit.is_open
        assert not len((await draft.plan(Beams.root(), PlanSize(BeamWidths.of(5), 10, 10), SECONDS)).node)
        assert draft.degraded_reason is DegradedReason.DRAFT_UNAVAILABLE
    assert client.circuit.is_open


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INVALID_ARGUMENT])
@pytest.mark.parametrize("planned", [[], [1, 2]], ids=["prefetched", "planned"])
async def test_failure_while_speculating_raises_plan_unanswered_without_a_retry(
    code: grpc.StatusCode, planned: list[int]
) -> None:
    """The plain search then gets an answer, without prefetched nodes."""
    table = Table(fails_with=code)
    async with asking(table, speculates=True) as session:
        with pytest.raises(PlanUnansweredError):
            await session.evaluate(np.array([ROOT, *planned]))
        assert table.calls == 1
        evaluation = await session.evaluate(np.array([ROOT]))
        assert evaluation.node.tolist() == [ROOT]
    assert (table.calls, session.usage.retries, session.usage.clean) == (2, 1, False)


async def test_invalid_reply_while_speculating_raises_plan_unanswered() -> None:
    table = Table(forward_ns=2**63)
    async with asking(table, speculates=True) as session:
        with pytest.raises(PlanUnansweredError):
            await session.evaluate(np.array([ROOT, 1]))
        with pytest.raises(UnavailableError, match="invalid answer"):
            await session.evaluate(np.array([ROOT]))
    assert table.calls == 1 + ATTEMPTS


async def test_busy_target_does_not_raise_plan_unanswered() -> None:
    """Twice the calls for one that is full already would make it worse."""
    table = Table(full=True)
    async with asking(table, speculates=True) as session:
        with pytest.raises(ResourceExhaustedError):
            await session.evaluate(np.array([ROOT, 1]))
    assert table.calls == 2
