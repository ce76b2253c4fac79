"""Which bundles a watch has taken up as its path changes: every other version once, and none that cannot be served."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from atspeed.engine.bundle.manifest import Bundle, write_manifest
from atspeed.engine.errors import BundleError
from atspeed.rollout.bundle_watch import BundleWatch, following, open_bundle
from atspeed.rollout.release_track import Track
from tests.bundles import random_catalogue, write_bundle
from tests.serving import LIVENESS_SECONDS


class Services:
    """Take up what a watch hands to them; a bundle named `bad` they cannot, one named `slow` takes until `go`."""

    def __init__(self, link: Path, track: Track = Track.STABLE) -> None:
        self.link, self.taken, self.go = link, list[str](), asyncio.Event()
        served = open_bundle(link).manifest.version if track is Track.STABLE else ""
        self.watch = BundleWatch(link, track, self, served)

    async def activate(self, bundle: Bundle, track: Track) -> None:
        if bundle.root.name == "slow":
            await self.go.wait()
        if bundle.root.name == "bad":
            raise BundleError("bad")
        assert track is self.watch.track
        self.taken.append(bundle.root.name)

    def deactivate(self, track: Track) -> None:
        assert track is self.watch.track
        self.taken.append("none")

    async def point_to(self, name: str) -> None:
        """Move the link, and let the watch look."""
        self.move_to(name)
        await self.watch.look()

    def move_to(self, name: str) -> None:
        """Move the link alone."""
        self.link.unlink(missing_ok=True)
        self.link.symlink_to(self.link.parent / name)

    def lose(self) -> None:
        """The path names nothing."""
        self.link.unlink()

    async def look(self) -> None:
        await self.watch.look()
        await self.watch.settle()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of several versions."""
    root = tmp_path_factory.mktemp("bundles")
    first = write_bundle(root / "first", random_catalogue(20, (4, 4), seed=0)).bundle
    for name in ("second", "bad", "slow"):
        (root / name).mkdir()
        write_manifest(root / name, first.manifest.model_copy(update={"catalogue_version": name}))
    (root / "same").mkdir()
    write_manifest(root / "same", first.manifest)
    return root


@pytest.fixture
def link(folder: Path) -> Path:
    path = folder / "current"
    path.unlink(missing_ok=True)
    path.symlink_to(folder / "first")
    return path


async def test_another_version_is_taken_up_once_and_back(link: Path) -> None:
    services = Services(link)
    for name in ("first", "same", "second", "second", "same", "first"):
        await services.point_to(name)
        await services.look()
    assert services.taken == ["second", "same"]
    assert (services.watch.taken, services.watch.refused, services.watch.pending) == (2, 0, "")


async def test_what_is_refused_is_not_tried_again_until_somebody_asks(link: Path) -> None:
    services = Services(link)
    await services.point_to("bad")
    for _ in range(3):
        await services.look()
    assert (services.taken, services.watch.refused) == ([], 1)
    services.watch.forget()
    await services.look()
    assert services.watch.refused == 2
    await services.point_to("second")
    await services.look()
    assert services.taken == ["second"]


async def test_what_is_being_taken_up_gives_way_to_what_comes_after(link: Path) -> None:
    services = Services(link)
    await services.point_to("slow")
    assert services.watch.pending
    await services.point_to("first")
    assert not services.watch.pending
    await services.point_to("slow")
    await services.point_to("second")
    await services.look()
    services.go.set()
    await services.look()
    assert services.taken == ["second"]


async def test_a_path_that_is_gone_for_a_moment_is_nothing(link: Path) -> None:
    services = Services(link)
    services.lose()
    await services.look()
    assert services.watch.refused == 0
    await services.look()
    await services.look()
    assert services.watch.refused == 1
    await services.point_to("second")
    await services.look()
    assert services.taken == ["second"]


async def test_links_in_a_circle_name_nothing_and_may_be_mended(link: Path) -> None:
    """They once ended the watch, and nobody was told."""
    services = Services(link)
    services.move_to(link.name)
    for _ in range(3):
        await services.look()
    assert services.watch.refused == 1
    await services.point_to("second")
    await services.look()
    assert services.taken == ["second"]


async def test_a_canary_comes_goes_and_comes_back(link: Path) -> None:
    services = Services(link, Track.CANARY)
    await services.look()
    services.lose()
    for _ in range(4):
        await services.look()
    assert not services.watch.served
    for name in ("bad", "first", "second"):
        await services.point_to(name)
        await services.look()
    assert services.taken == ["first", "none", "first", "second"]
    assert (services.watch.taken, services.watch.refused) == (3, 1)


async def test_a_canary_that_goes_while_it_is_taken_up_never_comes(link: Path) -> None:
    services = Services(link, Track.CANARY)
    await services.point_to("slow")
    services.lose()
    await services.watch.look()
    assert services.watch.pending
    await services.watch.look()
    assert not services.watch.pending
    services.go.set()
    await services.look()
    assert services.taken == []


async def test_what_the_paths_name_is_taken_up_before_the_block_begins(link: Path) -> None:
    services = Services(link, Track.CANARY)
    async with following([services.watch], poll_seconds=3600):
        assert services.taken == ["first"]


async def test_what_takes_too_long_goes_on_beside_the_block_and_not_beyond_it(link: Path) -> None:
    services = Services(link, Track.CANARY)
    services.move_to("slow")
    async with following([services.watch], poll_seconds=3600, patience_seconds=0.01):
        assert services.watch.pending
        services.go.set()
        await services.watch.settle()
        assert services.taken == ["slow"]
    services.go.clear()
    other = Services(link, Track.CANARY)
    async with following([other.watch], poll_seconds=3600, patience_seconds=0.01):
        assert other.watch.pending
    assert (other.watch.pending, other.taken) == ("", [])


async def test_a_hangup_has_a_path_looked_at_at_once(link: Path) -> None:
    services = Services(link)
    async with following([services.watch], poll_seconds=3600), asyncio.timeout(LIVENESS_SECONDS):
        services.move_to("second")
        os.kill(os.getpid(), signal.SIGHUP)
        while services.taken != ["second"]:  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.01)
