"""A canary beside the stable bundle: users of each, while it appears, grows, is promoted, fails and is removed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Self

import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.rollout.release_track import TRACK_HEADER
from atspeed.v1 import recommendation_pb2 as pb
from orchestrator.recommendation import RecommendParams
from orchestrator.serving.track_router import bucket
from tests.bundles import random_history, write_bundle
from tests.catalogues import new_catalogue
from tests.observed import scrape
from tests.serving import WINDOW, Client, Link, assert_same_list, request_of, until

K, USERS, SHARE, LARGER_SHARE = 20, 16, 0.4, 0.8


@dataclass(frozen=True)
class User:
    """Someone with a history. place: where the canary's share has to reach. lists: the target's own, by bundle version."""

    history: Sequence[str]
    place: float
    lists: dict[str, pb.RecommendResponse]


class Shop:
    """Two orchestrators, two targets and a draft that follow three links: a stable bundle, and a canary for the orchestrators and
    for the models, which are the same link but for what tests do to one of them.
    """

    def __init__(self, stack: LocalStack, bundles: Sequence[Bundle], links: Sequence[Link]) -> None:
        self.stack, (self.old, self.new), (self.stable, self.canary, self.loaded) = stack, bundles, links
        self.users: list[User] = []

    @property
    def both(self) -> Sequence[str]:
        """Addresses of the orchestrators."""
        return [orchestrator.address for orchestrator in self.stack.orchestrators]

    def infos(self) -> list[pb.GetServiceInfoResponse]:
        """Service info of each orchestrator."""
        found = []
        for address in self.both:
            with Client(address) as client:
                found.append(client.info())
        return found

    def begin_canary(self) -> None:
        """Until both orchestrators serve it."""
        for link in (self.loaded, self.canary):
            link.point_to(self.new)
        until(lambda: all(info.canary.share_now for info in self.infos()))

    def end_canary(self) -> None:
        """Until neither does."""
        for link in (self.canary, self.loaded):
            link.remove()
        until(lambda: not any(info.canary.share_now or info.canary.pending_bundle for info in self.infos()))

    def make_stable(self, bundle: Bundle) -> None:
        """Wait until both orchestrators serve it to all users of the stable track."""
        self.stable.point_to(bundle)
        until(lambda: {info.versions.bundle for info in self.infos()} == {bundle.manifest.version})

    def serves_old_alone(self, target: ServiceProcess) -> bool:
        """Return true if a target has unloaded all other versions."""
        return scrape(target).total("atspeed_model_info") == 1

    def check(self, user: User, reply: pb.RecommendResponse) -> None:
        """The target's own list in the bundle that the reply names."""
        assert_same_list(reply, user.lists[reply.versions.bundle])

    def expected(self, user: User, share: float) -> str:
        """The version of the bundle that serves a user."""
        return (self.new if user.place < share else self.old).manifest.version


