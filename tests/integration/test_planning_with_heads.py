"""Plans of a draft with heads from a real service whose clock only the model moves: the planner's predictions come true."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest

from atspeed.concurrency.deadline import Deadline
from atspeed.engine.arrays import Float32, Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.model.host_memory import HostMemory
from atspeed.engine.model.kv_memory import PassResult
from atspeed.engine.model.level_heads import LevelHeadsDecoder
from atspeed.engine.model.token_tree import TreePass
from atspeed.engine.model.tree_session import ProgramRun
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Proposal
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning
from atspeed.rpc.affinity import Routes
from atspeed.rpc.server import running
from atspeed.v1 import draft_pb2_grpc
from draft_service.server import application
from draft_service.settings import DraftSettings
from orchestrator.model_clients.draft_client import DraftClient
from orchestrator.model_clients.model_request import ModelRequest
from orchestrator.planning.plan_passes import PlanPasses, PlanPlace
from orchestrator.planning.plan_sizer import FixedPlanSizer, PlanContext
from orchestrator.planning.planner_state import ModelLatencies
from orchestrator.planning.sized_draft import SizedDraft
from orchestrator.planning.usage import Usage
from orchestrator.search.memo import Memo
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.serving import LIVENESS_SECONDS

PASS_NS, TOKEN_NS = 3_000_000, 40_000
LEVEL_NS, NODE_NS = 700_000, 20_000
PROMPT_TOKENS = 24
LEVELS = 4


@dataclass
class ModelClock:
    """A clock in place of `time.perf_counter_ns` that moves with the model's work alone.

    Attributes:
        now_ns: the time.
        passes: the passes of the decoder so far.
    """

    now_ns: int = 0
    passes: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let passes and heads take their times."""
        run, score = HostMemory.run, LevelHeadsDecoder.score

        def timed_run(memory: HostMemory, passes: Sequence[tuple[ProgramRun, TreePass]]) -> list[PassResult]:
            self.passes += 1
            self.now_ns += PASS_NS + TOKEN_NS * sum(len(step.tokens) for _, step in passes)
            return run(memory, passes)

        def timed_score(decoder: LevelHeadsDecoder, state: Float32, path: Int64) -> tuple[Float32, Float32]:
            self.now_ns += LEVEL_NS + NODE_NS * len(path)
            return score(decoder, state, path)

        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now_ns)
        monkeypatch.setattr(HostMemory, "run", timed_run)
        monkeypatch.setattr(LevelHeadsDecoder, "score", timed_score)


class NothingEvaluated:
    """A target that has made no pass."""

    has_next_pass = False


@dataclass
class Requests:
    """Requests that plan at the root, and again below some nodes of the first level.

    Attributes:
        ratios: of the predicted to the measured time of each call, by the level that its plan hangs below.
        in_the_model: the same of the time in the model alone, by request.
    """

    client: DraftClient
    latencies: ModelLatencies
    ratios: dict[int, list[float]] = field(default_factory=lambda: {0: [], 1: []})
    in_the_model: list[float] = field(default_factory=list)

    async def serve(self, nodes: int, seed: int) -> Usage:
        """Make the two plans of a request, of at most so many nodes, and learn from them."""
        trie = self.client.trie
        prompt = np.random.default_rng(seed).integers(3, 30, PROMPT_TOKENS)
        context = PlanContext(BeamWidths.of(10), PROMPT_TOKENS, PROMPT_TOKENS)
        sizer = FixedPlanSizer(trie, context, nodes, self.latencies)
        session = self.client.session(ModelRequest(prompt, Pruning.none(), Deadline(LIVENESS_SECONDS)), Proposal.TOP)
        draft = SizedDraft(session, sizer, NothingEvaluated())
        below = trie.children(ROOT)[:3].astype(np.int64)
        for beams in (Beams.root(), Beams(below, *(np.zeros(len(below)) for _ in range(3)))):
            start = trie.depth_of(int(beams.node[0]))
            place = PlanPlace(start, len(beams), LEVELS - 1 - start)
            expected = self._expected_ns(place, nodes)
            plan = await draft.plan(beams)
            assert session.degraded_reason is None
            assert len(plan.node) == nodes
            self.ratios[start].append(expected / session.usage.waits[-1])
        sizer.learn(Memo(trie, ScoringRule.VOCAB), Usage(), session.usage)
        assert sizer.report.draft_predicted_ns is not None
        self.in_the_model.append(sizer.report.draft_predicted_ns / session.usage.cost.forward_ns)
        return session.usage

    def _expected_ns(self, place: PlanPlace, nodes: int) -> float:
        latencies = self.latencies
        share = latencies.draft_computed_share.value
        asked = np.array(nodes)
        return float(latencies.plan_passes.expected_ns(latencies.draft, place, asked, PROMPT_TOKENS, share))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    catalogue = random_catalogue(3_000, (16, 16, 12, 8), seed=1)
    return write_bundle(tmp_path_factory.mktemp("heads"), catalogue, draft_heads=True).bundle


async def test_predictions_of_plans_converge_to_what_is_measured(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service measures its curve with the same clock, so the pass is known at once, and the heads after some plans."""
    clock = ModelClock()
    clock.install(monkeypatch)
    settings = DraftSettings(bundle=bundle.root, port=0, threads=1, warm_up_seconds=0.01, drain_seconds=1)
    entry, rng = bundle.model("draft"), np.random.default_rng(0)
    async with (
        application(settings) as registrations,
        running(settings, registrations) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        routes: Routes[draft_pb2_grpc.DraftServiceAsyncStub] = Routes(stub, None, max_calls=1)
        version = bundle.manifest.model_version("draft")
        client = DraftClient(routes, bundle.catalogue().trie, version, timeout=LIVENESS_SECONDS, backoff_seconds=1)
        curve = await client.cost_curve()
        requests = Requests(client, ModelLatencies(curve, curve, PlanPasses.of(entry)))
        for seed in range(120):
            before = clock.passes
            usage = await requests.serve(int(rng.integers(20, 160)), seed)
            assert clock.passes - before == usage.passes == 2
    assert requests.in_the_model == pytest.approx([1.0] * 120, rel=0.01)
    for ratios in requests.ratios.values():
        assert ratios[0] < 0.8, "before the first plan nothing is known of the heads"
        assert float(np.mean(ratios[60:])) == pytest.approx(1.0, abs=0.03)
        assert float(np.abs(np.array(ratios[60:]) - 1).mean()) < 0.06
