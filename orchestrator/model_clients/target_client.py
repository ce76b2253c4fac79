"""The target over gRPC: one stream per request, taken up on another replica when it breaks.

Every reply is checked: it is one that an honest replica could have given to this request. Whether its numbers are the model's own
is for shadow checks to say.
The memo keeps what was evaluated, so a new stream only has to see the ancestors of what is still missing.

From a request's first pass the target is left to go on by itself: it makes the passes that the loop is about to ask for, and the
loop's questions are answered from what came of them, without a message each.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, replace

import grpc
import numpy as np
import structlog

from atspeed.engine.arrays import Int64
from atspeed.engine.model.cost_curve import CostCurve
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import ROOT, Trie, among
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
from orchestrator.planning.usage import Usage

Stream = grpc.aio.StreamStreamCall[target_pb2.EvaluateRequest, target_pb2.EvaluateResponse]

# What another replica may answer better. FAILED_PRECONDITION is a replica that serves another version. RESOURCE_EXHAUSTED, one
# that serves as many calls as it may, has a rule of its own.
_ANOTHER_REPLICA = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
}
# What a plan may be the reason for: a node whose pass fails or gives no numbers, more nodes than the replica takes.
_OF_THE_QUESTION = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INVALID_ARGUMENT}
_NOT_ALLOWED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
_MOST_REFUSALS = 2
_RETRY_PAUSE_SECONDS = 0.05
_GOODBYE_SECONDS = 1.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class TargetClient:
    """The target service's replicas."""

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
        # The event loop itself only keeps weak references to tasks.
        self._ending: set[asyncio.Task[None]] = set()

    async def model_info(self) -> types_pb2.ModelInfo:
        """What a replica says of the version. Raises grpc.aio.AioRpcError."""
        request = target_pb2.TargetServiceGetModelInfoRequest(model_version=self.model_version)
        return (await self.routes.in_turn.GetModelInfo(request, timeout=PROBE_SECONDS)).model

    async def cost_curve(self) -> CostCurve:
        """What a pass costs on a replica. Raises grpc.aio.AioRpcError, InvalidArgumentError when it does not say."""
        return wire.cost_curve((await self.model_info()).cost_curve, "model.cost_curve")

    def hang_up(self, stream: Stream) -> None:
        """End a stream whose answers have all come, in the background: nobody waits for the replica's last word."""
        task = asyncio.get_running_loop().create_task(_finish(stream))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def settle(self) -> None:
        """Wait for the streams that are being ended."""
        await asyncio.gather(*self._ending)

    def session(
        self,
        question: ModelRequest,
        *,
        max_children: int | None,
        beam_width: int | None = None,
        prefetches: bool = False,
    ) -> TargetSession:
        """Open the target for one request. Close it to free the state that the replica holds.

        Args:
            question: the prompt and everything else that the model needs.
            max_children: number of children per node that the target returns; None for all.
            beam_width: beam width of the target's autonomous search; None for no such search.
            prefetches: whether the target may evaluate nodes in advance.
        """
        return TargetSession(self, question, max_children, beam_width, prefetches=prefetches)


@dataclass(frozen=True)
class _Answer:
    """One pass."""

    evaluation: Evaluation
    cost: PassStats


