"""The target's gRPC servicer: protobuf to arrays, the evaluator, and back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import numpy as np
from atspeed.v1 import target_pb2, target_pb2_grpc

from engine.tree_evaluator import OpenTree, Selection
from service_kit import wire
from service_kit.admission import Admission, Priority
from service_kit.admission_metrics import admission_reads
from service_kit.errors import FailedPreconditionError, InvalidArgumentError
from service_kit.metrics import Readings
from service_kit.model import ServedModel, served_model
from service_kit.server import Registration
from target_service.settings import TargetSettings

SERVICE = target_pb2.DESCRIPTOR.services_by_name["TargetService"]
Context = grpc.aio.ServicerContext[Any, Any]


class TargetServicer(target_pb2_grpc.TargetServiceServicer):
    """Evaluates token trees. One stream is one request; its state lives as long as the stream."""

    def __init__(self, model: ServedModel, admission: Admission) -> None:
        self._admission = admission
        self._model, self._evaluator, self._trie = model, model.evaluator, model.evaluator.trie

    async def GetModelInfo(
        self, request: target_pb2.TargetServiceGetModelInfoRequest, context: Context
    ) -> target_pb2.TargetServiceGetModelInfoResponse:
        """What this replica serves."""
        return target_pb2.TargetServiceGetModelInfoResponse(model=self._model.info)

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
        tree: OpenTree | None = None
        try:
            async for request in request_iterator:
                if request.HasField("start") is (tree is not None):
                    raise InvalidArgumentError("start", "must be set in the first message of a stream, and only there")
                if tree is None:
                    selection = self._selection(request.start)
                    prompt = wire.vector(request.start.prompt, "start.prompt", "int64").astype(np.int64)
                    owner = wire.owner(request.start.owner, "start.owner")
                    tree = await self._evaluator.open(prompt, tenant=request.start.tenant, owner=owner)
                nodes = wire.node_ids(request.nodes, "nodes", self._trie, limit=self._model.info.max_nodes)
                evaluation, cost = await self._evaluator.evaluate(tree, nodes, selection)
                yield target_pb2.EvaluateResponse(
                    evaluation=wire.to_evaluation(evaluation),
                    statistics=wire.to_statistics(cost),
                    model_version=self._model.info.model_version,
                )
        finally:
            if tree is not None:
                self._evaluator.end(tree)

    def _selection(self, start: target_pb2.EvaluateStart) -> Selection:
        if start.model_version != self._model.info.model_version:
            raise FailedPreconditionError(f"start.model_version: this replica serves {self._model.info.model_version}")
        return Selection(
            pruning=wire.pruning(start, "start.", self._trie),
            limit=start.max_children or max(self._trie.codebook_sizes),
            perturbation=wire.optional_perturbation(start, "start.perturbation"),
        )


@asynccontextmanager
async def application(settings: TargetSettings) -> AsyncIterator[list[Registration]]:
    """The target model of the settings' bundle, ready to serve."""
    async with served_model(settings, "target") as model:
        admission = Admission(settings.max_running, settings.max_queued)
        add = target_pb2_grpc.add_TargetServiceServicer_to_server
        model.metrics.register(Readings(admission_reads(admission)))
        servicer = TargetServicer(model, admission)
        yield [Registration.of(SERVICE, add, servicer, model.info.model_version, model.metrics)]
