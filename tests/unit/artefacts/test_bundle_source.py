"""Bundles by URL, in a store in memory: what is fetched, what is refused, and what the cache keeps."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import fsspec
import pytest

from atspeed.artefacts import bundle_cache
from atspeed.artefacts.bundle_cache import BundleCache
from atspeed.artefacts.bundle_source import UrlSource, bundle_source
from atspeed.artefacts.object_store import ObjectStore, StoreError, check_url
from atspeed.artefacts.signature import TrustedKeys, sign_bundle
from atspeed.artefacts.transfer import pull_bundle, push_bundle
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.bundle_files import link_or_copy
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.engine.bundle.manifest import MANIFEST, SIGNATURE
from atspeed.engine.errors import BundleError
from tests.catalogues import random_catalogue
from tests.placeholder_bundles import placeholder_bundle
from tests.signing_keys import KeyPair


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return placeholder_bundle(tmp_path / "bundle", random_catalogue(20, (4, 4), seed=0))


@pytest.fixture
def store() -> Iterator[str]:
    """The URL of a folder in memory."""
    name = f"/{uuid.uuid4().hex}"
    yield f"memory:/{name}"
    files = fsspec.filesystem("memory")
    if files.exists(name):
        files.rm(name, recursive=True)


@pytest.fixture
def cache(tmp_path: Path) -> BundleCache:
    return BundleCache(tmp_path / "cache")


def opened(source: UrlSource) -> Bundle:
    named = source.look()
    assert named
    return named.open(Event())


def change(url: str, content: bytes) -> None:
    """Another content of an object in memory."""
    fsspec.filesystem("memory").pipe_file(url.removeprefix("memory:/"), content)


def content_of(bundle: Bundle) -> dict[str, bytes]:
    return {name: (bundle.root / name).read_bytes() for name in (*bundle.manifest.files, MANIFEST)}


def test_a_pushed_bundle_is_fetched_as_it_was(bundle: Bundle, store: str, cache: BundleCache) -> None:
    push_bundle(bundle.root, f"{store}/first", f"{store}/current")
    for place in ("first", "current"):
        found = opened(UrlSource(f"{store}/{place}", None, cache))
        assert content_of(found) == content_of(bundle)
        found.verify()


def test_a_link_is_followed_and_the_next_bundle_needs_only_what_is_new(
    bundle: Bundle, store: str, cache: BundleCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_bundle(bundle.root, f"{store}/first", f"{store}/current")
    source = UrlSource(f"{store}/current", None, cache)
    first = source.look()
    assert first
    first.open(Event())
    removed = [bundle.catalogue().id_of(0)]
    other = update_catalogue(bundle, tmp_path / "other", {}, removed)
    push_bundle(other.root, f"{store}/second", f"{store}/current")
    fetched: list[str] = []
    chunks = ObjectStore.chunks

    def noted(self: ObjectStore, url: str) -> Iterator[bytes]:
        fetched.append(url)
        return chunks(self, url)

    monkeypatch.setattr(ObjectStore, "chunks", noted)
    second = source.look()
    assert second
    assert second.revision != first.revision
    assert second.version() == other.manifest.version
    assert content_of(second.open(Event())) == content_of(other)
    old = set(bundle.manifest.files.values())
    new = {f"{store}/second/{name}" for name, digest in other.manifest.files.items() if digest not in old}
    assert set(fetched) == new
    assert 0 < len(new) < len(other.manifest.files)


def test_a_flipped_byte_a_missing_and_a_cut_file_are_refused_and_nothing_stays(
    bundle: Bundle, store: str, cache: BundleCache, tmp_path: Path
) -> None:
    push_bundle(bundle.root, f"{store}/first")
    source = UrlSource(f"{store}/first", None, cache)
    digests = list(bundle.manifest.files.values())
    for name in (name for name, digest in bundle.manifest.files.items() if digests.count(digest) == 1):
        content = (bundle.root / name).read_bytes()
        for wrong in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
            change(f"{store}/first/{name}", wrong)
            with pytest.raises(BundleError, match=f"first: {name}: its SHA-256 differs"):
                opened(source)
        fsspec.filesystem("memory").rm(f"{store}/first/{name}".removeprefix("memory:/"))
        with pytest.raises(BundleError, match=f"{name}: missing"):
            opened(source)
        change(f"{store}/first/{name}", content)
    assert not list((tmp_path / "cache").rglob("*.partial"))
    assert content_of(opened(source)) == content_of(bundle)


def test_a_damaged_file_in_the_cache_is_fetched_again(bundle: Bundle, store: str, cache: BundleCache) -> None:
    push_bundle(bundle.root, f"{store}/first")
    source = UrlSource(f"{store}/first", None, cache)
    found = opened(source)
    damaged = found.root / next(iter(found.manifest.files))
    damaged.write_bytes(b"damaged")
    opened(source).verify()


def test_a_stopped_fetch_leaves_no_part_and_the_next_one_ends(
    bundle: Bundle, store: str, cache: BundleCache, tmp_path: Path
) -> None:
    push_bundle(bundle.root, f"{store}/first")
    source = UrlSource(f"{store}/first", None, cache)
    named = source.look()
    assert named
    stop = Event()
    stop.set()
    with pytest.raises(BundleError, match="was stopped"):
        named.open(stop)
    assert not list((tmp_path / "cache").rglob("*.partial"))
    assert content_of(named.open(Event())) == content_of(bundle)


def test_processes_share_a_cache(bundle: Bundle, store: str, tmp_path: Path) -> None:
    """Each thread has a cache object of its own, as each process has."""
    push_bundle(bundle.root, f"{store}/first")
    found: list[Bundle] = []

    def fetch() -> None:
        found.append(opened(UrlSource(f"{store}/first", None, BundleCache(tmp_path / "cache"))))

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [content_of(one) for one in found] == [content_of(bundle)] * 4


def test_a_bundle_that_another_process_removes_meanwhile_is_no_failure(
    bundle: Bundle, store: str, cache: BundleCache, tmp_path: Path
) -> None:
    push_bundle(bundle.root, f"{store}/first")
    (tmp_path / "cache" / "bundles").mkdir(parents=True)
    (tmp_path / "cache" / "bundles" / "gone").symlink_to("nothing")  # is listed, and is not there
    assert content_of(opened(UrlSource(f"{store}/first", None, cache))) == content_of(bundle)


def test_no_unfinished_file_is_within_a_bundle(
    bundle: Bundle, store: str, cache: BundleCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process leaves it there, and its bundle could never again be verified."""
    unfinished: set[Path] = set()

    def noted(source: Path, path: Path) -> None:
        unfinished.add(path.parent)
        link_or_copy(source, path)

    monkeypatch.setattr(bundle_cache, "link_or_copy", noted)
    push_bundle(bundle.root, f"{store}/first")
    opened(UrlSource(f"{store}/first", None, cache)).verify()
    assert unfinished == {tmp_path / "cache" / "files"}