class TargetSession:
    """The target for one request: one stream, replaced by one to another replica when it breaks; see `beam_loop.Target`."""

    def __init__(
        self,
        client: TargetClient,
        question: ModelRequest,
        max_children: int | None,
        beam_width: int | None = None,
        *,
        prefetches: bool = False,
    ) -> None:
        self._client = client
        self._question = question
        self._max_children = max_children
        self._beam_width = beam_width
        self._prefetches = prefetches
        self._speculates = question.speculates
        self._ahead: deque[_Answer] = deque()
        self._stream: Stream | None = None
        self._route = ExitStack()
        self._on_stream: set[int] = set()
        self._answered = False
        self._refusals = 0
        self._questions = 0
        self.usage = Usage()

    @property
    def has_next_pass(self) -> bool:
        """Return whether the target has made the next pass already."""
        return bool(self._ahead)

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Make one pass. Raises UnavailableError when no replica could answer, DeadlineExceededError when time is up.

        Raises PlanUnansweredError, once, when the session speculates and a replica has no valid answer. From then on the
        session does not speculate and uses another stream: the caller starts its search again, without a plan.
        """
        self._questions += 1
        with tracing.span("evaluate", number=self._questions, nodes=len(nodes)):
            if self._ahead and among(self._ahead[0].evaluation.node, nodes).all():
                return self._next_ahead()
            begun = time.perf_counter_ns()
            try:
                return await self._evaluate_somewhere(nodes)
            finally:
                self.usage.waits.append(time.perf_counter_ns() - begun)

    def close(self) -> None:
        """End the stream, so that the replica frees its state; at once, when an answer is still on its way."""
        if self._stream is not None:
            if self._answered:
                self._client.hang_up(self._stream)
            else:
                self._stream.cancel()
            self._stream = None
        self._route.close()
        self._ahead.clear()

    def _next_ahead(self) -> Evaluation:
        """A pass that the target made by itself. The time that it took counts as its own, not as the first call's."""
        answer = self._ahead.popleft()
        took = answer.cost.queue_ns + answer.cost.forward_ns + answer.cost.selection_ns
        self.usage.waits[0] -= took
        self.usage.waits.append(took)
        return self._note(answer)

    async def _evaluate_somewhere(self, nodes: Int64) -> Evaluation:
        for attempt in range(1, self._client.attempts + 1):
            try:
                async with asyncio.timeout(self._client.pass_seconds * self._most_passes(nodes)):
                    return await self._evaluate_on_stream(nodes)
            except grpc.aio.AioRpcError as error:
                if error.code() in _OF_THE_QUESTION:
                    self._blame_the_plan(error.code().name)
                failure, again = _translate(error), self._may_be_better_elsewhere(error.code())
            except TimeoutError:
                failure, again = UnavailableError("no target replica answered in time"), True
            except (asyncio.InvalidStateError, grpc.aio.BaseError):  # it had ended before the request was written
                failure, again = UnavailableError("no target replica could answer"), True
            except BadReplyError as error:
                _log.warning("target answered nonsense", problem=str(error))
                self._blame_the_plan("nonsense")
                failure, again = UnavailableError("the target gave an invalid answer"), True
            self.close()
            if not again or attempt == self._client.attempts:
                raise failure
            self.usage.retries += 1
            await asyncio.sleep(min(_RETRY_PAUSE_SECONDS * attempt, self._question.deadline.left()))
        raise AssertionError("unreachable: attempts is at least 1")

    def _blame_the_plan(self, answer: str) -> None:
        """Raise PlanUnansweredError where there may be a plan."""
        if not self._speculates:
            return
        _log.warning("target_has_no_answer_to_a_plan", answer=answer)
        self.close()
        self._speculates = False
        self.usage.retries += 1
        raise PlanUnansweredError

    def _may_be_better_elsewhere(self, code: grpc.StatusCode) -> bool:
        """Whether to ask another replica. Where one is full one other is asked, no more: a service that is short of replicas must
        not get several times the calls. The caller hears when to come back.
        """
        if code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            return code in _ANOTHER_REPLICA
        self._refusals += 1
        return self._refusals < _MOST_REFUSALS

    def _goes_on(self, nodes: Int64) -> bool:
        """Whether the target may go on by itself from a pass over these nodes: the first, and nothing went wrong."""
        return self._beam_width is not None and int(nodes[0]) == ROOT and not self.usage.retries

    def _most_passes(self, nodes: Int64) -> int:
        return self._client.trie.levels if self._goes_on(nodes) else 1

    async def _evaluate_on_stream(self, nodes: Int64) -> Evaluation:
        if self._ahead:
            raise BadReplyError("further: not the passes of a beam search")
        request = target_pb2.EvaluateRequest()
        self._answered = False
        if self._stream is None:
            self._stream = self._open()
            request.start.CopyFrom(self._start(goes_on=self._goes_on(nodes)))
        asked = [node for node in self._client.trie.with_ancestors(nodes).tolist() if node not in self._on_stream]
        if request.HasField("start"):
            asked.insert(0, ROOT)
        request.nodes.CopyFrom(wire.to_array(np.asarray(asked, dtype=np.int32)))
        await self._stream.write(request)
        reply = await self._stream.read()
        if not isinstance(reply, target_pb2.EvaluateResponse):
            raise BadReplyError("the stream ended before its answer")
        answer, *ahead = self._read(reply, asked, most=self._most_passes(nodes))
        self._ahead.extend(ahead)
        self._on_stream.update(asked, *(one.evaluation.node.tolist() for one in ahead))
        self._answered = True
        return self._note(answer)

    def _open(self) -> Stream:
        # Tried again, it goes elsewhere: in turn, since its key would lead to where it has just failed.
        affinity = "" if self.usage.retries else self._question.affinity
        route = self._route.enter_context(self._client.routes.route(affinity))
        metadata = (*self._question.metadata, *route.metadata)
        self._on_stream = set()
        return route.stub.Evaluate(timeout=self._question.deadline.left(), metadata=metadata)

    def _start(self, *, goes_on: bool) -> target_pb2.EvaluateStart:
        question = self._question
        return target_pb2.EvaluateStart(
            model_version=self._client.model_version,
            prompt=wire.to_array(question.prompt),
            pruned=wire.to_array(question.pruning.cut),
            kept=wire.to_kept(question.pruning),
            max_children=self._max_children or 0,
            perturbation=wire.to_perturbation(question.noise),
            tenant=question.tenant,
            owner=question.owner,
            beam_width=(self._beam_width or 0) if goes_on else 0,
            prefetches=goes_on and self._prefetches,
        )

    def _read(self, reply: target_pb2.EvaluateResponse, asked: list[int], most: int) -> list[_Answer]:
        """The reply's passes. Raises BadReplyError when the first is not over the nodes asked for, or more than `most` came."""
        if reply.model_version != self._client.model_version:
            # Scores of two models must not meet in one list.
            raise BadReplyError("model_version: not the one asked for")
        if 1 + len(reply.further) > most:
            raise BadReplyError("further: more passes than the search can have")
        self.usage.model_version = reply.model_version
        answers = [self._answer(reply.evaluation, reply.statistics)]
        answers.extend(self._answer(further.evaluation, further.statistics) for further in reply.further)
        if answers[0].evaluation.node.tolist() != asked:
            raise BadReplyError("evaluation.node: not the nodes asked for")
        return answers

    def _answer(self, evaluation: types_pb2.Evaluation, statistics: types_pb2.PassStatistics) -> _Answer:
        """One pass of a reply. Raises BadReplyError when it could not be one of this request's."""
        try:
            read = wire.evaluation(evaluation, "evaluation", self._client.trie)
            cost = wire.pass_stats(statistics, "statistics")
        except InvalidArgumentError as error:
            raise BadReplyError(str(error)) from error
        if not self._question.pruning.live(read.child).all():
            raise BadReplyError("evaluation.child: a child that this request has pruned")
        return _Answer(read, cost)

    def _note(self, answer: _Answer) -> Evaluation:
        """Count a pass that the search has come to; its evaluation."""
        cost = answer.cost
        if self.usage.passes:  # a second stream opens on the same prompt, which was counted on the first
            cost = replace(cost, memory_cached_tokens=0, redis_cached_tokens=0)
        self.usage.costs.append(cost)
        self.usage.passes += 1
        return answer.evaluation


async def _finish(stream: Stream) -> None:
    """Say goodbye in order, so that the replica's log and metrics tell a served request from a cancelled one."""
    try:
        async with asyncio.timeout(_GOODBYE_SECONDS):
            await stream.done_writing()
            await stream.read()
    except (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError, TimeoutError):
        stream.cancel()


def _translate(error: grpc.aio.AioRpcError) -> Exception:
    """What a target's failure becomes. The target's own text goes no further."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError("the target did not answer before the request's deadline")
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return FailedPreconditionError("no target replica serves the orchestrator's model version")
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        after = retry_after_seconds(error)
        return ResourceExhaustedError("the target replicas are busy; try again later", retry_after_seconds=after)
    if error.code() in _ANOTHER_REPLICA:
        return UnavailableError("no target replica could answer")
    _log.error("the target refused a request of the orchestrator", code=error.code().name)
    if error.code() in _NOT_ALLOWED:
        return UnavailableError("the target does not let the orchestrator in")
    return RuntimeError("the target refused a request of the orchestrator")
