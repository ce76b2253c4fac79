"""The orchestrator's clients against a target that says what no honest one would, or nothing at all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
import pytest

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import PlanSize, Proposal
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning
from atspeed.errors import ResourceExhaustedError, UnavailableError
from atspeed.rpc import wire
from atspeed.rpc.affinity import Routes
from atspeed.rpc.grpc_status import PUSHBACK_HEADER
from atspeed.v1 import draft_pb2_grpc, target_pb2, target_pb2_grpc, types_pb2
from orchestrator.model_clients.draft_client import DraftClient
from orchestrator.model_clients.model_request import ModelRequest, PlanUnansweredError
from orchestrator.model_clients.target_client import TargetClient, TargetSession
from tests.oracles.naive_trie import NaiveTrie
from tests.oracles.worlds import World

VERSION, ATTEMPTS, SECONDS = "table", 4, 60.0
WORLD = World.random(NaiveTrie({"a": (0, 0), "b": (0, 1), "c": (1, 0), "d": (2, 1)}, (3, 2)), ScoringRule.VOCAB, seed=1)
NOTHING = Pruning.none()


@dataclass
class Table(target_pb2_grpc.TargetServiceServicer):
    """A target that answers from a table. full: it refuses. heeds: what it makes of a request's pruning. calls, messages: how
    many came. fails_with: how it ends streams in which it may look ahead or is asked for more than the root.
    goes_on: the nodes of the pass that it makes by itself where it may, or always; repeats: how many such.
    """

    full: bool = False
    goes_on: Sequence[int] = ()
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
                await context.abort(self.fails_with, "of what was planned")
            goes_on = self.goes_on and (self.always or request.start.beam_width)
            further = [self._pass(np.array(self.goes_on), pruning)] * self.repeats if goes_on else []
            own = self._pass(nodes, pruning)
            yield target_pb2.EvaluateResponse(
                evaluation=own.evaluation, statistics=own.statistics, model_version=VERSION, further=further
            )

    def _pass(self, nodes: Int64, pruning: Pruning) -> target_pb2.FurtherPass:
        evaluation = wire.to_evaluation(WORLD.evaluate(nodes, pruning, 100))
        return target_pb2.FurtherPass(
            evaluation=evaluation, statistics=types_pb2.PassStatistics(forward_ns=self.forward_ns)
        )


@asynccontextmanager
async def asking(
    table: Table, pruning: Pruning = NOTHING, beam_width: int | None = 100, *, speculates: bool = False
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
            replace(question(pruning), speculates=speculates),
            max_children=100,
            beam_width=beam_width,
            prefetches=speculates,
        )
        yield session
        session.close()
    await server.stop(None)


def question(pruning: Pruning = NOTHING) -> ModelRequest:
    return ModelRequest(np.array([1]), pruning, Deadline(SECONDS))


async def test_a_service_that_is_full_is_asked_once_more_and_not_again() -> None:
    """Once each of all attempts went there: a service that is short of replicas got several times the calls."""
    table = Table(full=True)
    async with asking(table) as session:
        with pytest.raises(ResourceExhaustedError) as refused:
            await session.evaluate(np.array([ROOT]))
    assert table.calls == 2
    assert refused.value.retry_after_seconds == 0.25


@pytest.mark.parametrize("what", ["excluded", "allowed"])
async def test_children_that_the_request_has_pruned_are_no_answer(what: str) -> None:
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


async def test_what_the_target_did_by_itself_is_not_asked_for() -> None:
    """It counts as the passes that the search would have asked for, whose time is no longer the call's."""
    table = Table(goes_on=[1, 2], forward_ns=1000)
    async with asking(table) as session:
        await session.evaluate(np.array([ROOT]))
        ahead, waited = [session.has_next_pass], session.usage.wait_ns
        evaluation = await session.evaluate(np.array([1, 2]))
        assert [*ahead, session.has_next_pass] == [True, False]
        assert evaluation.node.tolist() == [1, 2]
        assert (session.usage.passes, session.usage.wait_ns, session.usage.waits[1]) == (2, waited, 1000)
        await session.evaluate(np.array([3]))
    assert (table.calls, table.messages, session.usage.passes, session.usage.clean) == (1, 2, 3, True)


async def test_passes_that_nobody_asked_for_are_no_answer() -> None:
    async with asking(Table(goes_on=[1, 2], always=True), beam_width=None) as session:
        with pytest.raises(UnavailableError, match="invalid answer"):
            await session.evaluate(np.array([ROOT]))
    assert session.usage.costs == []


