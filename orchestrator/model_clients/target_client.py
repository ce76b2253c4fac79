"""Client of the target service: one stream per request, with retries.

A stream that breaks is replaced by one to another replica. The memo keeps what was evaluated, so a new stream only has to see the
ancestors of the missing nodes.

Every reply is checked against the contract and the request. Shadow checks find scores that are wrong in spite of a valid form.

In a request's first pass the target may start an autonomous search: it makes the passes that the loop is about to ask for, and
returns them with its first reply. The loop's next calls are then answered from them, without a message each.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

import grpc
import numpy as np
import structlog

from atspeed.concurrency.tasks import TaskSet
from atspeed.engine.arrays import Int64
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import ROOT, Trie
from atspeed.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from atspeed.observability import tracing
from atspeed.rpc import wire
from atspeed.rpc.affinity import Routes
from atspeed.rpc.grpc_status import retry_after_seconds
from atspeed.v1 import target_pb2, target_pb2_grpc, types_pb2
from orchestrator.model_clients.model_request import PROBE_SECONDS, BadReplyError, ModelRequest, PlanUnansweredError
from orchestrator.model_clients.pass_ledger import MadePass, PassLedger
from orchestrator.planning.usage import Usage

Stream = grpc.aio.StreamStreamCall[target_pb2.EvaluateRequest, target_pb2.EvaluateResponse]

# Another replica may answer these. FAILED_PRECONDITION: the replica serves another version. RESOURCE_EXHAUSTED has a rule of its
# own, see `_should_retry`.
_RETRIED_STATUSES = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
}
# A plan may cause these: a node whose pass fails or gives no numbers, or more nodes than the replica takes.
_PLAN_STATUSES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INVALID_ARGUMENT}
_ACCESS_STATUSES = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
# Full replicas that one pass meets before the caller is told to come back. One other replica may be idle; with more attempts a
# service that is short of replicas would get several times the calls.
_MAX_REFUSALS = 2
# Pause before a retry, times the number of the attempt: connections to another replica are there, so it may be short.
_RETRY_PAUSE_SECONDS = 0.05
# Longest wait for the end of a finished stream: a healthy replica ends it in milliseconds.
_STREAM_END_SECONDS = 1.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class TargetClient:
    """Client of the target service's replicas.

    Args:
        attempts: number of replicas that are tried for a pass.
        pass_seconds: longest wait for one pass.
    """

    def __init__(
        self,
        routes: Routes[target_pb2_grpc.TargetServiceAsyncStub],
        trie: Trie,
        model_version: str,
        *,
        attempts: int,
        pass_seconds: float,
    ) -> None:
        self.routes = routes
        self.trie = trie
        self.model_version = model_version
        self.attempts = attempts
        self.pass_seconds = pass_seconds
        self._finishing = TaskSet()

    async def model_info(self) -> types_pb2.ModelInfo:
        """Return a replica's description of the model version. Raises grpc.aio.AioRpcError."""
        request = target_pb2.TargetServiceGetModelInfoRequest(model_version=self.model_version)
        return (await self.routes.in_turn.GetModelInfo(request, timeout=PROBE_SECONDS)).model

    async def cost_curve(self) -> CostCurve:
        """Return a replica's cost curve. Raises grpc.aio.AioRpcError, or InvalidArgumentError when the reply has none."""
        return wire.cost_curve((await self.model_info()).cost_curve, "model.cost_curve")

    def finish(self, stream: Stream) -> None:
        """End a stream in the background, after its last reply."""
        self._finishing.start(_finish(stream), "target-stream-end")

    async def settle(self) -> None:
        """Wait for the streams that are ending."""
        await self._finishing.join()

    def session(
        self,
        request: ModelRequest,
        *,
        max_children: int | None,
        beam_widths: BeamWidths | None = None,
        prefetches: bool = False,
        speculates: bool = False,
    ) -> TargetSession:
        """Open a stream for one request; see `interfaces.TargetModel`."""
        return TargetSession(self, request, max_children, beam_widths, prefetches=prefetches, speculates=speculates)


