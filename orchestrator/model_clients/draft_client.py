"""Client of the draft service. A failing draft costs a plan, never a list."""

from __future__ import annotations

import asyncio
import time

import grpc
import numpy as np
import structlog

from atspeed.concurrency.circuit_breaker import CircuitBreaker
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize, Proposal
from atspeed.engine.search.trie import Trie
from atspeed.errors import InvalidArgumentError
from atspeed.rpc import wire
from atspeed.rpc.affinity import Route, Routes
from atspeed.rpc.grpc_status import retry_after_seconds
from atspeed.v1 import draft_pb2, draft_pb2_grpc, types_pb2
from orchestrator.degraded_reason import DegradedReason
from orchestrator.model_clients.model_request import PROBE_SECONDS, BadReplyError, ModelRequest
from orchestrator.planning.usage import Usage

# Failures of the request itself: they would be the same on any replica.
_REQUEST_FAILURES = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.CANCELLED}
# Errors of grpc.aio that are no AioRpcError: the channel closed, or the call ended, during the call.
_CLOSED = (grpc.aio.BaseError, asyncio.InvalidStateError)
# Plans in a row without an answer that open the circuit. A plan that a second replica answered is none of them: concurrent
# requests may all meet one sick replica, and are all served.
_FAILURE_THRESHOLD = 3
# Characters of a model version: 16 times the 16 of a bundle's hash. A reply to a client carries the version, so it is bounded.
_MAX_VERSION_LENGTH = 256
_REASONS = {
    grpc.StatusCode.UNAVAILABLE: DegradedReason.DRAFT_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: DegradedReason.DRAFT_DEADLINE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: DegradedReason.DRAFT_BUSY,
    grpc.StatusCode.FAILED_PRECONDITION: DegradedReason.DRAFT_VERSION,
    grpc.StatusCode.INVALID_ARGUMENT: DegradedReason.DRAFT_REFUSED,
    grpc.StatusCode.UNAUTHENTICATED: DegradedReason.DRAFT_ACCESS_DENIED,
    grpc.StatusCode.PERMISSION_DENIED: DegradedReason.DRAFT_ACCESS_DENIED,
}

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class DraftClient:
    """Client of the draft service's replicas, with a circuit breaker.

    Without the breaker, a dead draft would cost every request its timeout.

    Args:
        timeout: longest wait for a plan in seconds.
        backoff_seconds: time that the circuit stays open.

    Attributes:
        circuit: the circuit breaker over all replicas.
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
        self.circuit = CircuitBreaker(_FAILURE_THRESHOLD, backoff_seconds)

    async def model_info(self) -> types_pb2.ModelInfo:
        """Return a replica's description of the model version. Raises grpc.aio.AioRpcError."""
        request = draft_pb2.DraftServiceGetModelInfoRequest(model_version=self.model_version)
        return (await self.routes.in_turn.GetModelInfo(request, timeout=PROBE_SECONDS)).model

    async def cost_curve(self) -> CostCurve:
        """Return a replica's cost curve. Raises grpc.aio.AioRpcError, or InvalidArgumentError when the reply has none."""
        return wire.cost_curve((await self.model_info()).cost_curve, "model.cost_curve")

    def session(self, request: ModelRequest, proposal: Proposal) -> DraftSession:
        """Return the draft for one request."""
        return DraftSession(self, request, proposal)


