"""The draft over gRPC. A draft that fails costs a plan, never an answer; everything that comes back is checked."""

from __future__ import annotations

import asyncio
import time

import grpc
import numpy as np
import structlog

from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.trie import Trie
from atspeed.errors import InvalidArgumentError
from atspeed.rpc import wire
from atspeed.rpc.affinity import Route, Routes
from atspeed.rpc.grpc_status import retry_after_seconds
from atspeed.v1 import draft_pb2, draft_pb2_grpc, types_pb2
from orchestrator.model_clients.model_request import PROBE_SECONDS, BadReplyError, ModelRequest
from orchestrator.planning.usage import Usage

_REQUESTS_OWN = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.CANCELLED}
_CLOSED = (grpc.aio.BaseError, asyncio.InvalidStateError)  # the channel closed, or the call ended, under it
_FAILURES = 3
_LONGEST_VERSION = 256

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class DraftClient:
    """The draft service. After `_FAILURES` in a row it is left alone for `backoff_seconds`, so that a dead draft does not cost
    every request its timeout, and one sick replica does not cost the others' plans.
    """

    def __init__(
        self,
        routes: Routes[draft_pb2_grpc.DraftServiceAsyncStub],
        trie: Trie,
        model_version: str,
        *,
        timeout: float,
        backoff_seconds: float,
    ) -> None:
        self.routes = routes
        self.trie = trie
        self.model_version = model_version
        self.timeout = timeout
        self._backoff = backoff_seconds
        self._ask_again_at = 0.0
        self._failures = 0

    async def model_info(self) -> types_pb2.ModelInfo:
        """What a replica says of the version. Raises grpc.aio.AioRpcError."""
        request = draft_pb2.DraftServiceGetModelInfoRequest(model_version=self.model_version)
        return (await self.routes.in_turn.GetModelInfo(request, timeout=PROBE_SECONDS)).model

    async def cost_curve(self) -> CostCurve:
        """What a pass costs on a replica. Raises grpc.aio.AioRpcError, InvalidArgumentError when it does not say."""
        return wire.cost_curve((await self.model_info()).cost_curve, "model.cost_curve")

    @property
    def resting(self) -> bool:
        """Whether it failed so recently that it is not asked."""
        return time.monotonic() < self._ask_again_at

    def succeeded(self) -> None:
        """It answered."""
        self._failures = 0

    def failed(self, wished: float | None = None) -> None:
        """It did not. After too many in a row it is left alone for a while, or as many seconds as it wished, if that is less."""
        self._failures += 1
        if self._failures < _FAILURES:
            return
        self._ask_again_at = time.monotonic() + min(self._backoff, self._backoff if wished is None else wished)

    def session(self, question: ModelRequest, proposal: Proposal, degraded: list[str]) -> DraftSession:
        """The draft for one request. Why it could not help is added to `degraded`."""
        return DraftSession(self, question, proposal, degraded)