class TargetSession:
    """A stream to one replica after the other, for one request; see `interfaces.RequestTarget`."""

    def __init__(
        self,
        client: TargetClient,
        request: ModelRequest,
        max_children: int | None,
        beam_widths: BeamWidths | None = None,
        *,
        prefetches: bool = False,
        speculates: bool = False,
    ) -> None:
        self._client = client
        self._request = request
        self._max_children = max_children
        self._beam_widths = beam_widths
        self._prefetches = prefetches
        self._speculates = speculates
        self._ledger = PassLedger()
        self._stream: Stream | None = None
        self._route = ExitStack()
        self._nodes_on_stream: set[int] = set()
        self._reply_received = False
        self._refusals = 0
        self._calls = 0

    @property
    def usage(self) -> Usage:
        """Return the stats of the passes that the search has used."""
        return self._ledger.usage

    @property
    def has_next_pass(self) -> bool:
        """Return whether the target has made the next pass already."""
        return self._ledger.has_next

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Make one pass. Raises UnavailableError when no replica could answer, DeadlineExceededError when time is up.

        Raises PlanUnansweredError, once, when the session speculates and a replica has no valid answer. From then on the
        session does not speculate and uses another stream: the caller starts its search again, without a plan.
        """
        self._calls += 1
        with tracing.span("evaluate", number=self._calls, nodes=len(nodes)):
            if (made := self._ledger.next_for(nodes)) is not None:
                return made
            started_ns = time.perf_counter_ns()
            try:
                return await self._evaluate_with_retries(nodes)
            finally:
                self.usage.waits.append(time.perf_counter_ns() - started_ns)

    def close(self) -> None:
        """End the stream, so that the replica frees its state. A stream without its reply is cancelled."""
        if self._stream is not None:
            if self._reply_received:
                self._client.finish(self._stream)
            else:
                self._stream.cancel()
            self._stream = None
        self._route.close()
        self._ledger.clear()

    async def _evaluate_with_retries(self, nodes: Int64) -> Evaluation:
        for attempt in range(1, self._client.attempts + 1):
            try:
                async with asyncio.timeout(self._client.pass_seconds * self._max_passes(nodes)):
                    return await self._evaluate_on_stream(nodes)
            except grpc.aio.AioRpcError as error:
                if error.code() in _PLAN_STATUSES:
                    self._stop_speculating(error.code().name)
                failure, retry = _translate(error), self._should_retry(error.code())
            except TimeoutError:
                failure, retry = UnavailableError("no target replica answered in time"), True
            except (
                asyncio.InvalidStateError,
                grpc.aio.BaseError,
            ):  # the stream had ended before the request was written
                failure, retry = UnavailableError("no target replica could answer"), True
            except BadReplyError as error:
                _log.warning("target_reply_invalid", error=str(error))
                self._stop_speculating("invalid reply")
                failure, retry = UnavailableError("the target gave an invalid answer"), True
            self.close()
            if not retry or attempt == self._client.attempts:
                raise failure
            self.usage.retries += 1
            await asyncio.sleep(min(_RETRY_PAUSE_SECONDS * attempt, self._request.deadline.left()))
        raise AssertionError("unreachable: attempts is at least 1")

    def _stop_speculating(self, cause: str) -> None:
        """Raise PlanUnansweredError if the session speculates, since a plan may be the cause of the failure."""
        if not self._speculates:
            return
        _log.warning("plan_unanswered", cause=cause)
        self.close()
        self._speculates = False
        self.usage.retries += 1
        raise PlanUnansweredError

    def _should_retry(self, code: grpc.StatusCode) -> bool:
        """Return whether another replica should be tried after a failure. A pass meets at most `_MAX_REFUSALS` full replicas."""
        if code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            return code in _RETRIED_STATUSES
        self._refusals += 1
        return self._refusals < _MAX_REFUSALS

    def _is_autonomous(self, nodes: Int64) -> bool:
        """Return whether the target may search autonomously after this pass: only after the first one, without a retry."""
        return self._beam_widths is not None and int(nodes[0]) == ROOT and not self.usage.retries

    def _max_passes(self, nodes: Int64) -> int:
        return self._client.trie.levels if self._is_autonomous(nodes) else 1

    async def _evaluate_on_stream(self, nodes: Int64) -> Evaluation:
        if self._ledger.has_next:
            raise BadReplyError("further: not the passes of a beam search")
        message = target_pb2.EvaluateRequest()
        self._reply_received = False
        if self._stream is None:
            self._stream = self._open()
            message.start.CopyFrom(self._start(autonomous=self._is_autonomous(nodes)))
        asked = [node for node in self._client.trie.with_ancestors(nodes).tolist() if node not in self._nodes_on_stream]
        if message.HasField("start"):
            asked.insert(0, ROOT)
        message.nodes.CopyFrom(wire.to_array(np.asarray(asked, dtype=np.int32)))
        await self._stream.write(message)
        response = await self._stream.read()
        if not isinstance(response, target_pb2.EvaluateResponse):
            raise BadReplyError("the stream ended before its reply")
        first, *further = self._read(response, asked, max_passes=self._max_passes(nodes))
        self._ledger.add_ahead(further)
        self._nodes_on_stream.update(asked, *(reply.evaluation.node.tolist() for reply in further))
        self._reply_received = True
        return self._ledger.count(first)

    def _open(self) -> Stream:
        # A retry goes to any replica: the affinity would lead to the replica that has just failed.
        affinity = "" if self.usage.retries else self._request.affinity
        route = self._route.enter_context(self._client.routes.route(affinity))
        metadata = (*self._request.metadata, *route.metadata)
        self._nodes_on_stream = set()
        return route.stub.Evaluate(timeout=self._request.deadline.left(), metadata=metadata)

    def _start(self, *, autonomous: bool) -> target_pb2.EvaluateStart:
        request, widths = self._request, self._beam_widths if autonomous else None
        return target_pb2.EvaluateStart(
            model_version=self._client.model_version,
            prompt=wire.to_array(request.prompt),
            pruned=wire.to_array(request.pruning.cut),
            kept=wire.to_kept(request.pruning),
            max_children=self._max_children or 0,
            perturbation=wire.to_perturbation(request.noise),
            tenant=request.tenant,
            user_key=request.user_key or b"",
            beam_width=widths.largest if widths else 0,
            beam_widths=widths.per_level if widths else (),
            prefetches=autonomous and self._prefetches,
        )

    def _read(self, response: target_pb2.EvaluateResponse, asked: list[int], max_passes: int) -> list[MadePass]:
        """Return a response's passes. Raises BadReplyError if there are too many, or the first is not over `asked`."""
        if response.model_version != self._client.model_version:
            # Scores of two models must not meet in one list.
            raise BadReplyError("model_version: not the requested version")
        if 1 + len(response.further) > max_passes:
            raise BadReplyError("further: more passes than the search can have")
        self.usage.model_version = response.model_version
        replies = [self._read_pass(response.evaluation, response.statistics)]
        replies.extend(self._read_pass(further.evaluation, further.statistics) for further in response.further)
        if replies[0].evaluation.node.tolist() != asked:
            raise BadReplyError("evaluation.node: not the requested nodes")
        return replies

    def _read_pass(self, evaluation: types_pb2.Evaluation, statistics: types_pb2.PassStatistics) -> MadePass:
        """Return one pass of a response. Raises BadReplyError if this request cannot have such a pass."""
        try:
            read = wire.evaluation(evaluation, "evaluation", self._client.trie)
            stats = wire.pass_stats(statistics, "statistics")
        except InvalidArgumentError as error:
            raise BadReplyError(str(error)) from error
        if not self._request.pruning.live(read.child).all():
            raise BadReplyError("evaluation.child: a child that the request has pruned")
        return MadePass(read, stats)


async def _finish(stream: Stream) -> None:
    """End a stream in order. The replica's log and metrics then show a served request, not a cancelled one."""
    try:
        async with asyncio.timeout(_STREAM_END_SECONDS):
            await stream.done_writing()
            await stream.read()
    except (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError, TimeoutError):
        stream.cancel()


def _translate(error: grpc.aio.AioRpcError) -> Exception:
    """Return the error that a failure of the target becomes. The target's own text is not passed on."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError("the target did not answer before the request's deadline")
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return FailedPreconditionError("no target replica serves the orchestrator's model version")
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        after = retry_after_seconds(error)
        return ResourceExhaustedError("the target replicas are busy; try again later", retry_after_seconds=after)
    if error.code() in _RETRIED_STATUSES:
        return UnavailableError("no target replica could answer")
    _log.error("target_refused_request", code=error.code().name)
    if error.code() in _ACCESS_STATUSES:
        return UnavailableError("the target does not accept the orchestrator's credentials")
    return RuntimeError("the target refused a request of the orchestrator")
