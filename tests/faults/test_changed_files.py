"""Files of a bundle that change while it is served: lists stay those of the version, and no process ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack, LocalStackError, ServiceProcess
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import random_history, write_bundle
from tests.conftest import mended
from tests.observed import scrape
from tests.serving import WINDOW, Client, Link, assert_same_list, until

K = 20
# Every prompt is computed anew.
FLAGS: dict[str, object] = {
    "kv-memory-mb": 0,
    "kv-redis": "never",
    "threads": 1,
    "warm-up-seconds": 0,
    "metrics-port": 0,
}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Path:
    """A bundle of the same sizes and other weights."""
    return write_bundle(tmp_path_factory.mktemp("other"), catalogue, seed=7, max_items=WINDOW).root


@pytest.fixture
def root(tmp_path: Path, bundle: Path) -> Path:
    """A bundle that a test may corrupt, under a link."""
    shutil.copytree(bundle, tmp_path / "corrupt")
    return tmp_path / "corrupt"


@pytest.fixture
def link(tmp_path: Path, root: Path) -> Link:
    return Link(tmp_path / "current", Bundle(root))


@pytest.fixture
def stack(link: Link, redis_server: LocalRedis) -> Iterator[LocalStack]:
    flags: dict[str, dict[str, object]] = {"target": FLAGS, "draft": FLAGS, "orchestrator": {"planner": "fixed"}}
    with LocalStack(link.path, redis_url=mended(redis_server), flags=flags) as stack:
        yield stack


def overwrite(path: Path, other: Path) -> None:
    """Overwrite a file in place, like `cp` and `rsync --inplace`."""
    with path.open("r+b") as file:
        file.write(other.read_bytes())


def empty(path: Path, other: Path) -> None:
    path.open("wb").close()


def halve(path: Path, other: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def every_file(root: Path, other: Path, change: Callable[[Path, Path], None]) -> None:
    for path in (path for path in root.rglob("*") if path.is_file() and path.name != "manifest.json"):
        change(path, other / path.relative_to(root))


def asked(stack: LocalStack, catalogue: Catalogue) -> list[pb.RecommendResponse]:
    histories = [random_history(catalogue, 1 + seed % WINDOW, seed) for seed in range(12)]
    with Client(stack.address) as client:
        return [client.recommend(history, k=K, mode=pb.MODE_STRICT) for history in histories]


@pytest.mark.parametrize("change", [overwrite, empty, halve])
def test_a_served_bundle_changed_in_place_keeps_its_lists_and_is_refused_afresh(
    stack: LocalStack,
    root: Path,
    other: Path,
    catalogue: Catalogue,
    change: Callable[[Path, Path], None],
) -> None:
    """Weights were mapped from their file: lists became another model's under the same version, or the process got SIGBUS."""
    before = asked(stack, catalogue)
    every_file(root, other, change)
    for was, now in zip(before, asked(stack, catalogue), strict=True):
        assert_same_list(now, was)
        assert now.versions == was.versions
        assert not now.degraded
    assert all(service.running for service in stack.services)
    target = stack.targets[0]
    target.stop()
    with pytest.raises(LocalStackError, match="its SHA-256 differs from the manifest's"):
        target.start()


def test_a_bundle_that_shares_corrupt_weights_is_refused(
    stack: LocalStack, link: Link, root: Path, other: Path, tmp_path: Path
) -> None:
    """Weights that are in memory are not read again for another catalogue, but their files are checked all the same."""
    following = update_catalogue(Bundle(root), tmp_path / "following", {}, ["item-1"])
    overwrite(following.root / "target" / "model.onnx.data", other / "target" / "model.onnx.data")
    link.point_to(following)
    for service in (*stack.targets, *stack.drafts):
        until(partial(_has_refused, service))


def _has_refused(service: ServiceProcess) -> bool:
    return scrape(service).value("atspeed_bundle_changes_total", track="stable", result="refused") == 1