class Load:
    """The users ask both orchestrators without a pause until the block ends; none may meet an error or another's list.

    answers: user and bundle version, as they came. begun: when each of these requests began. A request keeps its bundle to its
    end, so only requests that begin after a change can tell of it.
    """

    def __init__(self, shop: Shop, callers: int = 4) -> None:
        self._shop, self._client = shop, Client.of_replicas(shop.both)
        self._pool, self._stop = ThreadPoolExecutor(callers), Event()
        self._turns = itertools.count()
        self._lock = Lock()
        self.answers: list[tuple[User, str]] = []
        self.begun: list[float] = []
        self._callers = [self._pool.submit(self._call) for _ in range(callers)]  # last: they use all of the above

    def _call(self) -> None:
        while not self._stop.is_set():
            user = self._shop.users[next(self._turns) % USERS]
            begun = time.monotonic()
            reply = self._client.recommend(user.history, k=K)
            self._shop.check(user, reply)
            with self._lock:
                self.begun.append(begun)
                self.answers.append((user, reply.versions.bundle))

    def round(self) -> list[tuple[User, str]]:
        """Lists of the users from now on, until each has asked at least once."""
        now, first = time.monotonic(), len(self.answers)
        most = first + len(self._callers) + USERS  # those on their way began before
        until(lambda: len(self.answers) >= most or any(caller.done() for caller in self._callers))
        return [
            answer
            for answer, begun in zip(self.answers[first:most], self.begun[first:most], strict=True)
            if begun >= now
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._client.close()
        for caller in self._callers:
            caller.result()


@pytest.fixture(scope="module")
def shop(log_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Bundles whose models and catalogues differ."""
    folder = tmp_path_factory.mktemp("canary")
    bundles = [
        write_bundle(folder / name, new_catalogue(seed), seed=seed, max_items=WINDOW).bundle
        for seed, name in enumerate(("old", "new"), start=5)
    ]
    links = [Link(folder / "stable", bundles[0]), Link(folder / "canary"), Link(folder / "loaded")]
    logs = log_folder / "canary"
    logs.mkdir()
    following: dict[str, object] = {"bundle-poll-seconds": 0.1, "metrics-port": 0}
    models: dict[str, object] = {**following, "canary-bundle": links[2].path, "keep-version-seconds": 3}
    flags: dict[str, dict[str, object]] = {
        "draft": models,
        "target": {**models, "threads": 1},
        "orchestrator": {
            **following,
            "canary-bundle": links[1].path,
            "canary-share": SHARE,
            "bundle-settle-seconds": 0.5,
            "draft-timeout-seconds": 30,
            "planner": "fixed",
            "shadow-share": 0.5,
        },
    }
    with LocalStack(links[0].path, targets=2, orchestrators=2, log_folder=logs, flags=flags) as stack:
        shop = Shop(stack, bundles, links)
        histories = [random_history(bundles[0].catalogue(), 6, seed) for seed in range(USERS)]
        places = [
            bucket(RecommendParams(k=K, beam_widths=BeamWidths.of(K), history=history).subject) for history in histories
        ]
        shop.users = [User(history, at, {}) for history, at in zip(histories, places, strict=True)]
        with Client(stack.address) as client:
            for bundle in reversed(bundles):
                shop.make_stable(bundle)
                for user in shop.users:
                    alone = client.recommend(user.history, k=K, mode=pb.MODE_TARGET_ONLY)
                    user.lists[bundle.manifest.version] = alone
        yield shop


@pytest.fixture(autouse=True)
def only_the_old_one(shop: Shop) -> Iterator[None]:
    yield
    shop.end_canary()
    shop.make_stable(shop.old)


def test_a_share_of_the_users_is_served_by_the_canary_and_always_the_same(shop: Shop) -> None:
    """Alone, in a batch and by every orchestrator; each list is what the target of its bundle gives by itself."""
    shop.begin_canary()
    expected = [shop.expected(user, SHARE) for user in shop.users]
    assert len(set(expected)) == 2
    for address in shop.both:
        with Client(address) as client:
            replies = [client.recommend(user.history, k=K) for user in shop.users]
            batch = client.batch([request_of(user.history, k=K) for user in shop.users])
        for got in (replies, [batch[number].response for number in range(USERS)]):
            assert [reply.versions.bundle for reply in got] == expected
            for user, reply in zip(shop.users, got, strict=True):
                shop.check(user, reply)
    info = shop.infos()[0]
    assert info.versions.bundle == shop.old.manifest.version
    assert (info.canary.share, info.canary.versions.bundle) == (SHARE, shop.new.manifest.version)
    seen = scrape(shop.stack.orchestrators[0])
    for track, version in (("canary", shop.new.manifest.version), ("stable", shop.old.manifest.version)):
        lists = seen.value("atspeed_recommendations_total", track=track, mode="strict", code="OK")
        assert lists >= 2 * expected.count(version)
        assert seen.value("atspeed_target_passes_count", track=track, mode="strict") == lists
        assert seen.value("atspeed_bundle_served", track=track) == 1
    assert seen.value("atspeed_canary_share") == SHARE


@pytest.mark.parametrize("track", ["canary", "stable"])
def test_who_asks_for_a_track_gets_it(shop: Shop, track: str) -> None:
    """Alone and in a batch, for users of both tracks."""
    shop.begin_canary()
    wanted = (shop.new if track == "canary" else shop.old).manifest.version
    users = shop.users[:6]
    assert len({shop.expected(user, SHARE) for user in users}) == 2
    requests, metadata = [request_of(user.history, k=K) for user in users], ((TRACK_HEADER, track),)
    with Client(shop.stack.address) as client:
        alone = [client.stub.Recommend(request, metadata=metadata) for request in requests]
        batch = list(client.stub.RecommendBatch(pb.RecommendBatchRequest(requests=requests), metadata=metadata))
    for user, reply in [*zip(users, alone, strict=True), *((users[one.index], one.response) for one in batch)]:
        assert reply.versions.bundle == wanted
        shop.check(user, reply)
    assert len(batch) == len(users)


def test_a_canary_comes_grows_is_promoted_and_is_rolled_back_under_load(shop: Shop) -> None:
    """No call fails, and users of the canary get no other bundle before it is stable."""
    new = shop.new.manifest.version
    with Load(shop) as load:
        assert {version for _, version in load.round()} == {shop.old.manifest.version}
        shop.begin_canary()
        assert all(version == shop.expected(user, SHARE) for user, version in load.round())
        begun = len(load.answers)
        for orchestrator in shop.stack.orchestrators:
            orchestrator.flags["canary-share"] = LARGER_SHARE
            orchestrator.stop()
            orchestrator.start()
            load.round()
        assert all(version == shop.expected(user, LARGER_SHARE) for user, version in load.round())
        shop.make_stable(shop.new)
        assert {version for _, version in load.round()} == {new}
        shop.end_canary()
        assert {version for _, version in load.round()} == {new}
        assert all(version == new for user, version in load.answers[begun:] if user.place < SHARE)
        shop.make_stable(shop.old)
        shop.begin_canary()
        assert all(version == shop.expected(user, LARGER_SHARE) for user, version in load.round())
        shop.end_canary()
        assert {version for _, version in load.round()} == {shop.old.manifest.version}
    assert not any(info.shadow_checks.different or info.canary.shadow_checks.different for info in shop.infos())


@pytest.mark.long
@pytest.mark.parametrize("times", [25])
def test_bundles_change_places_again_and_again_under_load(shop: Shop, times: int) -> None:
    """Begun and rolled back, begun and promoted, by turns."""
    with Load(shop) as load:
        for turn in range(times):
            shop.begin_canary()
            load.round()
            if turn % 2:
                shop.make_stable(shop.new)
            shop.end_canary()
            expected = shop.new if turn % 2 else shop.old
            assert {version for _, version in load.round()} == {expected.manifest.version}
            shop.make_stable(shop.old)
    assert not any(info.shadow_checks.different or info.canary.shadow_checks.different for info in shop.infos())


def test_a_canary_that_no_target_serves_is_nobodys(shop: Shop) -> None:
    """First none has it, then they have, then they lose it again, while the orchestrators hold on to it."""
    until(lambda: all(shop.serves_old_alone(target) for target in shop.stack.targets))
    shop.canary.point_to(shop.new)
    until(lambda: all(info.canary.pending_bundle == shop.new.manifest.version for info in shop.infos()))
    with Load(shop) as load:
        assert {version for _, version in load.round()} == {shop.old.manifest.version}
        seen = scrape(shop.stack.orchestrators[0])
        assert seen.value("atspeed_bundle_pending", track="canary") == 1
        assert seen.value("atspeed_canary_share") == 0
        shop.loaded.point_to(shop.new)
        until(lambda: all(info.canary.share_now for info in shop.infos()))
        assert shop.new.manifest.version in {version for _, version in load.round()}
    shop.loaded.remove()
    until(lambda: not any(info.canary.share_now for info in shop.infos()))
    with Load(shop) as load:
        assert {version for _, version in load.round()} == {shop.old.manifest.version}
    log = shop.stack.orchestrators[0].log.read_text(encoding="utf-8")
    assert "target_unreachable" in log
