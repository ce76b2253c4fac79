"""ForgetUser with real services and a real Redis: after it, no block of the user's prompts is found in any tier."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Bundle, Manifest
from atspeed.engine.kv.erasure import STREAM, ErasureSubscriber, publish_erasure
from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache, block_keys
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.redis_client import connect
from atspeed.engine.kv.redis_store import RedisKvStore, group_name
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
from orchestrator.serving.shadow import Served, ShadowChecks
from orchestrator.settings import OrchestratorSettings
from orchestrator.user_key import user_cache_key
from tests.bundles import random_history
from tests.serving import LIVENESS_SECONDS, WINDOW, Client, EvaluateStream, draft_stub, models, until

LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=2, dtype="float32", block_tokens=4)
OWNER = user_cache_key("", "listener")


@pytest.fixture(scope="module")
def replicas(bundle: Path, redis_server: LocalRedis, log_folder: Path) -> Iterator[LocalStack]:
    """Two drafts and two targets, asked in turn, so that all of them come to know a user."""
    kept: dict[str, object] = {"kv-redis": "always", "redis-timeout-seconds": 10, "threads": 1, "warm-up-seconds": 0}
    patient: dict[str, object] = {"redis-timeout-seconds": 10, "draft-timeout-seconds": 30, "affinity-max-calls": 0}
    folder = log_folder / "forgetting"
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

    def __init__(self, bundle: Path, catalogue: Catalogue, owner: bytes, history: list[str]) -> None:
        self._manifest: Manifest = Bundle(bundle).manifest
        self._catalogue, self._owner, self._history = catalogue, owner, history

    def target(self, replica: ServiceProcess) -> int:
        """Cached tokens that a target finds, in memory or Redis."""
        start = target_pb2.EvaluateStart(
            model_version=self._manifest.model_version("target"), prompt=self._prompt("target"), owner=self._owner
        )
        nodes = wire.to_array(np.array([ROOT], dtype=np.int32))
        with models(replica.address) as channel, EvaluateStream(channel) as stream:
            statistics = stream.ask(target_pb2.EvaluateRequest(start=start, nodes=nodes)).statistics
        return statistics.memory_cached_tokens + statistics.redis_cached_tokens

    def draft(self, replica: ServiceProcess) -> int:
        """Cached tokens that a draft finds."""
        request = draft_pb2.PlanRequest(
            model_version=self._manifest.model_version("draft"),
            prompt=self._prompt("draft"),
            owner=self._owner,
            beams=wire.to_array(np.array([ROOT], dtype=np.int32)),
            scores=wire.to_array(np.zeros(1)),
            width=4,
            beam_width=4,
            proposal=draft_pb2.PROPOSAL_TOP,
        )
        with models(replica.address) as channel:
            statistics = draft_stub(channel).Plan(request, timeout=LIVENESS_SECONDS).statistics
        return statistics.memory_cached_tokens + statistics.redis_cached_tokens

    def everywhere(self, stack: LocalStack) -> list[int]:
        """Cached tokens that each replica finds."""
        return [*map(self.draft, stack.drafts), *map(self.target, stack.targets)]

    def _prompt(self, role: str) -> types_pb2.Array:
        model, catalogue = self._manifest.models[role], self._catalogue
        columns = catalogue.codes[catalogue.find(self._history)] + catalogue.trie.codebook_offset
        tokens: Int64 = np.asarray(model.code_tokens, dtype=np.int64)[columns]
        return wire.to_array(model.prompt.tokens(list(tokens)))


def test_nothing_of_a_forgotten_user_is_found_anywhere(
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
        names = {user: group_name(user_cache_key("", user)) for user in probes}
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

        async def gated(checks: ShadowChecks, made: Recommendation, served: Served) -> None:
            self.waiting += 1
            await self._event.wait()
            await check(checks, made, served)

        monkeypatch.setattr(ShadowChecks, "_check", gated)

    def open(self) -> None:
        self._loop.call_soon_threadsafe(self._event.set)


@pytest.mark.parametrize("heard", [False, True])
async def test_a_replay_brings_nothing_of_a_forgotten_user_back(
    heard: bool,
    replicas: LocalStack,
    redis_url: str,
    bundle: Path,
    catalogue: Catalogue,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shadow check makes a list again after its reply; its user is forgotten between the two.

    heard: whether the replicas know by then, or only Redis does. The models are processes; the orchestrator is in this one.
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
        await asyncio.to_thread(live_through, server.address, gate, replicas, redis_url, bundle, catalogue, heard)


def live_through(
    address: str, gate: Gate, replicas: LocalStack, redis_url: str, bundle: Path, catalogue: Catalogue, heard: bool
) -> None:
    """Blocking, beside the orchestrator's event loop."""
    user = f"leaver-{heard}"
    history = random_history(catalogue, WINDOW, seed=5000 + heard)
    probe = Prober(bundle, catalogue, user_cache_key("", user), history)
    with Client(address) as client, redis.Redis.from_url(redis_url) as store:
        client.record(user, history)
        client.recommend(user_id=user)
        until(lambda: gate.waiting == 1)
        until(lambda: bool(store.exists(group_name(user_cache_key("", user)))))
        client.stub.ForgetUser(pb.ForgetUserRequest(user_id=user), timeout=LIVENESS_SECONDS)
        if heard:
            until(lambda: not any(probe.everywhere(replicas)))
        gate.open()
        until(lambda: client.info().shadow_checks.identical == 1)

        until(lambda: not any(probe.everywhere(replicas)))
        # Nothing of anybody: had the replay been made as nobody's, its blocks would stand here under another name.
        until(lambda: set(store.scan_iter()) == {STREAM.encode(), LIMIT_KEY.encode()})
        assert not any(probe.everywhere(replicas))
        assert set(store.scan_iter()) == {STREAM.encode(), LIMIT_KEY.encode()}


