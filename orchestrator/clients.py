"""The draft and the target over gRPC: deadlines, retries on another replica, fallback. Everything that comes back is checked.

A draft that fails costs a plan, never an answer. A target stream that breaks is taken up on another replica: the memo
keeps what was evaluated, so the new stream only has to see the ancestors of what is still missing.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import grpc
import numpy as np
import structlog
from atspeed.v1 import draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc, types_pb2

from engine.beams import Beams
from engine.plan import Plan, PlanSize, Proposal
from engine.scoring import Evaluation, Perturbation
from engine.tree_evaluator import PassCost
from engine.trie import ROOT, Int64, Pruning, Trie
from service_kit import wire
from service_kit.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
)

_PROPOSALS = {
    Proposal.TOP: draft_pb2.PROPOSAL_TOP,
    Proposal.PERTURBED: draft_pb2.PROPOSAL_PERTURBED,
    Proposal.SAMPLE: draft_pb2.PROPOSAL_SAMPLE,
}
# What another replica may answer better. FAILED_PRECONDITION is a replica with another catalogue snapshot,
# RESOURCE_EXHAUSTED one that serves as many calls as it may.
_ANOTHER_REPLICA = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_RETRY_PAUSE_SECONDS = 0.05
_PROBE_SECONDS = 1.0
_MOST_NS = 2**48  # three days
_LONGEST_VERSION = 256


class Deadline:
    """When a request must be done, on the monotonic clock. The time left travels with every call."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left. Raises DeadlineExceededError when there are none."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError("the request's deadline has passed")
        return left


@dataclass(frozen=True)
class ModelQuestion:
    """What both models are told of a request. prompt: int64 [prompt], in the vocabulary of the model asked."""

    prompt: Int64
    pruning: Pruning
    deadline: Deadline
    noise: Perturbation | None = None
    tenant: str = ""


@dataclass
class Usage:
    """What one model's part of a request took. wait_ns: nanoseconds that the orchestrator waited for it."""

    cost: PassCost = field(default_factory=PassCost)
    passes: int = 0
    wait_ns: int = 0
    retries: int = 0
    model_version: str = ""


class BadReplyError(Exception):
    """A service answered something that no honest one could."""


class DraftClient:
    """The draft service. After a failure it is left alone for `backoff_seconds`, so that a dead draft does not cost every
    request its timeout.
    """

    def __init__(
        self, channel: grpc.aio.Channel, trie: Trie, catalogue_version: str, *, timeout: float, backoff_seconds: float
    ) -> None:
        self.stub: draft_pb2_grpc.DraftServiceAsyncStub = draft_pb2_grpc.DraftServiceStub(channel)
        self.trie, self.catalogue_version, self.timeout = trie, catalogue_version, timeout
        self._backoff, self._ask_again_at = backoff_seconds, 0.0

    async def model_info(self) -> types_pb2.ModelInfo:
        """What a replica serves. Raises grpc.aio.AioRpcError."""
        request = draft_pb2.DraftServiceGetModelInfoRequest()
        return (await self.stub.GetModelInfo(request, timeout=_PROBE_SECONDS)).model

    @property
    def resting(self) -> bool:
        """Whether it failed so recently that it is not asked."""
        return time.monotonic() < self._ask_again_at

    def rest(self) -> None:
        """Leave it alone for a while."""
        self._ask_again_at = time.monotonic() + self._backoff

    def session(self, question: ModelQuestion, size: PlanSize, proposal: Proposal, degraded: list[str]) -> DraftSession:
        """The draft for one request. Why it could not help is added to `degraded`."""
        return DraftSession(self, question, size, proposal, degraded)


