"""ForgetUser with real services and a real Redis: after it, no block of the user's prompts is found in any tier."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Manifest
from atspeed.engine.kv.erasure import STREAM
from atspeed.engine.kv.redis_store import user_blocks_name
from atspeed.engine.search.trie import ROOT
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.rpc import wire
from atspeed.rpc.server import running
from atspeed.v1 import draft_pb2, target_pb2, types_pb2
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.history import LIMIT_KEY
from orchestrator.recommendation import Recommendation
from orchestrator.server import application
from orchestrator.serving.shadow import RecommenderLease, ShadowChecks
from orchestrator.settings import OrchestratorSettings
from orchestrator.user_key import user_cache_key
from tests.bundles import random_history
from tests.serving import LIVENESS_SECONDS, WINDOW, Client, EvaluateStream, draft_stub, models, until


@pytest.fixture(scope="module", params=["never", "always"], ids=["host", "paged"])
def replicas(
    request: pytest.FixtureRequest, bundle: Path, redis_server: LocalRedis, log_folder: Path
) -> Iterator[LocalStack]:
    """Two drafts and two targets, asked in turn, so that all of them come to know a user."""
    kept: dict[str, object] = {"kv-redis": "always", "redis-timeout-seconds": 10, "threads": 1, "warm-up-seconds": 0}
    kept |= {"kv-paged": request.param, "kv-device-mb": 32}
    patient: dict[str, object] = {"redis-timeout-seconds": 10, "draft-timeout-seconds": 30, "affinity-max-calls": 0}
    folder = log_folder / f"forgetting-{request.param}"
    folder.mkdir()
    flags = {"draft": kept, "target": kept, "orchestrator": patient}
    with LocalStack(bundle, redis_url=redis_server.url, drafts=2, targets=2, log_folder=folder, flags=flags) as stack:
        yield stack


@pytest.fixture
def client(redis_url: str, replicas: LocalStack) -> Iterator[Client]:
    with Client(replicas.address) as client:
        yield client


class Prober:
    """Asks replicas directly how much of a user's prompt they find; what they do not find they compute and keep."""

    def __init__(self, bundle: Path, catalogue: Catalogue, user_key: bytes, history: list[str]) -> None:
        self._manifest: Manifest = Bundle(bundle).manifest
        self._catalogue, self._user_key, self._history = catalogue, user_key, history

    def target(self, replica: ServiceProcess) -> int:
        """Cached tokens that a target finds, in memory or Redis."""
        start = target_pb2.EvaluateStart(
            model_version=self._manifest.model_version("target"), prompt=self._prompt("target"), user_key=self._user_key
        )
        nodes = wire.to_array(np.array([ROOT], dtype=np.int32))
        with models(replica.address) as channel, EvaluateStream(channel) as stream:
            statistics = stream.ask(target_pb2.EvaluateRequest(start=start, nodes=nodes)).statistics
        return sum(statistics.cached_tokens.values())

    def draft(self, replica: ServiceProcess) -> int:
        """Cached tokens that a draft finds."""
        request = draft_pb2.PlanRequest(
            model_version=self._manifest.model_version("draft"),
            prompt=self._prompt("draft"),
            user_key=self._user_key,
            beams=wire.to_array(np.array([ROOT], dtype=np.int32)),
            scores=wire.to_array(np.zeros(1)),
            width=4,
            beam_width=4,
            proposal=draft_pb2.PROPOSAL_TOP,
        )
        with models(replica.address) as channel:
            statistics = draft_stub(channel).Plan(request, timeout=LIVENESS_SECONDS).statistics
        return sum(statistics.cached_tokens.values())

    def everywhere(self, stack: LocalStack) -> list[int]:
        """Cached tokens that each replica finds."""
        return [*map(self.draft, stack.drafts), *map(self.target, stack.targets)]

    def _prompt(self, role: str) -> types_pb2.Array:
        model, catalogue = self._manifest.models[role], self._catalogue
        columns = catalogue.codes[catalogue.find(self._history)] + catalogue.trie.codebook_offset
        tokens: Int64 = np.asarray(model.code_tokens, dtype=np.int64)[columns]
        return wire.to_array(model.prompt.tokens(list(tokens)))


