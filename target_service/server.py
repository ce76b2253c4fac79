"""The target's gRPC servicer: decodes requests, evaluates, encodes replies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np

from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_session import Selection, TreeSession
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import Trie
from atspeed.errors import DeadlineExceededError, InvalidArgumentError
from atspeed.model_host.hosted_models import HostedModel, HostedModels, served_models
from atspeed.observability.admission_metrics import admission_reads
from atspeed.observability.metrics import Readings
from atspeed.rpc import wire
from atspeed.rpc.admission import Admission, Priority
from atspeed.rpc.server import Registration
from atspeed.v1 import target_pb2, target_pb2_grpc
from target_service.search_runner import Search, SearchRunner
from target_service.settings import TargetSettings

SERVICE = target_pb2.DESCRIPTOR.services_by_name["TargetService"]
Context = grpc.aio.ServicerContext[Any, Any]
_START_RULE = "must be set in the first message of a stream, and only there"


class TargetServicer(target_pb2_grpc.TargetServiceServicer):
    """Evaluates token trees. A stream is one request, and its state lives as long as the stream."""

    def __init__(self, models: HostedModels[SearchRunner], admission: Admission, idle_seconds: float) -> None:
        self._models = models
        self._admission = admission
        self._idle_seconds = idle_seconds

    async def GetModelInfo(
        self, request: target_pb2.TargetServiceGetModelInfoRequest, context: Context
    ) -> target_pb2.TargetServiceGetModelInfoResponse:
        """Return the served model."""
        version, served = request.model_version, sorted(self._models.versions.served)
        model = self._models.find(version, "model_version") if version else self._models.stable
        return target_pb2.TargetServiceGetModelInfoResponse(model=model.info, model_versions=served)

    async def Evaluate(
        self, request_iterator: AsyncIterator[target_pb2.EvaluateRequest], context: Context
    ) -> AsyncIterator[target_pb2.EvaluateResponse]:
        """Make a pass for each message, and after the first one an autonomous search if the start asks for it.

        A stream holds an admission slot from `start` to its end, since its KV stays in memory.
        """
        requests = _with_idle_timeout(request_iterator, self._idle_seconds)
        first = await anext(requests, None)
        if first is None:
            return
        if not first.HasField("start"):
            raise InvalidArgumentError("start", _START_RULE)
        model = self._models.find(first.start.model_version, "start.model_version")
        with model.in_use():
            async with (
                self._admission.slot(Priority.of(context), context.time_remaining()),
                aclosing(self._passes(model, first, requests)) as passes,
            ):
                async for response in passes:
                    yield response

    async def _passes(
        self,
        model: HostedModel[SearchRunner],
        first: target_pb2.EvaluateRequest,
        later: AsyncIterator[target_pb2.EvaluateRequest],
    ) -> AsyncGenerator[target_pb2.EvaluateResponse, None]:
        opened = await self._open(model, first.start)
        try:
            yield await opened.evaluate(first, opened.search)
            async for request in later:
                if request.HasField("start"):
                    raise InvalidArgumentError("start", _START_RULE)
                yield await opened.evaluate(request)
        finally:
            model.evaluator.end(opened.tree)

    async def _open(self, model: HostedModel[SearchRunner], start: target_pb2.EvaluateStart) -> _Opened:
        selection = self._selection(start, model.evaluator.trie)
        prompt = wire.vector(start.prompt, "start.prompt", "int64").astype(np.int64)
        user_key = wire.user_key(start.user_key, "start.user_key")
        if not 0 <= start.beam_width <= model.info.max_nodes:
            raise InvalidArgumentError("start.beam_width", f"must be between 0 and {model.info.max_nodes}")
        if start.max_children < 0:
            raise InvalidArgumentError("start.max_children", f"must be at least 0, got {start.max_children}")
        widths = wire.beam_widths(start, "start.", model.evaluator.trie)
        search = Search(widths, start.prefetches) if start.beam_width else None
        tree = await model.evaluator.open(prompt, tenant=start.tenant, user_key=user_key)
        return _Opened(model, tree, selection, search)

    def _selection(self, start: target_pb2.EvaluateStart, trie: Trie) -> Selection:
        return Selection(
            pruning=wire.pruning(start, "start.", trie),
            limit=start.max_children or max(trie.codebook_sizes),
            perturbation=wire.optional_perturbation(start, "start.perturbation"),
        )


@dataclass(frozen=True)
class _Opened:
    """An open stream.

    Attributes:
        model: the model that serves the stream to its end.
        tree: the token tree.
        selection: the children that an evaluation returns.
        search: the autonomous search after the first pass; None for none.
    """

    model: HostedModel[SearchRunner]
    tree: TreeSession
    selection: Selection
    search: Search | None

    async def evaluate(
        self, request: target_pb2.EvaluateRequest, search: Search | None = None
    ) -> target_pb2.EvaluateResponse:
        """Make one pass, and then the passes of `search` if it is given."""
        evaluator, info = self.model.evaluator, self.model.info
        nodes = wire.node_ids(request.nodes, "nodes", evaluator.trie, limit=info.max_nodes)
        if search is None:
            return self._response(*await evaluator.evaluate(self.tree, nodes, self.selection))
        first, *further = await self.model.worker.search(self.tree, nodes, self.selection, search)
        response = self._response(first.evaluation, first.cost)
        for one in further:
            response.further.add(evaluation=wire.to_evaluation(one.evaluation), statistics=wire.to_statistics(one.cost))
        return response

    def _response(self, evaluation: Evaluation, cost: PassStats) -> target_pb2.EvaluateResponse:
        return target_pb2.EvaluateResponse(
            evaluation=wire.to_evaluation(evaluation),
            statistics=wire.to_statistics(cost),
            model_version=self.model.info.model_version,
        )


async def _with_idle_timeout(
    requests: AsyncIterator[target_pb2.EvaluateRequest], idle_seconds: float
) -> AsyncGenerator[target_pb2.EvaluateRequest, None]:
    """Yield the messages of a stream. A stream that is silent for too long is ended, as it would keep its memory."""
    while True:
        try:
            async with asyncio.timeout(idle_seconds):
                request = await anext(requests, None)
        except TimeoutError:
            raise DeadlineExceededError(f"the stream was silent for {idle_seconds:g} s") from None
        if request is None:
            return
        yield request


@asynccontextmanager
async def application(settings: TargetSettings) -> AsyncIterator[list[Registration]]:
    """Load the target model of the settings' bundle and yield its service."""
    async with served_models(settings, "target", partial(SearchRunner, max_nodes=settings.max_nodes)) as models:
        admission = Admission(settings.max_running, settings.max_queued)
        add = target_pb2_grpc.add_TargetServiceServicer_to_server
        metrics = models.metrics.registry
        metrics.register(Readings(admission_reads(admission)))
        servicer = TargetServicer(models, admission, settings.stream_idle_seconds)
        yield [Registration.of(SERVICE, add, servicer, models.versions, metrics)]
