"""Bundle watches: every changed version is activated once, and a bad bundle is rejected once."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from threading import Event

import pytest

from atspeed.artefacts.bundle_source import LinkSource, NamedBundle
from atspeed.artefacts.object_store import StoreError
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import write_manifest
from atspeed.engine.errors import BundleError
from atspeed.rollout.bundle_opening import open_bundle, open_first
from atspeed.rollout.bundle_watch import BundleWatch, watch_bundles
from atspeed.rollout.release_track import Track
from tests.catalogues import random_catalogue
from tests.placeholder_bundles import placeholder_bundle
from tests.serving import LIVENESS_SECONDS


class Host:
    """Activates the bundles of a watch. It rejects the bundle `bad`, and waits for `go` with the bundle `slow`."""

    def __init__(self, link: Path, track: Track = Track.STABLE) -> None:
        self.link, self.activated, self.go = link, list[str](), asyncio.Event()
        served = open_bundle(link).manifest.version if track is Track.STABLE else None
        self.watch = BundleWatch(LinkSource(link), track, self, served)

    async def activate(self, bundle: Bundle, track: Track) -> None:
        if bundle.root.name == "slow":
            await self.go.wait()
        if bundle.root.name == "bad":
            raise BundleError("bad")
        assert track is self.watch.track
        self.activated.append(bundle.root.name)

    def deactivate(self, track: Track) -> None:
        assert track is self.watch.track
        self.activated.append("none")

    async def point_to(self, name: str) -> None:
        """Move the link, and let the watch look."""
        self.move_to(name)
        await self.watch.check()

    def move_to(self, name: str) -> None:
        """Move the link alone."""
        self.link.unlink(missing_ok=True)
        self.link.symlink_to(self.link.parent / name)

    def lose(self) -> None:
        """The path names nothing."""
        self.link.unlink()

    async def check(self) -> None:
        await self.watch.check()
        await self.watch.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of several versions."""
    root = tmp_path_factory.mktemp("bundles")
    first = placeholder_bundle(root / "first", random_catalogue(20, (4, 4), seed=0))
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


async def test_changed_bundle_is_activated_once(link: Path) -> None:
    host = Host(link)
    for name in ("first", "same", "second", "second", "same", "first"):
        await host.point_to(name)
        await host.check()
    assert host.activated == ["second", "same"]
    assert (host.watch.activated, host.watch.rejected, host.watch.pending) == (2, 0, None)


async def test_rejected_bundle_is_not_tried_again_until_reset(link: Path) -> None:
    host = Host(link)
    await host.point_to("bad")
    for _ in range(3):
        await host.check()
    assert (host.activated, host.watch.rejected) == ([], 1)
    host.watch.reset()
    await host.check()
    assert host.watch.rejected == 2
    await host.point_to("second")
    await host.check()
    assert host.activated == ["second"]


async def test_running_activation_is_cancelled_by_another_change(link: Path) -> None:
    host = Host(link)
    await host.point_to("slow")
    assert host.watch.pending
    await host.point_to("first")
    assert not host.watch.pending
    await host.point_to("slow")
    await host.point_to("second")
    await host.check()
    host.go.set()
    await host.check()
    assert host.activated == ["second"]


async def test_path_missing_once_is_ignored(link: Path) -> None:
    host = Host(link)
    host.lose()
    await host.check()
    assert host.watch.rejected == 0
    await host.check()
    await host.check()
    assert host.watch.rejected == 1
    await host.point_to("second")
    await host.check()
    assert host.activated == ["second"]


async def test_circle_of_links_is_rejected_until_repaired(link: Path) -> None:
    """They once ended the watch without an error."""
    host = Host(link)
    host.move_to(link.name)
    for _ in range(3):
        await host.check()
    assert host.watch.rejected == 1
    await host.point_to("second")
    await host.check()
    assert host.activated == ["second"]


async def test_canary_is_activated_deactivated_and_activated_again(link: Path) -> None:
    host = Host(link, Track.CANARY)
    await host.check()
    host.lose()
    for _ in range(4):
        await host.check()
    assert not host.watch.served
    for name in ("bad", "first", "second"):
        await host.point_to(name)
        await host.check()
    assert host.activated == ["first", "none", "first", "second"]
    assert (host.watch.activated, host.watch.rejected) == (3, 1)


async def test_canary_that_disappears_during_activation_is_not_served(link: Path) -> None:
    host = Host(link, Track.CANARY)
    await host.point_to("slow")
    host.lose()
    await host.watch.check()
    assert host.watch.pending
    await host.watch.check()
    assert not host.watch.pending
    host.go.set()
    await host.check()
    assert host.activated == []


async def test_bundles_are_activated_before_the_block_begins(link: Path) -> None:
    host = Host(link, Track.CANARY)
    async with watch_bundles([host.watch], poll_seconds=3600):
        assert host.activated == ["first"]