def test_the_cache_keeps_the_newest_bundles_and_the_files_they_hold(
    bundle: Bundle, store: str, cache: BundleCache, tmp_path: Path
) -> None:
    items = bundle.catalogue()
    versions = []
    for number in range(6):
        one = update_catalogue(bundle, tmp_path / str(number), {}, [items.id_of(number)])
        push_bundle(one.root, f"{store}/{number}")
        versions.append(opened(UrlSource(f"{store}/{number}", None, cache)))
    there = [one.root.is_dir() for one in versions]
    assert there == [False, False, True, True, True, True]
    versions[-1].verify()


def test_what_names_no_bundle_is_said_in_one_line(bundle: Bundle, store: str, cache: BundleCache) -> None:
    assert UrlSource(f"{store}/nothing", None, cache).look() is None
    change(f"{store}/current", b"gone\n")
    assert UrlSource(f"{store}/current", None, cache).look() is None
    for text in (b"", b"../other", b"a/b", b"s3://elsewhere/x", b"\xff\xfe", b"a\nb"):
        change(f"{store}/current", text)
        with pytest.raises(BundleError, match="current: neither a bundle nor the name of one beside it"):
            UrlSource(f"{store}/current", None, cache).look()
    change(f"{store}/half/{MANIFEST}", b'{"format_version": 1')
    named = UrlSource(f"{store}/half", None, cache).look()
    assert named
    with pytest.raises(BundleError, match=r"half/manifest\.json: "):
        named.version()


