"""The target's gRPC servicer: protobuf to arrays, the evaluator, and back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from atspeed.v1 import target_pb2, target_pb2_grpc

from engine.tree_evaluator import OpenTree, Selection, TreeEvaluator
from engine.trie import Trie
from service_kit import wire
from service_kit.admission import Admission, Priority
from service_kit.admission_metrics import admission_reads
from service_kit.errors import InvalidArgumentError
from service_kit.metrics import Readings
from service_kit.served_models import ServedModel, ServedModels, served_models
from service_kit.server import Registration
from target_service.settings import TargetSettings

SERVICE = target_pb2.DESCRIPTOR.services_by_name["TargetService"]
Context = grpc.aio.ServicerContext[Any, Any]


class TargetServicer(target_pb2_grpc.TargetServiceServicer):
    """Evaluates token trees. One stream is one request; its state lives as long as the stream."""

    def __init__(self, models: ServedModels[TreeEvaluator], admission: Admission) -> None:
        self._models, self._admission = models, admission

    async def GetModelInfo(
        self, request: target_pb2.TargetServiceGetModelInfoRequest, context: Context
    ) -> target_pb2.TargetServiceGetModelInfoResponse:
        """What this replica serves."""
        version, served = request.model_version, sorted(self._models.versions.served)
        model = self._models.find(version, "model_version") if version else self._models.newest
        return target_pb2.TargetServiceGetModelInfoResponse(model=model.info, model_versions=served)

    async def Evaluate(
        self, request_iterator: AsyncIterator[target_pb2.EvaluateRequest], context: Context
    ) -> AsyncIterator[target_pb2.EvaluateResponse]:
        """One pass per message. A stream has its place until it ends: what it evaluated stays in memory for so long."""
        async with (
            self._admission.place(Priority.of(context), context.time_remaining()),
            aclosing(self._passes(request_iterator)) as passes,
        ):
            async for response in passes:
                yield response

    async def _passes(
        self, request_iterator: AsyncIterator[target_pb2.EvaluateRequest]
    ) -> AsyncGenerator[target_pb2.EvaluateResponse, None]:
        opened: _Opened | None = None
        with ExitStack() as stack:
            async for request in request_iterator:
                if request.HasField("start") is (opened is not None):
                    raise InvalidArgumentError("start", "must be set in the first message of a stream, and only there")
                if opened is None:
                    model = self._models.find(request.start.model_version, "start.model_version")
                    stack.enter_context(model.in_use())
                    opened = await self._open(model, request.start)
                    stack.callback(model.evaluator.end, opened.tree)
                yield await opened.evaluate(request)

    async def _open(self, model: ServedModel[TreeEvaluator], start: target_pb2.EvaluateStart) -> _Opened:
        selection = self._selection(start, model.evaluator.trie)
        prompt = wire.vector(start.prompt, "start.prompt", "int64").astype(np.int64)
        owner = wire.owner(start.owner, "start.owner")
        return _Opened(model, await model.evaluator.open(prompt, tenant=start.tenant, owner=owner), selection)

    def _selection(self, start: target_pb2.EvaluateStart, trie: Trie) -> Selection:
        return Selection(
            pruning=wire.pruning(start, "start.", trie),
            limit=start.max_children or max(trie.codebook_sizes),
            perturbation=wire.optional_perturbation(start, "start.perturbation"),
        )


@dataclass(frozen=True)
class _Opened:
    """A stream's token tree, with the model that it will stay with."""

    model: ServedModel[TreeEvaluator]
    tree: OpenTree
    selection: Selection

    async def evaluate(self, request: target_pb2.EvaluateRequest) -> target_pb2.EvaluateResponse:
        """One pass."""
        evaluator, info = self.model.evaluator, self.model.info
        nodes = wire.node_ids(request.nodes, "nodes", evaluator.trie, limit=info.max_nodes)
        evaluation, cost = await evaluator.evaluate(self.tree, nodes, self.selection)
        return target_pb2.EvaluateResponse(
            evaluation=wire.to_evaluation(evaluation),
            statistics=wire.to_statistics(cost),
            model_version=info.model_version,
        )


@asynccontextmanager
async def application(settings: TargetSettings) -> AsyncIterator[list[Registration]]:
    """The target model of the settings' bundle, ready to serve."""
    async with served_models(settings, "target", lambda evaluator: evaluator) as models:
        admission = Admission(settings.max_running, settings.max_queued)
        add = target_pb2_grpc.add_TargetServiceServicer_to_server
        metrics = models.metrics.registry
        metrics.register(Readings(admission_reads(admission)))
        servicer = TargetServicer(models, admission)
        yield [Registration.of(SERVICE, add, servicer, models.versions, metrics)]