async def test_slow_activation_continues_during_the_block_and_ends_with_it(link: Path) -> None:
    host = Host(link, Track.CANARY)
    host.move_to("slow")
    async with watch_bundles([host.watch], poll_seconds=3600, max_wait_seconds=0.01):
        assert host.watch.pending
        host.go.set()
        await host.watch.join()
        assert host.activated == ["slow"]
    host.go.clear()
    other = Host(link, Track.CANARY)
    async with watch_bundles([other.watch], poll_seconds=3600, max_wait_seconds=0.01):
        assert other.watch.pending
    assert (bool(other.watch.pending), other.activated) == (False, [])


async def test_sighup_checks_at_once(link: Path) -> None:
    host = Host(link)
    async with watch_bundles([host.watch], poll_seconds=3600), asyncio.timeout(LIVENESS_SECONDS):
        host.move_to("second")
        os.kill(os.getpid(), signal.SIGHUP)
        while host.activated != ["second"]:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)


class Unsteady:
    """A source in front of another one, whose store fails when it is told to."""

    def __init__(self, link: Path) -> None:
        self.place, self._source = str(link), LinkSource(link)
        self.look_fails = self.open_fails = False
        self.broken = ""
        self.noted: list[str] = []
        self.last: NamedBundle | None = None

    def look(self) -> NamedBundle | None:
        if self.look_fails:
            raise StoreError(f"{self.place}: no route")
        if self.broken:
            raise BundleError(self.broken)
        named = self._source.look()
        return Fetched(named, self) if named else None

    def last_served(self) -> NamedBundle | None:
        return self.last


class Fetched:
    """A bundle whose files the store may fail to give."""

    def __init__(self, named: NamedBundle, source: Unsteady) -> None:
        self._named, self._source = named, source
        self.place, self.revision, self.version = named.place, named.revision, named.version

    def open(self, stop: Event) -> Bundle:
        if self._source.open_fails:
            raise StoreError(f"{self.place}: connection reset")
        return self._named.open(stop)

    def record_served(self) -> None:
        self._source.noted.append(Path(self.place).name)


@pytest.fixture
def unsteady(link: Path) -> tuple[Host, Unsteady]:
    host, source = Host(link), Unsteady(link)
    host.watch = BundleWatch(source, Track.STABLE, host, open_bundle(link).manifest.version)
    return host, source


async def test_store_that_cannot_be_reached_rejects_nothing_and_is_asked_again(
    unsteady: tuple[Host, Unsteady],
) -> None:
    host, source = unsteady
    source.look_fails = True
    for _ in range(3):
        await host.point_to("second")
    assert (host.watch.unreachable, host.watch.rejected, host.activated) == (3, 0, [])
    source.look_fails = False
    await host.check()
    assert (host.activated, host.watch.unreachable) == (["second"], 3)


async def test_only_bundles_that_are_served_are_recorded(unsteady: tuple[Host, Unsteady]) -> None:
    host, source = unsteady
    for name in ("first", "bad", "first", "second", "bad", "second"):
        await host.point_to(name)
        await host.check()
    assert source.noted == ["first", "first", "second", "second"]


async def test_a_start_takes_the_last_served_bundle_only_while_the_store_cannot_say(
    unsteady: tuple[Host, Unsteady],
) -> None:
    host, source = unsteady
    host.move_to("second")
    source.last = LinkSource(host.link.parent / "first").look()
    assert (await open_first(source)).root.name == "second"
    source.look_fails = True
    assert (await open_first(source)).root.name == "first"
    source.look_fails, source.open_fails = False, True
    assert (await open_first(source)).root.name == "first"
    source.last = None
    with pytest.raises(StoreError, match="connection reset"):
        await open_first(source)
    source.broken = "neither a bundle nor a name"
    with pytest.raises(BundleError, match="neither"):
        await open_first(source)


async def test_canary_stays_while_its_store_cannot_be_reached(link: Path) -> None:
    host, source = Host(link, Track.CANARY), Unsteady(link)
    host.watch = BundleWatch(source, Track.CANARY, host)
    await host.check()
    source.look_fails = True
    for _ in range(4):
        await host.check()
    assert host.activated == ["first"]
    assert host.watch.served


@pytest.mark.parametrize("way", ["after the pause", "at SIGHUP"])
async def test_fetch_that_a_store_broke_off_is_tried_again(
    unsteady: tuple[Host, Unsteady], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    host, source = unsteady
    monkeypatch.setattr("atspeed.rollout.bundle_watch._RETRY_SECONDS", 0.0 if way == "after the pause" else 3600.0)
    source.open_fails = True
    await host.point_to("second")
    await host.watch.join()
    source.open_fails = False
    assert (host.watch.unreachable, host.watch.rejected, host.watch.pending, host.activated) == (1, 0, None, [])
    if way == "at SIGHUP":
        await host.check()
        assert host.activated == []
        host.watch.reset()
    await host.check()
    assert host.activated == ["second"]


async def test_link_that_names_no_bundle_is_rejected_once(unsteady: tuple[Host, Unsteady]) -> None:
    host, source = unsteady
    source.broken = "current: neither a bundle nor the name of one beside it"
    for _ in range(3):
        await host.check()
    assert host.watch.rejected == 1
    source.broken = ""
    await host.point_to("second")
    await host.check()
    assert host.activated == ["second"]