class DraftSession:
    """The draft for one request; see `planned_draft.SizedDraft`."""

    def __init__(self, client: DraftClient, question: ModelRequest, proposal: Proposal, degraded: list[str]) -> None:
        self._client = client
        self._question = question
        self._proposal = proposal
        self._degraded = degraded
        self._failed = False
        self.prompt_tokens = len(question.prompt)
        self.usage = Usage()

    async def plan(self, below: Beams, size: PlanSize, seconds: float) -> Plan:
        """A plan of this size below these beams, in so many seconds; empty, with the reason noted, when the draft fails, is late
        or lies.

        Raises DeadlineExceededError when the request's own time is up.
        """
        if self._failed:
            return Plan.empty(below)
        if self._client.resting:
            return self._without_plan(below, "left alone after a recent failure")
        begun = time.perf_counter_ns()
        try:
            plan = await self._plan_somewhere(below, size, min(self._client.timeout, seconds))
        except grpc.aio.AioRpcError as error:
            return self._without_plan(below, error.code().name)
        except _CLOSED:
            return self._without_plan(below, grpc.StatusCode.UNAVAILABLE.name)
        except BadReplyError:
            return self._without_plan(below, "invalid answer")
        finally:
            self.usage.waits.append(time.perf_counter_ns() - begun)
        self._client.succeeded()
        return plan

    async def _plan_somewhere(self, below: Beams, size: PlanSize, seconds: float) -> Plan:
        """Of the user's own replica, and if that fails, or is not done in half of the time, of any.

        Raises grpc.aio.AioRpcError, BadReplyError, one of _CLOSED.
        """
        until = time.monotonic() + seconds
        with self._client.routes.route(self._question.affinity) as route:
            try:
                return await self._attempt(route, below, size, seconds / 2 if route.metadata else seconds)
            except (grpc.aio.AioRpcError, *_CLOSED, BadReplyError) as error:
                if not route.metadata or _requests_own(error):
                    raise
        left = until - time.monotonic()
        return await self._attempt(Route(self._client.routes.in_turn), below, size, left)

    async def _attempt(
        self, route: Route[draft_pb2_grpc.DraftServiceAsyncStub], below: Beams, size: PlanSize, seconds: float
    ) -> Plan:
        """One call. Raises grpc.aio.AioRpcError, BadReplyError, one of _CLOSED."""
        left = self._question.deadline.left()
        metadata = (*self._question.metadata, *route.metadata)
        try:
            reply = await route.stub.Plan(self._request(below, size), timeout=min(seconds, left), metadata=metadata)
            return self._read(reply, below, size)
        except grpc.aio.AioRpcError as error:
            # A request in a hurry, or one that the draft refuses, says nothing of the draft's health.
            in_a_hurry = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and left < seconds
            if not in_a_hurry and not _requests_own(error):
                self._client.failed(retry_after_seconds(error))
            raise
        except _CLOSED:
            self._client.failed()
            raise
        except BadReplyError as error:
            _log.warning("draft answered nonsense", problem=str(error))
            self._client.failed()
            raise

    def _without_plan(self, below: Beams, reason: str) -> Plan:
        self._failed = True
        self._degraded.append(f"draft: {reason}")
        return Plan.empty(below)

    def _request(self, below: Beams, size: PlanSize) -> draft_pb2.PlanRequest:
        question, order = self._question, np.argsort(below.node)
        return draft_pb2.PlanRequest(
            model_version=self._client.model_version,
            prompt=wire.to_array(question.prompt),
            pruned=wire.to_array(question.pruning.cut),
            kept=wire.to_kept(question.pruning),
            beams=wire.to_array(below.node[order].astype(np.int32)),
            scores=wire.to_array(below.score[order]),
            weights=wire.to_array(below.weight[order]),
            priorities=wire.to_array(below.priority[order]),
            beam_width=size.beam_width,
            width=size.width,
            max_nodes=size.max_nodes,
            levels=size.levels or 0,
            proposal=wire.to_proposal(self._proposal),
            perturbation=wire.to_perturbation(question.noise),
            with_evaluation=self._proposal is Proposal.SAMPLE,
            tenant=question.tenant,
            owner=question.owner,
        )

    def _read(self, reply: object, below: Beams, size: PlanSize) -> Plan:
        """The reply as a plan. Raises BadReplyError when it is not one."""
        trie = self._client.trie
        if not isinstance(reply, draft_pb2.PlanResponse):  # grpc.aio gives None for bytes that it cannot read
            raise BadReplyError("not a message")
        if reply.passes > trie.levels or len(reply.model_version) > _LONGEST_VERSION:
            raise BadReplyError("passes or model_version: beyond all bounds")  # they could not be passed on
        try:
            cost = wire.pass_stats(reply.statistics, "statistics")
            evaluation = wire.evaluation(reply.evaluation, "evaluation", trie) if reply.HasField("evaluation") else None
            node = wire.node_ids(reply.nodes, "nodes", trie)
            score = wire.vector(reply.scores, "scores", "float64").astype(np.float64)
            margin = wire.vector(reply.margins, "margins", "float64").astype(np.float64)
            plan = Plan(below, node, score, margin, dict(evaluation.items() if evaluation else ()))
            plan.check(trie, limit=min(size.max_nodes, size.width * trie.levels))
        except (InvalidArgumentError, ValueError) as error:
            raise BadReplyError(str(error)) from error
        self.usage.costs.append(cost)
        self.usage.passes += reply.passes
        self.usage.model_version = reply.model_version
        # A draft of an older release does not know of `levels` and plans them all.
        return plan.down_to(trie, size.last_depth(trie, int(trie.depth(below.node[:1])[0])))


def _requests_own(error: Exception) -> bool:
    """Whether a failure is one of the request, and would be the same anywhere."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _REQUESTS_OWN
