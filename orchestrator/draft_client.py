"""The draft over gRPC. A draft that fails costs a plan, never an answer; everything that comes back is checked."""

from __future__ import annotations

import asyncio
import time

import grpc
import numpy as np
import structlog
from atspeed.v1 import draft_pb2, draft_pb2_grpc, types_pb2

from engine.beams import Beams
from engine.cost_curve import CostCurve
from engine.plan import Plan, PlanSize, Proposal
from engine.trie import Trie
from orchestrator.question import PROBE_SECONDS, BadReplyError, ModelQuestion, Usage
from service_kit import wire
from service_kit.affinity import Routes
from service_kit.errors import InvalidArgumentError, retry_after_seconds

_REQUESTS_OWN = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.CANCELLED}
_LONGEST_VERSION = 256

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class DraftClient:
    """The draft service. After a failure it is left alone for `backoff_seconds`, so that a dead draft does not cost every
    request its timeout.
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
        self.trie, self.model_version, self.timeout = trie, model_version, timeout
        self._backoff, self._ask_again_at = backoff_seconds, 0.0

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

    def rest(self, wished: float | None = None) -> None:
        """Leave it alone for a while, or for as many seconds as it wished, if that is less."""
        self._ask_again_at = time.monotonic() + min(self._backoff, self._backoff if wished is None else wished)

    def session(self, question: ModelQuestion, proposal: Proposal, degraded: list[str]) -> DraftSession:
        """The draft for one request. Why it could not help is added to `degraded`."""
        return DraftSession(self, question, proposal, degraded)


class DraftSession:
    """The draft for one request; see `planner.SizedDraft`."""

    def __init__(self, client: DraftClient, question: ModelQuestion, proposal: Proposal, degraded: list[str]) -> None:
        self._client, self._question, self._proposal = client, question, proposal
        self._degraded, self._failed = degraded, False
        self.prompt_tokens, self.usage = len(question.prompt), Usage()

    async def plan(self, below: Beams, size: PlanSize) -> Plan:
        """A plan of this size below these beams; empty, with the reason noted, when the draft fails, is late or lies.

        Raises DeadlineExceededError when the request's own time is up.
        """
        if self._failed:
            return Plan.empty(below)
        if self._client.resting:
            return self._without_plan(below, "left alone after a recent failure")
        begun = time.perf_counter_ns()
        try:
            timeout = min(self._client.timeout, self._question.deadline.left())
            return self._read(await self._call(below, size, timeout), below, size)
        except grpc.aio.AioRpcError as error:
            # A request in a hurry, or one that the draft refuses, says nothing of the draft's health.
            in_a_hurry = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and timeout < self._client.timeout
            if not in_a_hurry and error.code() not in _REQUESTS_OWN:
                self._client.rest(retry_after_seconds(error))
            return self._without_plan(below, error.code().name)
        except (grpc.aio.BaseError, asyncio.InvalidStateError):  # the channel closed, or the call ended, under it
            self._client.rest()
            return self._without_plan(below, grpc.StatusCode.UNAVAILABLE.name)
        except BadReplyError as error:
            _log.warning("draft answered nonsense", problem=str(error))
            self._client.rest()
            return self._without_plan(below, "invalid answer")
        finally:
            self.usage.waits.append(time.perf_counter_ns() - begun)

    async def _call(self, below: Beams, size: PlanSize, seconds: float) -> draft_pb2.PlanResponse:
        with self._client.routes.route(self._question.affinity) as route:
            metadata = (*self._question.metadata, *route.metadata)
            return await route.stub.Plan(self._request(below, size), timeout=seconds, metadata=metadata)

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
            cost = wire.pass_cost(reply.statistics, "statistics")
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
        return plan