class DraftSession:
    """The draft for one request; see `beam_loop.Draft`."""

    def __init__(
        self, client: DraftClient, question: ModelQuestion, size: PlanSize, proposal: Proposal, degraded: list[str]
    ) -> None:
        self._client, self._question, self._size, self._proposal = client, question, size, proposal
        self._degraded, self._failed = degraded, False
        self.usage = Usage()

    async def plan(self, below: Beams) -> Plan:
        """A plan below these beams; an empty one, with the reason noted, when the draft fails, is late or talks nonsense."""
        if self._failed:
            return Plan.empty(below)
        if self._client.resting:
            return self._without_plan(below, "left alone after a recent failure")
        begun = time.perf_counter_ns()
        try:
            timeout = min(self._client.timeout, self._question.deadline.left())
            reply = await self._client.stub.Plan(self._request(below), timeout=timeout)
            return self._read(reply, below)
        except grpc.aio.AioRpcError as error:
            self._client.rest()
            return self._without_plan(below, error.code().name)
        except BadReplyError as error:
            _log.warning("draft answered nonsense", problem=str(error))
            self._client.rest()
            return self._without_plan(below, "invalid answer")
        finally:
            self.usage.wait_ns += time.perf_counter_ns() - begun

    def _without_plan(self, below: Beams, reason: str) -> Plan:
        self._failed = True
        self._degraded.append(f"draft: {reason}")
        return Plan.empty(below)

    def _request(self, below: Beams) -> draft_pb2.PlanRequest:
        question, order = self._question, np.argsort(below.node)
        return draft_pb2.PlanRequest(
            catalogue_version=self._client.catalogue_version,
            prompt=wire.to_array(question.prompt),
            pruned=wire.to_array(question.pruning.cut),
            beams=wire.to_array(below.node[order].astype(np.int32)),
            scores=wire.to_array(below.score[order]),
            weights=wire.to_array(below.weight[order]),
            priorities=wire.to_array(below.priority[order]),
            width=self._size.width,
            max_nodes=self._size.max_nodes,
            proposal=_PROPOSALS[self._proposal],
            perturbation=wire.to_perturbation(question.noise),
            with_evaluation=self._proposal is Proposal.SAMPLE,
            tenant=question.tenant,
        )

    def _read(self, reply: object, below: Beams) -> Plan:
        """The reply as a plan. Raises BadReplyError when it is not one."""
        trie = self._client.trie
        if not isinstance(reply, draft_pb2.PlanResponse):  # grpc.aio gives None for bytes that it cannot read
            raise BadReplyError("not a message")
        cost = wire.pass_cost(reply.statistics)
        if cost.forward_ns > _MOST_NS or reply.passes > trie.levels or len(reply.model_version) > _LONGEST_VERSION:
            raise BadReplyError("statistics: beyond all bounds")  # they could not be passed on
        try:
            evaluation = wire.evaluation(reply.evaluation, "evaluation", trie) if reply.HasField("evaluation") else None
            node = wire.node_ids(reply.nodes, "nodes", trie)
            score = wire.vector(reply.scores, "scores", "float64").astype(np.float64)
            plan = Plan(below, node, score, dict(evaluation.items() if evaluation else ()))
            plan.check(trie, limit=self._size.width * trie.levels)
        except (InvalidArgumentError, ValueError) as error:
            raise BadReplyError(str(error)) from error
        self.usage.cost += cost
        self.usage.passes += reply.passes
        self.usage.model_version = reply.model_version
        return plan


class TargetClient:
    """The target service's replicas."""

    def __init__(
        self, channel: grpc.aio.Channel, trie: Trie, catalogue_version: str, *, attempts: int, pass_seconds: float
    ) -> None:
        self.stub: target_pb2_grpc.TargetServiceAsyncStub = target_pb2_grpc.TargetServiceStub(channel)
        self.trie, self.catalogue_version = trie, catalogue_version
        self.attempts, self.pass_seconds = attempts, pass_seconds

    async def model_info(self) -> types_pb2.ModelInfo:
        """What a replica serves. Raises grpc.aio.AioRpcError."""
        request = target_pb2.TargetServiceGetModelInfoRequest()
        return (await self.stub.GetModelInfo(request, timeout=_PROBE_SECONDS)).model

    def session(self, question: ModelQuestion, *, max_children: int) -> TargetSession:
        """The target for one request. Close it to free the state that the replica holds."""
        return TargetSession(self, question, max_children)


