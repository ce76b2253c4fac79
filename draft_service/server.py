"""The draft's gRPC servicer: decodes requests, calls the drafter, encodes plans."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np

from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import PlanSize, Proposal
from atspeed.engine.search.scoring import Evaluation
from atspeed.errors import InvalidArgumentError
from atspeed.model_host.hosted_models import HostedModel, HostedModels, served_models
from atspeed.observability.admission_metrics import admission_reads
from atspeed.observability.metrics import Readings
from atspeed.rpc import wire
from atspeed.rpc.admission import Admission, Priority
from atspeed.rpc.server import Registration
from atspeed.v1 import draft_pb2, draft_pb2_grpc
from draft_service.draft_kinds import make_drafter
from draft_service.drafter import Drafter, DraftRequest
from draft_service.metrics import PlanMetrics
from draft_service.settings import DraftSettings

SERVICE = draft_pb2.DESCRIPTOR.services_by_name["DraftService"]
Context = grpc.aio.ServicerContext[Any, Any]


class DraftServicer(draft_pb2_grpc.DraftServiceServicer):
    """Makes plans."""

    def __init__(self, models: HostedModels[Drafter], admission: Admission) -> None:
        self._models = models
        self._admission = admission
        self._metrics = PlanMetrics(models.metrics.registry)

    async def GetModelInfo(
        self, request: draft_pb2.DraftServiceGetModelInfoRequest, context: Context
    ) -> draft_pb2.DraftServiceGetModelInfoResponse:
        """Return the served model."""
        version, served = request.model_version, sorted(self._models.versions.served)
        model = self._models.find(version, "model_version") if version else self._models.stable
        return draft_pb2.DraftServiceGetModelInfoResponse(model=model.info, model_versions=served)

    async def Plan(self, request: draft_pb2.PlanRequest, context: Context) -> draft_pb2.PlanResponse:
        """Return a plan below the request's beams."""
        with self._models.find(request.model_version, "model_version").in_use() as model:
            draft_request = _RequestParser(model).parse(request)
            async with self._admission.slot(Priority.of(context), context.time_remaining()):
                drafted = await model.worker.plan(draft_request)
        self._metrics.planned(draft_request, drafted)
        plan = drafted.plan
        return draft_pb2.PlanResponse(
            nodes=wire.to_array(plan.node.astype(np.int32)),
            scores=wire.to_array(plan.score),
            margins=wire.to_array(plan.margin),
            evaluation=wire.to_evaluation(Evaluation.of(plan.evaluated)) if draft_request.with_evaluation else None,
            statistics=wire.to_statistics(drafted.cost),
            passes=drafted.passes,
            model_version=model.version,
        )


class _RequestParser:
    """Parses requests of one model version."""

    def __init__(self, model: HostedModel[Drafter]) -> None:
        self._trie = model.evaluator.trie
        self._max_nodes = model.info.max_nodes

    def parse(self, request: draft_pb2.PlanRequest) -> DraftRequest:
        """Parse a request. Raises InvalidArgumentError."""
        proposal = wire.proposal(request.proposal, "proposal")
        noise = wire.optional_perturbation(request, "perturbation")
        if proposal is not Proposal.TOP and noise is None:
            raise InvalidArgumentError("perturbation", "must be set for a sampling proposal")
        return DraftRequest(
            prompt=wire.vector(request.prompt, "prompt", "int64").astype(np.int64),
            below=self._beams(request),
            size=self._size(request),
            proposal=proposal,
            pruning=wire.pruning(request, "", self._trie),
            noise=noise,
            with_evaluation=request.with_evaluation,
            tenant=request.tenant,
            user_key=wire.user_key(request.user_key, "user_key"),
        )

    def _size(self, request: draft_pb2.PlanRequest) -> PlanSize:
        nodes = self._max_nodes
        for name, value, least, most in (
            ("beam_width", request.beam_width, 1, nodes),
            ("width", request.width, 1, nodes),
            ("max_nodes", request.max_nodes, 0, nodes),
            ("levels", request.levels, 0, self._trie.levels),
        ):
            if not least <= value <= most:
                raise InvalidArgumentError(name, f"must be between {least} and {most}, got {value}")
        max_nodes = request.max_nodes or min(nodes, request.width * self._trie.levels)
        beam_widths = wire.beam_widths(request, "", self._trie)
        return PlanSize(beam_widths, request.width, max_nodes, request.levels or None)

    def _beams(self, request: draft_pb2.PlanRequest) -> Beams:
        node = wire.node_ids(request.beams, "beams", self._trie, limit=self._max_nodes)
        depths = self._trie.depth(node)
        if not len(node) or depths[0] != depths[-1] or depths[0] >= self._trie.levels:
            raise InvalidArgumentError("beams", "must be one or more inner nodes of one depth")
        parts = {
            name: wire.vector(getattr(request, name), name, "float64") for name in ("scores", "weights", "priorities")
        }
        if request.proposal != draft_pb2.PROPOSAL_PERTURBED:  # the other proposals have scores only
            parts |= {name: parts["scores"] for name in ("weights", "priorities") if not len(parts[name])}
        for name, values in parts.items():
            if len(values) != len(node) or not np.isfinite(values.astype(np.float64)).all():
                raise InvalidArgumentError(name, f"must be {len(node)} finite numbers, one per beam")
        return Beams(node, *(values.astype(np.float64) for values in parts.values()))


@asynccontextmanager
async def application(settings: DraftSettings) -> AsyncIterator[list[Registration]]:
    """Load the draft model of the settings' bundle and yield its service."""
    async with served_models(settings, "draft", make_drafter) as models:
        admission = Admission(settings.max_running, settings.max_queued)
        add = draft_pb2_grpc.add_DraftServiceServicer_to_server
        metrics = models.metrics.registry
        metrics.register(Readings(admission_reads(admission)))
        servicer = DraftServicer(models, admission)
        yield [Registration.of(SERVICE, add, servicer, models.versions, metrics)]