def test_no_block_of_an_erased_user_is_found(
    client: Client, replicas: LocalStack, redis_url: str, bundle: Path, catalogue: Catalogue
) -> None:
    """Another user with the very same history keeps everything: users share no block."""
    history = random_history(catalogue, WINDOW, seed=4000)
    probes = {user: Prober(bundle, catalogue, user_cache_key("", user), list(history)) for user in ("leaver", "stayer")}
    for user, probe in probes.items():
        client.record(user, history)
        client.recommend(user_id=user)
        until(lambda probe=probe: min(probe.everywhere(replicas)) > 0)  # type: ignore[misc]
    with redis.Redis.from_url(redis_url) as store:
        names = {user: user_blocks_name(user_cache_key("", user)) for user in probes}
        until(lambda: all(store.exists(name) for name in names.values()))

        client.stub.ForgetUser(pb.ForgetUserRequest(user_id="leaver"), timeout=LIVENESS_SECONDS)
        assert store.exists(names["leaver"]) == 0
        until(lambda: probes["leaver"].everywhere(replicas) == [0, 0, 0, 0])
        assert client.history("leaver") == []
        assert b"leaver" not in b"".join(name for name in store.scan_iter() if isinstance(name, bytes))

        assert min(probes["stayer"].everywhere(replicas)) > 0
        assert store.exists(names["stayer"]) == 1
        assert store.exists(names["leaver"]) == 0, "a replica wrote it again"


class Gate:
    """Shadow checks wait before it until it is opened, from any thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        self.waiting = 0
        check = ShadowChecks._check

        async def gated(checks: ShadowChecks, served: Recommendation, lease: RecommenderLease) -> None:
            self.waiting += 1
            await self._event.wait()
            await check(checks, served, lease)

        monkeypatch.setattr(ShadowChecks, "_check", gated)

    def open(self) -> None:
        self._loop.call_soon_threadsafe(self._event.set)


@pytest.mark.parametrize("applied", [False, True])
async def test_shadow_check_restores_no_block_of_an_erased_user(
    applied: bool,
    replicas: LocalStack,
    redis_url: str,
    bundle: Path,
    catalogue: Catalogue,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shadow check makes a list again after its reply; its user is forgotten between the two.

    applied: whether the replicas know by then, or only Redis does. The models are processes; the orchestrator is in this one.
    """
    ours = replicas.orchestrators[0].flags
    settings = OrchestratorSettings.model_validate(
        {
            "bundle": bundle,
            "port": 0,
            "redis_url": redis_url,
            "redis_timeout_seconds": 10,
            "target": ours["target"],
            "draft": ours["draft"],
            "draft_timeout_seconds": 30,
            "planner": "fixed",
            "shadow_share": 1,
            "drain_seconds": 1,
        }
    )
    gate = Gate(monkeypatch)
    async with application(settings) as registrations, running(settings, registrations) as server:
        await asyncio.to_thread(live_through, server.address, gate, replicas, redis_url, bundle, catalogue, applied)


def live_through(
    address: str, gate: Gate, replicas: LocalStack, redis_url: str, bundle: Path, catalogue: Catalogue, applied: bool
) -> None:
    """Blocking, beside the orchestrator's event loop."""
    user = f"leaver-{applied}-{address}"  # replicas remember for a minute whom they have forgotten
    history = random_history(catalogue, WINDOW, seed=5000 + applied)
    probe = Prober(bundle, catalogue, user_cache_key("", user), history)
    with Client(address) as client, redis.Redis.from_url(redis_url) as store:
        client.record(user, history)
        client.recommend(user_id=user)
        until(lambda: gate.waiting == 1)
        until(lambda: bool(store.exists(user_blocks_name(user_cache_key("", user)))))
        client.stub.ForgetUser(pb.ForgetUserRequest(user_id=user), timeout=LIVENESS_SECONDS)
        if applied:
            until(lambda: not any(probe.everywhere(replicas)))
        gate.open()
        until(lambda: client.info().shadow_checks.identical == 1)

        until(lambda: not any(probe.everywhere(replicas)))
        # Nothing of anybody: had the replay been made as nobody's, its blocks would stand here under another name.
        until(lambda: set(store.scan_iter()) == {STREAM.encode(), LIMIT_KEY.encode()})
        assert not any(probe.everywhere(replicas))
        assert set(store.scan_iter()) == {STREAM.encode(), LIMIT_KEY.encode()}
