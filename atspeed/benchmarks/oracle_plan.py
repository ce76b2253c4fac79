"""The limit of speculation: lists made with a plan that holds exactly what the search will need, and that costs nothing.

A target-only search over the same target, made just before, says what strict will need. A stand-in for the draft, in this
process, answers with these nodes, and an orchestrator of its own makes the list over the bench's target and Redis. The wait for
the stand-in is taken off, as nobody drafts anything: what is left is one pass, and no draft of any quality could do better.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from atspeed.benchmarks.services import PATIENCE_SECONDS, Services
from atspeed.benchmarks.shared_tree_models import prompt_tokens
from atspeed.client.recommender import RecommenderClient
from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Bundle
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.trie import ROOT, Pruning
from atspeed.rpc import wire
from atspeed.rpc.affinity import Routes
from atspeed.rpc.channels import open_channel
from atspeed.v1 import draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc
from orchestrator.model_clients.model_request import ModelRequest
from orchestrator.model_clients.target_client import TargetClient
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.policies import Strict

_TARGET = target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name
_TENANT = "foreseen"  # whose caches no measured request sees


class ReadyPlan(draft_pb2_grpc.DraftServiceServicer):
    """A draft that has its answer ready: `nodes`, below the root; nothing below anything else."""

    def __init__(self) -> None:
        self.nodes: Int64 = np.empty(0, dtype=np.int64)

    async def GetModelInfo(
        self, request: draft_pb2.DraftServiceGetModelInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> draft_pb2.DraftServiceGetModelInfoResponse:
        """Nothing: there is no model."""
        return draft_pb2.DraftServiceGetModelInfoResponse()

    async def Plan(
        self, request: draft_pb2.PlanRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> draft_pb2.PlanResponse:
        """The plan."""
        from_root = wire.vector(request.beams, "beams", "int32").tolist() == [ROOT]
        nodes = self.nodes if from_root else self.nodes[:0]
        return draft_pb2.PlanResponse(
            nodes=wire.to_array(nodes.astype(np.int32)),
            scores=wire.to_array(np.zeros(len(nodes))),
            margins=wire.to_array(np.full(len(nodes), np.inf)),
            statistics=wire.to_statistics(PassStats()),
            model_version=request.model_version,
        )


@dataclass(frozen=True)
class PerfectPlans:
    """client: of the orchestrator that gets them."""

    client: RecommenderClient
    _bundle: Bundle
    _catalogue: Catalogue
    _target: TargetClient
    _ready: ReadyPlan

    async def foresee(self, history: Sequence[str], k: int) -> None:
        """Have ready what a search with K beams for this history will need."""
        tokens = prompt_tokens(self._catalogue, self._bundle.manifest.target, self._catalogue.find(history).tolist())
        question = ModelRequest(tokens, Pruning.none(), Deadline(PATIENCE_SECONDS), tenant=_TENANT)
        policy, rule = Strict(k), self._bundle.manifest.scoring_rule
        target = self._target.session(question, max_children=policy.max_children)
        try:
            found = await beam_search(self._catalogue.trie, rule, policy, target, NoDraft())
        finally:
            target.close()
        self._ready.nodes = np.array(sorted(found.memo.used - {ROOT}), dtype=np.int64)


@asynccontextmanager
async def perfect_plans(root: Path, services: Services) -> AsyncIterator[PerfectPlans]:
    """An orchestrator beside the bench's own, over the same target."""
    bundle, ready = Bundle(root), ReadyPlan()
    catalogue, version = bundle.catalogue(), bundle.manifest.model_version("target")
    async with AsyncExitStack() as stack:
        server = grpc.aio.server()
        draft_pb2_grpc.add_DraftServiceServicer_to_server(ready, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, grace=None)
        orchestrator = services.orchestrator(root, draft=f"127.0.0.1:{port}")
        orchestrator.start()
        stack.callback(orchestrator.stop)
        channel = await stack.enter_async_context(open_channel(services.target, _TARGET))
        routes = Routes(target_pb2_grpc.TargetServiceStub(channel))
        target = TargetClient(routes, catalogue.trie, version, attempts=1, pass_seconds=PATIENCE_SECONDS)
        client = RecommenderClient(orchestrator.address, timeout_seconds=PATIENCE_SECONDS)
        yield PerfectPlans(await stack.enter_async_context(client), bundle, catalogue, target, ready)
        await target.settle()