class TargetSession:
    """The target for one request: one stream, replaced by one to another replica when it breaks; see `beam_loop.Target`."""

    def __init__(self, client: TargetClient, question: ModelQuestion, max_children: int) -> None:
        self._client, self._question, self._max_children = client, question, max_children
        self._stream: grpc.aio.StreamStreamCall[target_pb2.EvaluateRequest, target_pb2.EvaluateResponse] | None = None
        self._on_stream: set[int] = set()
        self.usage = Usage()

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """One pass. Raises UnavailableError when no replica could answer, DeadlineExceededError when time is up."""
        begun = time.perf_counter_ns()
        try:
            return await self._evaluate_somewhere(nodes)
        finally:
            self.usage.wait_ns += time.perf_counter_ns() - begun

    async def close(self) -> None:
        """End the stream."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None

    async def _evaluate_somewhere(self, nodes: Int64) -> Evaluation:
        for attempt in range(1, self._client.attempts + 1):
            try:
                async with asyncio.timeout(self._client.pass_seconds):
                    return await self._evaluate_on_stream(nodes)
            except grpc.aio.AioRpcError as error:
                failure, again = _translate(error), error.code() in _ANOTHER_REPLICA
            except TimeoutError:
                failure, again = UnavailableError("no target replica answered in time"), True
            except asyncio.InvalidStateError:  # the stream had broken before the request was written
                failure, again = UnavailableError("no target replica could answer"), True
            except BadReplyError as error:
                _log.warning("target answered nonsense", problem=str(error))
                failure, again = UnavailableError("the target gave an invalid answer"), True
            await self.close()
            if not again or attempt == self._client.attempts:
                raise failure
            self.usage.retries += 1
            await asyncio.sleep(min(_RETRY_PAUSE_SECONDS * attempt, self._question.deadline.left()))
        raise AssertionError("unreachable: attempts is at least 1")

    async def _evaluate_on_stream(self, nodes: Int64) -> Evaluation:
        request = target_pb2.EvaluateRequest()
        if self._stream is None:
            self._stream = self._client.stub.Evaluate(timeout=self._question.deadline.left())
            self._on_stream = set()
            request.start.CopyFrom(self._start())
        asked = [node for node in self._client.trie.with_ancestors(nodes).tolist() if node not in self._on_stream]
        if request.HasField("start"):
            asked.insert(0, ROOT)
        request.nodes.CopyFrom(wire.to_array(np.asarray(asked, dtype=np.int32)))
        await self._stream.write(request)
        reply = await self._stream.read()
        if not isinstance(reply, target_pb2.EvaluateResponse):
            raise BadReplyError("the stream ended before its answer")
        self._on_stream.update(asked)
        return self._read(reply, asked)

    def _start(self) -> target_pb2.EvaluateStart:
        question = self._question
        return target_pb2.EvaluateStart(
            catalogue_version=self._client.catalogue_version,
            prompt=wire.to_array(question.prompt),
            pruned=wire.to_array(question.pruning.cut),
            max_children=self._max_children,
            perturbation=wire.to_perturbation(question.noise),
            tenant=question.tenant,
        )

    def _read(self, reply: target_pb2.EvaluateResponse, asked: list[int]) -> Evaluation:
        """The reply's evaluation. Raises BadReplyError when it is not one of the nodes asked for."""
        try:
            evaluation = wire.evaluation(reply.evaluation, "evaluation", self._client.trie)
        except InvalidArgumentError as error:
            raise BadReplyError(str(error)) from error
        if evaluation.node.tolist() != asked:
            raise BadReplyError("evaluation.node: not the nodes asked for")
        if self.usage.model_version not in {"", reply.model_version}:
            # Scores of two models must not meet in one list.
            raise UnavailableError("the target's model changed during the request")
        self.usage.model_version = reply.model_version
        self.usage.cost += wire.pass_cost(reply.statistics)
        self.usage.passes += 1
        return evaluation


def _translate(error: grpc.aio.AioRpcError) -> Exception:
    """What a target's failure becomes. The target's own text goes no further than the log."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError("the target did not answer before the request's deadline")
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return FailedPreconditionError("no target replica holds the orchestrator's catalogue version")
    if error.code() in _ANOTHER_REPLICA:
        return UnavailableError("no target replica could answer")
    return RuntimeError(f"the target refused a request of the orchestrator: {error.code().name}: {error.details()}")