async def test_more_passes_than_there_are_levels_are_no_answer() -> None:
    """Another replica is asked, and not to go on."""
    table = Table(goes_on=[1, 2], repeats=2)
    async with asking(table) as session:
        await session.evaluate(np.array([ROOT]))
        assert (session.has_next_pass, session.usage.retries, table.calls) == (False, 1, 2)


async def test_a_target_that_goes_another_way_is_not_believed() -> None:
    """The search asks for other beams than it came to: another replica is asked, and not to go on."""
    table = Table(goes_on=[1])
    async with asking(table) as session:
        await session.evaluate(np.array([ROOT]))
        evaluation = await session.evaluate(np.array([2, 3]))
    assert evaluation.node.tolist() == [ROOT, 2, 3]
    assert (table.calls, session.usage.retries) == (2, 1)


async def test_the_target_goes_on_from_what_was_planned_and_may_look_ahead() -> None:
    """A pass of its own may hold more than the search asks for."""
    table = Table(goes_on=[2, 3])
    async with asking(table) as session:
        await session.evaluate(np.array([ROOT, 1]))
        evaluation = await session.evaluate(np.array([2]))
        assert evaluation.node.tolist() == [2, 3]
        assert (table.messages, session.usage.passes, session.has_next_pass) == (1, 2, False)


async def test_costs_that_could_not_be_passed_on_are_no_answer() -> None:
    """Their sum would not fit into the reply's field, and the request would fail with it."""
    async with asking(Table(forward_ns=2**63)) as session:
        with pytest.raises(UnavailableError, match="invalid answer"):
            await session.evaluate(np.array([ROOT]))
    assert session.usage.costs == []


async def test_a_channel_that_closes_under_a_call_is_a_service_that_does_not_answer() -> None:
    """grpc.aio then raises neither of its RPC errors: such a request once ended as an internal error."""
    async with asking(Table()) as session:
        await session.evaluate(np.array([ROOT]))
    with pytest.raises(UnavailableError):
        await session.evaluate(np.array([ROOT]))
    channel, degraded = grpc.aio.insecure_channel("127.0.0.1:1"), list[str]()
    stub = draft_pb2_grpc.DraftServiceStub(channel)
    await channel.close()
    routes: Routes[Any] = Routes(stub)
    client = DraftClient(routes, WORLD.trie, VERSION, timeout=SECONDS, backoff_seconds=SECONDS)
    for _ in range(3):
        drafting = client.session(question(), Proposal.TOP, degraded)
        assert not client.resting
        assert not len((await drafting.plan(Beams.root(), PlanSize(5, 10, 10), SECONDS)).node)
    assert (degraded, client.resting) == (["draft: UNAVAILABLE"] * 3, True)


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INVALID_ARGUMENT])
@pytest.mark.parametrize("planned", [[], [1, 2]], ids=["foreseen", "planned"])
async def test_a_plan_that_has_no_answer_is_given_up_at_once(code: grpc.StatusCode, planned: list[int]) -> None:
    """No second replica is asked for it. The search alone is, which may not be ahead of itself then."""
    table = Table(fails_with=code)
    async with asking(table, speculates=True) as session:
        with pytest.raises(PlanUnansweredError):
            await session.evaluate(np.array([ROOT, *planned]))
        assert table.calls == 1
        evaluation = await session.evaluate(np.array([ROOT]))
        assert evaluation.node.tolist() == [ROOT]
    assert (table.calls, session.usage.retries, session.usage.clean) == (2, 1, False)


async def test_an_answer_to_a_plan_that_is_none_is_a_plan_without_answer() -> None:
    table = Table(forward_ns=2**63)
    async with asking(table, speculates=True) as session:
        with pytest.raises(PlanUnansweredError):
            await session.evaluate(np.array([ROOT, 1]))
        with pytest.raises(UnavailableError, match="invalid answer"):
            await session.evaluate(np.array([ROOT]))
    assert table.calls == 1 + ATTEMPTS


async def test_a_busy_target_says_nothing_of_the_plan() -> None:
    """Twice the calls for one that is full already would make it worse."""
    table = Table(full=True)
    async with asking(table, speculates=True) as session:
        with pytest.raises(ResourceExhaustedError):
            await session.evaluate(np.array([ROOT, 1]))
    assert table.calls == 2