def prompt(owner: bytes = OWNER) -> tuple[list[bytes], list[KvArray]]:
    keys = block_keys(b"n", np.arange(8), LAYOUT.block_tokens, owner)
    return keys, [np.full(LAYOUT.block_shape, index, dtype=np.float32) for index in range(2)]


async def becomes(condition: Callable[[], bool]) -> None:
    """Return when a condition holds that nobody announces."""
    async with asyncio.timeout(LIVENESS_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Failing(RedisKvStore):
    """Redis refuses erasures until the test says otherwise."""

    failing = True

    async def forget(self, owners: Collection[bytes]) -> None:
        if self.failing:
            raise RedisConnectionError
        await super().forget(owners)


class Counting(PrefixCache):
    """Counts how many are forgotten at once."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[int] = []

    async def forget(self, owners: Collection[bytes]) -> None:
        self.steps.append(len(owners))
        await super().forget(owners)


class Swallowing(PrefixCache):
    """What is cancelled in it fails instead, as in a client of Redis whose timeout ends at that moment."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked = asyncio.Event()

    async def forget(self, owners: Collection[bytes]) -> None:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise RedisConnectionError from None


class TestListener:
    @pytest.fixture
    async def redis_client(self, redis_url: str) -> AsyncIterator[Redis]:
        """Of a database that the replicas do not follow: they would erase what these tests write."""
        async with connect(redis_url.removesuffix("/0") + "/1", timeout_seconds=5.0) as client:
            yield client

    async def test_a_cancellation_that_fails_something_ends_it(self, redis_client: Redis) -> None:
        """Also without `close`: an event loop that ends cancels its tasks once and waits."""
        cache = Swallowing(LAYOUT, MemoryKvCache(10**6))
        listener = ErasureSubscriber(redis_client, cache, poll_seconds=0.01)
        await listener.start()
        await publish_erasure(redis_client, OWNER)
        await cache.asked.wait()
        (following,) = [task for task in asyncio.all_tasks() if task.get_name() == "forgetting"]
        following.cancel()
        async with asyncio.timeout(LIVENESS_SECONDS):
            await asyncio.wait([following])
        await listener.close()

    async def test_it_hears_of_users_forgotten_before_it_came(self, redis_client: Redis) -> None:
        """A replica that starts while a pass for the user is still under way must not keep what that brings."""
        await publish_erasure(redis_client, OWNER)
        cache = PrefixCache(LAYOUT, tier := MemoryKvCache(10**6))
        listener = ErasureSubscriber(redis_client, cache)
        await listener.start()
        cache.remember(*prompt())
        assert len(tier) == 0
        cache.remember(*prompt(user_cache_key("", "another")))
        assert len(tier) == 2
        await listener.close()

    async def test_a_write_that_comes_late_is_erased_too(self, redis_client: Redis) -> None:
        """It reached Redis after the orchestrator had erased the user there."""
        store = RedisKvStore(redis_client, LAYOUT, 60, 5.0)
        cache = PrefixCache(LAYOUT, MemoryKvCache(10**6), store)
        await publish_erasure(redis_client, OWNER)
        await store.put(dict(zip(*prompt(), strict=True)))
        assert await redis_client.exists(group_name(OWNER)) == 1
        listener = ErasureSubscriber(redis_client, cache)
        await listener.start()
        assert await redis_client.exists(group_name(OWNER)) == 0
        await listener.close()

    async def test_cut_off_for_too_long_it_drops_all_stored_users(
        self, redis_url: str, redis_server: LocalRedis
    ) -> None:
        """And keeps none until it hears again; histories that came with their requests are nobody's and stay."""
        async with connect(redis_url, timeout_seconds=1.0) as client:
            cache = PrefixCache(LAYOUT, tier := MemoryKvCache(10**6))
            listener = ErasureSubscriber(client, cache, max_lag_seconds=1.0, poll_seconds=0.02)
            await listener.start()
            is_shared_prefix_key = block_keys(b"n", np.arange(8), LAYOUT.block_tokens)
            cache.remember(*prompt())
            cache.remember(is_shared_prefix_key, prompt()[1])
            assert len(tier) == 4
            await asyncio.to_thread(redis_server.kill)
            await becomes(lambda: not cache.accepts_user_blocks)
            assert [key in tier for key in (*prompt()[0], *is_shared_prefix_key)] == [False, False, True, True]
            cache.remember(*prompt())
            assert len(tier) == 2
            await asyncio.to_thread(redis_server.start)
            await becomes(lambda: cache.accepts_user_blocks)
            cache.remember(*prompt())
            assert len(tier) == 4
            await listener.close()

    async def test_without_redis_at_the_start_nothing_of_stored_users_is_kept(
        self, redis_url: str, redis_server: LocalRedis
    ) -> None:
        redis_server.kill()
        async with connect(redis_url, timeout_seconds=1.0) as client:
            cache = PrefixCache(LAYOUT, tier := MemoryKvCache(10**6))
            listener = ErasureSubscriber(client, cache)
            await listener.start()
            cache.remember(*prompt())
            assert len(tier) == 0
            await listener.close()

    async def test_an_erasure_that_fails_is_tried_again(self, redis_client: Redis) -> None:
        """What a pass wrote after the user was gone stayed for a day where Redis failed the replica's own erasure once."""
        store = Failing(redis_client, LAYOUT, 60, 5.0)
        cache = PrefixCache(LAYOUT, MemoryKvCache(10**6), store)
        await publish_erasure(redis_client, OWNER)
        await store.put(dict(zip(*prompt(), strict=True)))
        listener = ErasureSubscriber(redis_client, cache, poll_seconds=0.01)
        await listener.start()
        assert await redis_client.exists(group_name(OWNER)) == 1
        assert not cache.accepts_user_blocks
        store.failing = False
        await becomes(lambda: cache.accepts_user_blocks)
        assert await redis_client.exists(group_name(OWNER)) == 0
        await listener.close()

    async def test_a_bug_counts_as_deafness_and_does_not_end_it(
        self, redis_client: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = PrefixCache(LAYOUT, tier := MemoryKvCache(10**6))
        listener = ErasureSubscriber(redis_client, cache, max_lag_seconds=1.0, poll_seconds=0.01)
        await listener.start()
        cache.remember(*prompt())
        assert len(tier) == 2
        with monkeypatch.context() as patched:
            patched.setattr(redis_client, "xrange", None)
            await becomes(lambda: not cache.accepts_user_blocks)
            assert len(tier) == 0
            assert listener.lag_seconds > 1.0
        await becomes(lambda: cache.accepts_user_blocks)
        assert any(record.exc_info for record in caplog.records), "a bug without a trace"
        await listener.close()

    async def test_many_are_heard_in_steps(self, redis_client: Redis) -> None:
        """As one answer they would be too long for a replica's timeout, which would then never hear again."""
        owners = [user_cache_key("", f"user {number}") for number in range(600)]
        for owner in owners:
            await publish_erasure(redis_client, owner)
        cache = Counting(LAYOUT, tier := MemoryKvCache(10**6))
        listener = ErasureSubscriber(redis_client, cache)
        await listener.start()
        assert cache.steps == [256, 256, 88]
        for owner in owners:
            cache.remember(*prompt(owner))
        assert len(tier) == 0
        await listener.close()

    async def test_what_is_not_a_tag_is_passed_over(self, redis_client: Redis) -> None:
        await redis_client.xadd(STREAM, {"owner": b"short"})
        await redis_client.xadd(STREAM, {"something": b"else"})
        await publish_erasure(redis_client, OWNER)
        cache = PrefixCache(LAYOUT, tier := MemoryKvCache(10**6))
        listener = ErasureSubscriber(redis_client, cache)
        await listener.start()
        cache.remember(*prompt())
        assert len(tier) == 0
        await listener.close()

    async def test_the_stream_forgets_too(self, redis_client: Redis) -> None:
        """Tags older than an hour go when a new one comes."""
        await redis_client.xadd(STREAM, {"owner": OWNER}, id="5-0")
        await publish_erasure(redis_client, OWNER)
        assert await redis_client.xlen(STREAM) == 1
