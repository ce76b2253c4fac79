"""Another bundle takes the place of the one that is served, under load: no caller notices but by the versions in the replies, and
every list is the target's own in the catalogue that it names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import new_bundle, random_history
from tests.catalogues import new_catalogue
from tests.observed import scrape
from tests.serving import Client, Link, assert_same_list, ids, until

K = 20


@dataclass(frozen=True)
class Question:
    """A history and items that must not be recommended."""

    history: Sequence[str]
    excluded: Sequence[str]


class Shop:
    """Services that follow a link, two bundles that it may name, and the lists of the target alone in each."""

    def __init__(self, stack: LocalStack, link: Link, bundles: Sequence[Bundle], questions: Sequence[Question]) -> None:
        self.stack, self.link, self.bundles, self.questions = stack, link, bundles, questions
        self.items = {bundle.manifest.catalogue_version: _ids(bundle.catalogue()) for bundle in bundles}
        self.expected: dict[str, list[pb.RecommendResponse]] = {}

    def switch_to(self, bundle: Bundle, client: Client) -> None:
        """Point the link to a bundle and wait until new requests are served by it."""
        self.link.point_to(bundle)
        until(lambda: client.info().versions.bundle == bundle.manifest.version)

    def ask(self, client: Client, question: Question, mode: pb.Mode.ValueType = pb.MODE_STRICT) -> pb.RecommendResponse:
        """A list."""
        return client.recommend(question.history, k=K, mode=mode, excluded_item_ids=question.excluded)

    def check(self, number: int, reply: pb.RecommendResponse) -> None:
        """Valid in the catalogue that the reply names, and the target's own there."""
        version = reply.versions.catalogue
        assert set(ids(reply)) <= self.items[version] - set(self.questions[number].excluded)
        assert_same_list(reply, self.expected[version][number])


def _refused(service: ServiceProcess) -> float:
    return scrape(service).value("atspeed_bundle_changes_total", track="stable", result="refused")


def _has_refused(service: ServiceProcess, bundles: float) -> bool:
    return _refused(service) == bundles


def _answered(replies: Sequence[object], wanted: int, callers: Sequence[Future[None]]) -> bool:
    """Return true if there are so many answers, or if a caller has failed."""
    return len(replies) > wanted or any(caller.done() for caller in callers)


def _ids(catalogue: Catalogue) -> set[str]:
    return {catalogue.id_of(item) for item in range(catalogue.items)}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Bundle]:
    """A bundle, and one whose catalogue lacks every third item and has as many others."""
    folder = tmp_path_factory.mktemp("bundles")
    old = Bundle(new_bundle(folder / "old", new_catalogue(seed=5)))
    catalogue = old.catalogue()
    removed = [catalogue.id_of(item) for item in range(0, catalogue.items, 3)]
    rng = np.random.default_rng(0)
    paths = [tuple(int(rng.integers(size)) for size in catalogue.trie.codebook_sizes) for _ in removed]
    added = {f"new-{number}": path for number, path in enumerate(paths)}
    return [old, update_catalogue(old, folder / "new", added, removed)]


@pytest.fixture(scope="module")
def shop(bundles: Sequence[Bundle], log_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    link = Link(tmp_path_factory.mktemp("link") / "bundle", bundles[0])
    folder = log_folder / "rollout"
    folder.mkdir()
    following: dict[str, object] = {"bundle-poll-seconds": 0.1, "metrics-port": 0}
    flags: dict[str, dict[str, object]] = {
        "draft": dict(following),
        "target": {**following, "threads": 1, "keep-version-seconds": 3},
        "orchestrator": {
            **following,
            "bundle-settle-seconds": 0.5,
            "draft-timeout-seconds": 30,
            "planner": "fixed",
            "shadow-share": 0.2,
        },
    }
    old, new = (bundle.catalogue() for bundle in bundles)
    questions = [
        Question(
            [*random_history(old, 1 + seed % 6, seed), *random_history(new, 1 + seed % 6, seed)],
            [*random_history(old, 10, seed + 100), *random_history(new, 10, seed + 100)],
        )
        for seed in range(16)
    ]
    with (
        LocalStack(link.path, targets=2, log_folder=folder, flags=flags) as stack,
        Client(stack.address) as client,
    ):
        shop = Shop(stack, link, bundles, questions)
        for bundle in reversed(bundles):
            shop.switch_to(bundle, client)
            lists = [shop.ask(client, question, pb.MODE_TARGET_ONLY) for question in questions]
            shop.expected[bundle.manifest.catalogue_version] = lists
        yield shop


@pytest.fixture
def client(shop: Shop) -> Iterator[Client]:
    with Client(shop.stack.address) as client:
        shop.switch_to(shop.bundles[0], client)
        yield client


@pytest.mark.parametrize("times", [4, pytest.param(60, marks=pytest.mark.long)])
def test_the_catalogue_is_changed_back_and_forth_under_load(shop: Shop, client: Client, times: int) -> None:
    done = Event()
    replies: list[tuple[int, pb.RecommendResponse]] = []

    def call(first: int) -> None:
        number = first
        while not done.is_set():
            question = shop.questions[number % len(shop.questions)]
            replies.append((number % len(shop.questions), shop.ask(client, question)))
            number += 1

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(call, first) for first in range(4)]
        try:
            for change in range(1, times + 1):
                answered = len(replies)
                shop.switch_to(shop.bundles[change % 2], client)
                until(partial(_answered, replies, answered + 10, callers))
        finally:
            done.set()
        for caller in callers:
            caller.result()
    for number, reply in replies:
        shop.check(number, reply)
    served = Counter(reply.versions.catalogue for _, reply in replies)
    assert len(served) == 2
    assert min(served.values()) >= times
    info = client.info()
    assert info.shadow_checks.different == 0
    until(lambda: client.info().open_bundles == 1)


def test_a_bundle_that_is_broken_changes_nothing(shop: Shop, client: Client, tmp_path: Path) -> None:
    """A model file that is cut short: the model services say so, and the orchestrator waits for them until the link is back."""
    whole = shop.bundles[1]
    broken = Bundle(
        update_catalogue(whole, tmp_path / "broken", {}, [sorted(shop.items[whole.manifest.catalogue_version])[0]]).root
    )
    model = broken.model_path("target")
    data = model.read_bytes()
    model.unlink()
    model.write_bytes(data[: len(data) // 2])
    before = [_refused(target) for target in shop.stack.targets]
    shop.link.point_to(broken)
    for target, refused in zip(shop.stack.targets, before, strict=True):
        until(partial(_has_refused, target, refused + 1))
    until(lambda: client.info().pending_bundle == broken.manifest.version)
    for number, question in enumerate(shop.questions):
        reply = shop.ask(client, question)
        assert reply.versions.bundle == shop.bundles[0].manifest.version
        shop.check(number, reply)
    shop.link.point_to(shop.bundles[0])
    until(lambda: not client.info().pending_bundle)
    assert client.info().versions.bundle == shop.bundles[0].manifest.version
