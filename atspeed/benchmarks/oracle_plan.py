"""Oracle plans, the upper bound of speculation.

An oracle plan holds exactly the nodes that a search needs. A target-only search, made just before, finds them. A stub of the
draft in this process replies with them, and another orchestrator makes the list over the same target and Redis. The wait for
the stub is taken off, because no model drafts. What remains is one pass of the target, and no draft could do better.
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
from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.prompts import prompts_of
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.trie import ROOT, Pruning
from atspeed.rpc import wire
from atspeed.rpc.affinity import Routes
from atspeed.rpc.channels import open_channel
from atspeed.v1 import draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc
from atspeed_client import AsyncClient
from orchestrator.model_clients.model_request import ModelRequest
from orchestrator.model_clients.target_client import TargetClient
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.policies import Strict

_TARGET = target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name
_TENANT = "foreseen"  # keeps these searches out of the caches of measured requests


class StubDraft(draft_pb2_grpc.DraftServiceServicer):
    """Draft service that plans `nodes` below the root, and nothing below other beams."""

    def __init__(self) -> None:
        self.nodes: Int64 = np.empty(0, dtype=np.int64)

    async def GetModelInfo(
        self, request: draft_pb2.DraftServiceGetModelInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> draft_pb2.DraftServiceGetModelInfoResponse:
        """Return nothing: there is no model."""
        return draft_pb2.DraftServiceGetModelInfoResponse()

    async def Plan(
        self, request: draft_pb2.PlanRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> draft_pb2.PlanResponse:
        """Return the plan."""
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
class OraclePlans:
    """Oracle plans and a client of the orchestrator that gets them."""

    client: AsyncClient
    _bundle: Bundle
    _catalogue: Catalogue
    _target: TargetClient
    _draft: StubDraft

    async def prepare(self, history: Sequence[str], k: int) -> None:
        """Find the nodes that a search with K beams for this history needs, and plan them."""
        tokens = prompts_of(self._bundle, "target", self._catalogue).tokens(self._catalogue.find(history))
        request = ModelRequest(tokens, Pruning.none(), Deadline(PATIENCE_SECONDS), tenant=_TENANT)
        policy, rule = Strict(BeamWidths.of(k)), self._bundle.manifest.scoring_rule
        target = self._target.session(request, max_children=policy.max_children)
        try:
            found = await beam_search(self._catalogue.trie, rule, policy, target, NoDraft())
        finally:
            target.close()
        self._draft.nodes = np.array(sorted(found.memo.used - {ROOT}), dtype=np.int64)


@asynccontextmanager
async def oracle_plans(root: Path, services: Services) -> AsyncIterator[OraclePlans]:
    """Start another orchestrator over the same target, with a stub of the draft."""
    bundle, draft = Bundle(root), StubDraft()
    catalogue, version = bundle.catalogue(), bundle.manifest.model_version("target")
    async with AsyncExitStack() as stack:
        server = grpc.aio.server()
        draft_pb2_grpc.add_DraftServiceServicer_to_server(draft, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, grace=None)
        orchestrator = services.orchestrator(root, draft=f"127.0.0.1:{port}")
        orchestrator.start()
        stack.callback(orchestrator.stop)
        channel = await stack.enter_async_context(open_channel(services.target, _TARGET))
        routes = Routes(target_pb2_grpc.TargetServiceStub(channel))
        target = TargetClient(routes, catalogue.trie, version, attempts=1, pass_seconds=PATIENCE_SECONDS)
        client = AsyncClient(orchestrator.address, timeout_seconds=PATIENCE_SECONDS)
        yield OraclePlans(await stack.enter_async_context(client), bundle, catalogue, target, draft)
        await target.settle()