def test_names_that_lead_out_of_the_bundle_are_refused(bundle: Bundle, store: str, cache: BundleCache) -> None:
    content = (bundle.root / MANIFEST).read_text()
    name = next(iter(bundle.manifest.files))
    for wrong in ("../../out", "/tmp/out", SIGNATURE):  # noqa: S108
        change(f"{store}/evil/{MANIFEST}", content.replace(f'"{name}"', f'"{wrong}"').encode())
        named = UrlSource(f"{store}/evil", None, cache).look()
        assert named
        with pytest.raises(BundleError, match="not the path of a file inside the bundle"):
            named.open(Event())


def test_a_hash_that_leads_out_of_the_cache_is_refused(
    bundle: Bundle, store: str, cache: BundleCache, tmp_path: Path
) -> None:
    content = (bundle.root / MANIFEST).read_text()
    digest = next(iter(bundle.manifest.files.values()))
    for wrong in ("../../out/x", f"{tmp_path}/out/x", digest.upper(), f"{digest} "):
        change(f"{store}/evil/{MANIFEST}", content.replace(f'"{digest}"', f'"{wrong}"').encode())
        named = UrlSource(f"{store}/evil", None, cache).look()
        assert named
        with pytest.raises(BundleError, match=r"files\."):
            named.open(Event())
        assert not (tmp_path / "out").exists()


def test_a_push_changes_no_bundle_that_is_there(bundle: Bundle, store: str, tmp_path: Path) -> None:
    push_bundle(bundle.root, f"{store}/first")
    push_bundle(bundle.root, f"{store}/first", f"{store}/current")
    other = update_catalogue(bundle, tmp_path / "other", {}, [bundle.catalogue().id_of(0)])
    with pytest.raises(BundleError, match="first: another bundle is there"):
        push_bundle(other.root, f"{store}/first")
    for link in (f"{store}/elsewhere/current", f"{store}/second"):
        with pytest.raises(BundleError, match="must be beside"):
            push_bundle(other.root, f"{store}/second", link)
    assert ObjectStore(store).read(f"{store}/current") == b"first\n"


def test_a_link_is_never_to_a_name_that_no_service_follows(bundle: Bundle, store: str) -> None:
    for name in ("with space", "-first", "x" * 256):
        with pytest.raises(BundleError, match="the last part of its name can be in no link"):
            push_bundle(bundle.root, f"{store}/{name}", f"{store}/current")
    assert ObjectStore(store).read(f"{store}/current") is None


def test_a_store_that_lies_about_a_write_is_found(bundle: Bundle, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectStore, "upload", lambda self, source, url: self.write(url, b"other"))
    with pytest.raises(BundleError, match="was written, but its SHA-256 differs"):
        push_bundle(bundle.root, f"{store}/first", f"{store}/current")
    monkeypatch.undo()
    assert ObjectStore(store).read(f"{store}/first/{MANIFEST}") is None
    assert ObjectStore(store).read(f"{store}/current") is None


def test_a_pull_is_whole_or_not_there(bundle: Bundle, store: str, tmp_path: Path) -> None:
    ours, theirs = KeyPair.make(tmp_path / "ours"), KeyPair.make(tmp_path / "theirs")
    sign_bundle(bundle.root, ours.private)
    push_bundle(bundle.root, f"{store}/first", f"{store}/current")
    pulled = pull_bundle(f"{store}/current", tmp_path / "new" / "here", TrustedKeys(ours.public))
    assert content_of(pulled) == content_of(bundle)
    assert (pulled.root / SIGNATURE).read_bytes() == (bundle.root / SIGNATURE).read_bytes()
    with pytest.raises(BundleError, match="here: is there already"):
        pull_bundle(f"{store}/current", pulled.root)
    with pytest.raises(BundleError, match="not signed by a key of"):
        pull_bundle(f"{store}/current", tmp_path / "out", TrustedKeys(theirs.public))
    name = next(iter(bundle.manifest.files))
    change(f"{store}/first/{name}", b"other")
    with pytest.raises(BundleError, match="differs from the manifest"):
        pull_bundle(f"{store}/current", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir() if not path.is_file()} == {"bundle", "new"}


def test_an_unsigned_bundle_is_not_fetched_where_keys_are_set(
    bundle: Bundle, store: str, cache: BundleCache, tmp_path: Path
) -> None:
    keys = TrustedKeys(KeyPair.make(tmp_path / "ours").public)
    push_bundle(bundle.root, f"{store}/first")
    named = bundle_source(f"{store}/first", keys, cache).look()
    assert named
    for use in (named.version, lambda: named.open(Event())):
        with pytest.raises(BundleError, match=r"first/model\.sig: missing"):
            use()
    assert not (tmp_path / "cache").exists()