class DraftSession:
    """The draft for one request; see `sized_draft.DraftSource`.

    Attributes:
        prompt_tokens: length of the draft's prompt.
        usage: stats of the calls.
        degraded_reason: why the draft failed; None if it did not. After a failure it is not called again.
    """

    def __init__(self, client: DraftClient, request: ModelRequest, proposal: Proposal) -> None:
        self._client = client
        self._request = request
        self._proposal = proposal
        self.prompt_tokens = len(request.prompt)
        self.usage = Usage()
        self.degraded_reason: DegradedReason | None = None

    async def plan(self, below: Beams, size: PlanSize, seconds: float) -> Plan:
        """Return a plan of this size below these beams, within `seconds`; an empty plan after a failure.

        Raises DeadlineExceededError when the request's own time is up.
        """
        if self.degraded_reason is None and not self._client.circuit.allow():
            self.degraded_reason = DegradedReason.DRAFT_CIRCUIT_OPEN
        if self.degraded_reason is not None:
            return Plan.empty(below)
        started_ns = time.perf_counter_ns()
        seconds = min(self._client.timeout, seconds)
        # The draft's health is not to blame when the request's own deadline is shorter than the time for a plan.
        short_deadline = self._request.deadline.left() < seconds
        try:
            plan = await self._plan_with_retry(below, size, seconds)
        except (grpc.aio.AioRpcError, *_CLOSED, BadReplyError) as error:
            if not _is_request_failure(error) and not (short_deadline and _is_late(error)):
                hint = retry_after_seconds(error) if isinstance(error, grpc.aio.AioRpcError) else None
                self._client.circuit.record_failure(hint)
            self.degraded_reason = _reason(error)
            return Plan.empty(below)
        finally:
            self.usage.waits.append(time.perf_counter_ns() - started_ns)
        self._client.circuit.record_success()
        return plan

    async def _plan_with_retry(self, below: Beams, size: PlanSize, seconds: float) -> Plan:
        """Return the plan of the user's replica. If it fails or needs more than half of the time, ask any replica.

        Raises grpc.aio.AioRpcError, BadReplyError, or one of _CLOSED.
        """
        until = time.monotonic() + seconds
        with self._client.routes.route(self._request.affinity) as route:
            try:
                return await self._attempt(route, below, size, seconds / 2 if route.metadata else seconds)
            except (grpc.aio.AioRpcError, *_CLOSED, BadReplyError) as error:
                if not route.metadata or _is_request_failure(error):
                    raise
        left = until - time.monotonic()
        return await self._attempt(Route(self._client.routes.in_turn), below, size, left)

    async def _attempt(
        self, route: Route[draft_pb2_grpc.DraftServiceAsyncStub], below: Beams, size: PlanSize, seconds: float
    ) -> Plan:
        """Make one call. Raises grpc.aio.AioRpcError, BadReplyError, or one of _CLOSED."""
        timeout = min(seconds, self._request.deadline.left())
        metadata = (*self._request.metadata, *route.metadata)
        reply = await route.stub.Plan(self._message(below, size), timeout=timeout, metadata=metadata)
        try:
            return self._read(reply, below, size)
        except BadReplyError as error:  # logged here, since another replica may answer the plan
            _log.warning("draft_reply_invalid", error=str(error))
            raise

    def _message(self, below: Beams, size: PlanSize) -> draft_pb2.PlanRequest:
        request = self._request
        by_node = np.argsort(below.node)  # the contract wants ascending node ids
        return draft_pb2.PlanRequest(
            model_version=self._client.model_version,
            prompt=wire.to_array(request.prompt),
            pruned=wire.to_array(request.pruning.cut),
            kept=wire.to_kept(request.pruning),
            beams=wire.to_array(below.node[by_node].astype(np.int32)),
            scores=wire.to_array(below.score[by_node]),
            weights=wire.to_array(below.weight[by_node]),
            priorities=wire.to_array(below.priority[by_node]),
            beam_width=size.beam_widths.largest,
            beam_widths=size.beam_widths.per_level,
            width=size.width,
            max_nodes=size.max_nodes,
            levels=size.levels or 0,
            proposal=wire.to_proposal(self._proposal),
            perturbation=wire.to_perturbation(request.noise),
            with_evaluation=self._proposal is Proposal.SAMPLE,
            tenant=request.tenant,
            user_key=request.user_key or b"",
        )

    def _read(self, reply: object, below: Beams, size: PlanSize) -> Plan:
        """Return the reply's plan. Raises BadReplyError when it is invalid."""
        trie = self._client.trie
        if not isinstance(reply, draft_pb2.PlanResponse):  # grpc.aio returns None for bytes that it cannot parse
            raise BadReplyError("the reply is not a PlanResponse")
        if not 0 <= reply.passes <= trie.levels:
            raise BadReplyError(f"passes: must be between 0 and {trie.levels}, got {reply.passes}")
        if len(reply.model_version) > _MAX_VERSION_LENGTH:
            raise BadReplyError(f"model_version: must have at most {_MAX_VERSION_LENGTH} characters")
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
        # An older release of the draft does not know `levels` and plans all of them.
        return plan.down_to(trie, size.last_depth(trie, trie.depth_of(int(below.node[0]))))


def _is_request_failure(error: Exception) -> bool:
    """Return whether a failure belongs to the request and would be the same on any replica."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _REQUEST_FAILURES


def _is_late(error: Exception) -> bool:
    """Return whether a call's time was up."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def _reason(error: Exception) -> DegradedReason:
    """Return the reason that a failure of the draft is reported as. The draft's own text is not passed on."""
    if isinstance(error, BadReplyError):
        return DegradedReason.DRAFT_REPLY_INVALID
    if isinstance(error, grpc.aio.AioRpcError):
        return _REASONS.get(error.code(), DegradedReason.DRAFT_FAILED)
    return DegradedReason.DRAFT_UNAVAILABLE
