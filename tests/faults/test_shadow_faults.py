"""A target whose answers depend on what else is in a pass: strict lists are wrong then, and shadow checks find it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import grpc
import numpy as np
import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import write_manifest
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.scoring import ScoringRule, best_children
from atspeed.engine.search.trie import ROOT, Trie
from atspeed.local.stack import ServiceProcess
from atspeed.rpc import wire
from atspeed.v1 import draft_pb2, target_pb2
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.recommendation import RecommendParams
from orchestrator.serving.track_router import bucket
from tests.bundles import random_history
from tests.observed import scrape
from tests.serving import LEVELS, TARGET, Client, FakeDraft, assert_same_list, ids, until

MISMATCHES = 3


class TableTarget:
    """A TargetService in this process that answers from a table of random logits; passes over several levels from another one.

    That is what a kernel does whose result for a token depends on the shape of the pass.
    """

    def __init__(self, trie: Trie, model_version: str) -> None:
        rng = np.random.default_rng(7)
        self._trie, self._version = trie, model_version
        self._alone, self._with_others = (
            rng.normal(size=(trie.nodes, trie.columns)).astype(np.float32) * 2 for _ in range(2)
        )
        evaluate = grpc.stream_stream_rpc_method_handler(
            self._evaluate,
            request_deserializer=target_pb2.EvaluateRequest.FromString,
            response_serializer=target_pb2.EvaluateResponse.SerializeToString,
        )
        self._server = grpc.server(ThreadPoolExecutor(16))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(TARGET, {"Evaluate": evaluate}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def _evaluate(
        self, requests: Iterator[target_pb2.EvaluateRequest], context: grpc.ServicerContext
    ) -> Iterator[target_pb2.EvaluateResponse]:
        for number, request in enumerate(requests):
            if number == 0:
                limit = request.start.max_children
                pruning = wire.pruning(request.start, "start.", self._trie)
            nodes = wire.node_ids(request.nodes, "nodes", self._trie)
            depths = self._trie.depth(nodes)
            logits = (self._alone if depths[0] == depths[-1] else self._with_others)[nodes]
            evaluation = best_children(
                self._trie,
                nodes,
                logits,
                np.log(np.exp(logits.astype(np.float64)).sum(axis=1)).astype(np.float32),
                rule=ScoringRule.VOCAB,
                pruning=pruning,
                limit=limit,
            )
            yield target_pb2.EvaluateResponse(evaluation=wire.to_evaluation(evaluation), model_version=self._version)


def first_level(trie: Trie, request: draft_pb2.PlanRequest) -> bytes:
    """A plan of every node of level 1; nothing further down."""
    if wire.vector(request.beams, "beams", "int32").tolist() != [ROOT]:
        return draft_pb2.PlanResponse().SerializeToString()
    nodes = np.arange(trie.level_start[1], trie.level_start[2])
    return draft_pb2.PlanResponse(
        nodes=wire.to_array(nodes.astype(np.int32)),
        scores=wire.to_array(np.zeros(len(nodes))),
        margins=wire.to_array(np.zeros(len(nodes))),
    ).SerializeToString()


@pytest.fixture
def canary(bundle: Path, tmp_path: Path) -> Path:
    """A bundle of the same models, whose draft is trusted differently: so the same replicas serve it."""
    found = Bundle(bundle)
    for folder in ("target", "draft", "catalogue"):
        (tmp_path / folder).symlink_to(bundle / folder)
    assert found.manifest.draft is not None
    draft = found.manifest.draft.model_copy(update={"plan_scale": (0.5,) * (LEVELS - 1)})
    write_manifest(tmp_path, found.manifest.model_copy(update={"draft": draft}))
    return tmp_path


@pytest.fixture
def orchestrator(bundle: Path, canary: Path, fake_draft: FakeDraft, log_folder: Path) -> Iterator[ServiceProcess]:
    """One that checks every strict list, before that target and a draft that foresees level 1."""
    found = Bundle(bundle)
    trie = found.catalogue().trie
    fake_draft.answer = lambda request, context: first_level(trie, request)
    with TableTarget(trie, found.manifest.model_version("target")) as target:
        flags: dict[str, object] = {
            "bundle": bundle,
            "canary-bundle": canary,
            "bundle-settle-seconds": 0,
            "target": target.address,
            "draft": fake_draft.address,
            "draft-timeout-seconds": 30,
            "planner": "fixed",
            "metrics-port": 0,
            "shadow-share": 1,
            "shadow-concurrency": 16,
            "shadow-mismatches": MISMATCHES,
        }
        service = ServiceProcess("orchestrator", flags, log_folder / "shadow.log")
        service.start()
        yield service
        service.stop()


def test_wrong_lists_are_found_and_stopped(orchestrator: ServiceProcess, catalogue: Catalogue) -> None:
    histories = [random_history(catalogue, 4, seed) for seed in range(MISMATCHES)]
    with Client(orchestrator.address) as client:
        right = [client.recommend(history, mode=pb.MODE_TARGET_ONLY) for history in histories]
        wrong = [client.recommend(history) for history in histories]
        assert not any(reply.degraded for reply in wrong), wrong[0].degraded_reasons
        assert all(ids(one) != ids(other) for one, other in zip(right, wrong, strict=True))
        until(lambda: client.info().shadow_checks.different == MISMATCHES)
        assert client.info().shadow_checks.speculation_off
        for history, expected in zip(histories, right, strict=True):
            reply = client.recommend(history)
            assert_same_list(reply, expected)
            assert reply.degraded_reasons == [pb.DEGRADED_REASON_SPECULATION_DISABLED]
            assert reply.statistics.target_passes == LEVELS
    seen = scrape(orchestrator)
    assert seen.value("atspeed_speculation_enabled", track="stable") == 0
    assert seen.value("atspeed_shadow_checks_total", track="stable", outcome="different") == MISMATCHES
    assert seen.value("atspeed_degraded_total", track="stable", reason="speculation_disabled") == MISMATCHES
    lines = orchestrator.log.read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines if "shadow_check_mismatch" in line]
    assert [line["speculation"] for line in told] == ["on"] * (MISMATCHES - 1) + ["off"]
    leaves = catalogue.leaf_of(catalogue.find(ids(wrong[0]))).tolist()
    assert [leaf for leaf, _ in told[0]["strict"]] == leaves


def test_a_restart_asks_the_draft_again(orchestrator: ServiceProcess, catalogue: Catalogue) -> None:
    with Client(orchestrator.address) as client:
        for seed in range(MISMATCHES):
            client.recommend(random_history(catalogue, 4, seed))
        until(lambda: client.info().shadow_checks.speculation_off)
    orchestrator.stop()
    orchestrator.start()
    with Client(orchestrator.address) as client:
        assert not client.info().shadow_checks.speculation_off
        assert not client.recommend(random_history(catalogue, 4, 9)).degraded


def test_wrong_lists_of_a_canary_are_held_against_the_canary_alone(
    orchestrator: ServiceProcess, catalogue: Catalogue
) -> None:
    orchestrator.stop()
    orchestrator.flags["canary-share"] = 0.5
    orchestrator.start()
    histories = [random_history(catalogue, 4, seed) for seed in range(40)]
    places = [
        bucket(RecommendParams(k=1, beam_widths=BeamWidths.of(1), history=history).subject) for history in histories
    ]
    of_canary, of_stable = (
        [history for history, at in zip(histories, places, strict=True) if (at < 0.5) is wanted]
        for wanted in (True, False)
    )
    with Client(orchestrator.address) as client:
        assert client.info().canary.share_now == 0.5
        for history in of_canary[:MISMATCHES]:
            client.recommend(history)
        until(lambda: client.info().canary.shadow_checks.speculation_off)
        assert client.recommend(of_canary[-1]).degraded
        assert not client.recommend(of_stable[-1]).degraded
        info = client.info()
    assert not info.shadow_checks.speculation_off
    assert info.canary.shadow_checks.different == MISMATCHES
    seen = scrape(orchestrator)
    assert [seen.value("atspeed_speculation_enabled", track=track) for track in ("stable", "canary")] == [1, 0]
    assert seen.value("atspeed_degraded_total", track="canary", reason="speculation_disabled") == 1