def test_urls_that_cannot_be_a_bundles() -> None:
    assert check_url("s3://bucket/a/") == "s3://bucket/a"
    for text in ("s3://", "://bucket", "bucket", "s3:///", "https://user:secret@host/x", "simplecache::s3://b/x"):
        with pytest.raises(ValueError, match="must") as raised:
            check_url(text)
        assert "secret" not in str(raised.value)
    with pytest.raises(StoreError, match="no store has the scheme nonesuch"):
        ObjectStore("nonesuch://bucket/x")


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every request of a store fail."""

    def fail(self: ObjectStore, url: str, size: int = 0) -> None:
        raise StoreError(f"{url}: down")

    monkeypatch.setattr(ObjectStore, "read", fail)
    monkeypatch.setattr(ObjectStore, "chunks", fail)


def test_the_bundle_that_was_served_last_opens_without_the_store(
    bundle: Bundle, store: str, cache: BundleCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle that was fetched and never served does not take its place."""
    ours = KeyPair.make(tmp_path / "ours")
    other = update_catalogue(bundle, tmp_path / "other", {}, [bundle.catalogue().id_of(0)])
    for one, name in ((bundle, "first"), (other, "second")):
        sign_bundle(one.root, ours.private)
        push_bundle(one.root, f"{store}/{name}", f"{store}/current")
    source = UrlSource(f"{store}/current", TrustedKeys(ours.public), cache)
    change(f"{store}/current", b"first\n")
    served = source.look()
    assert served
    served.record_served()
    assert source.last_served() is None, "the cache does not have it yet"
    served.open(Event())
    served.record_served()
    change(f"{store}/current", b"second\n")
    opened(source)
    unreachable(monkeypatch)
    found = source.last_served()
    assert found
    assert (found.place, found.revision) == (f"{store}/first", served.revision)
    assert content_of(found.open(Event())) == content_of(bundle)
    assert UrlSource(f"{store}/second", source.keys, cache).last_served() is None


def test_bundles_that_were_fetched_later_do_not_evict_the_one_that_was_served_last(
    bundle: Bundle, store: str, cache: BundleCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five more are fetched and rejected; then the store is down."""
    push_bundle(bundle.root, f"{store}/0", f"{store}/current")
    source = UrlSource(f"{store}/current", None, cache)
    served = source.look()
    assert served
    served.open(Event())
    served.record_served()
    ids = [bundle.catalogue().id_of(item) for item in range(5)]
    for number in range(1, 6):
        other = update_catalogue(bundle, tmp_path / str(number), {}, ids[:number])
        push_bundle(other.root, f"{store}/{number}", f"{store}/current")
        opened(source)
    assert len(list((tmp_path / "cache" / "bundles").iterdir())) == 4
    unreachable(monkeypatch)
    found = source.last_served()
    assert found
    assert content_of(found.open(Event())) == content_of(bundle)


def test_a_cached_bundle_without_the_store_is_checked_as_any_other(
    bundle: Bundle, store: str, cache: BundleCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage, a key that changed, a record that is cut, and one of another URL."""
    ours, theirs = KeyPair.make(tmp_path / "ours"), KeyPair.make(tmp_path / "theirs")
    sign_bundle(bundle.root, ours.private)
    push_bundle(bundle.root, f"{store}/first")
    source = UrlSource(f"{store}/first", TrustedKeys(ours.public), cache)
    named = source.look()
    assert named
    found = named.open(Event())
    named.record_served()
    unreachable(monkeypatch)
    stranger = UrlSource(f"{store}/first", TrustedKeys(theirs.public), cache).last_served()
    assert stranger
    with pytest.raises(BundleError, match="not signed by a key of"):
        stranger.open(Event())
    (record,) = (tmp_path / "cache" / "urls").iterdir()
    whole = record.read_bytes()
    for wrong in (whole[:-5], b"", b"[]", whole.replace(b"/first", b"/other")):
        record.write_bytes(wrong)
        assert source.last_served() is None
    record.write_bytes(whole)
    (found.root / next(iter(found.manifest.files))).write_bytes(b"damaged")
    again = source.last_served()
    assert again
    with pytest.raises(StoreError, match="down"):
        again.open(Event())
    (found.root / MANIFEST).write_bytes(b"{}")
    assert source.last_served() is None
