"""A folder of fetched bundles, which several processes may share.

    files/SHA256            a file, under its hash; it appears in one step once the hash was checked
    bundles/SHA256/         a bundle, under the hash of its manifest, of hard links to these files
    urls/SHA256             the last bundle that was served from a URL, under the URL's hash

A new catalogue on the same models therefore fetches the catalogue only, and an interrupted fetch goes on with the next file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

from pydantic import Base64Bytes, BaseModel, ConfigDict, ValidationError

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.bundle_files import link_or_copy, sha256_of
from atspeed.engine.bundle.manifest import MANIFEST, Manifest
from atspeed.engine.errors import BundleError

_KEPT = 4
"""Bundles that stay: those of two tracks, and the one before each."""
_KEPT_SERVED = 2  # of them, those of the latest records, however many were fetched since: one of each track
_UNUSED_SECONDS = 3600.0  # a file that no bundle holds yet may be another process's


def default_cache() -> Path:
    """Return the folder for fetched bundles where no setting names one."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "atspeed", "bundles")


class ServedBundle(BaseModel):
    """Record of the last bundle that was served from a URL.

    Attributes:
        url: the URL in the setting.
        place: the URL of the bundle, which differs where `url` is a link.
        manifest: SHA-256 of its manifest.json.
        signature: its signature; None if no public key is set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    place: str
    manifest: str
    signature: Base64Bytes | None


class BundleCache:
    """The cache in a folder, which is created with the first bundle."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(
        self, content: bytes, manifest: Manifest, chunks: Callable[[str], Iterator[bytes]], stop: Event
    ) -> Bundle:
        """Return the bundle of a manifest, after its missing and damaged files were fetched.

        Args:
            content: the bytes of manifest.json.
            manifest: what they hold.
            chunks: yields the parts of a file, by its name.
            stop: ends the fetch, with an error, once it is set.

        Raises BundleError naming the file that differs from the manifest, or that cannot be written.
        """
        root = self._folder / "bundles" / hashlib.sha256(content).hexdigest()
        try:
            for name, digest in manifest.files.items():
                self._link(self._file(name, digest, chunks, stop), root / name)
            with _placed(root / MANIFEST) as new:
                new.write_bytes(content)
            os.utime(root)
            self._evict()
        except OSError as error:
            raise BundleError(f"{error.filename or self._folder}: {error.strerror}") from error
        return Bundle(root, manifest)

    def record_served(self, served: ServedBundle) -> None:
        """Replace the record of a URL, if the cache has the bundle. Raises BundleError."""
        if self.manifest(served) is None:
            return
        try:
            with _placed(self._record(served.url)) as new:
                new.write_text(served.model_dump_json(), encoding="utf-8")
        except OSError as error:
            raise BundleError(f"{error.filename or self._folder}: {error.strerror}") from error

    def last_served(self, url: str) -> ServedBundle | None:
        """Return the record of a URL; None without a valid one."""
        try:
            served = ServedBundle.model_validate_json(self._record(url).read_bytes())
        except (OSError, ValidationError):
            return None
        return served if served.url == url else None

    def manifest(self, served: ServedBundle) -> bytes | None:
        """Return the bytes of a cached bundle's manifest; None when they are missing or differ from their hash."""
        try:
            content = (self._folder / "bundles" / served.manifest / MANIFEST).read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == served.manifest else None

    def _record(self, url: str) -> Path:
        return self._folder / "urls" / hashlib.sha256(url.encode()).hexdigest()

    def _file(self, name: str, digest: str, chunks: Callable[[str], Iterator[bytes]], stop: Event) -> Path:
        """Return the path of a file's content, which is fetched unless it is there and whole."""
        folder = self._folder / "files"
        if (folder / digest).is_file() and sha256_of(folder, digest) == digest:
            return folder / digest
        with _placed(folder / digest) as new, new.open("xb") as file:
            found = hashlib.sha256()
            for part in chunks(name):
                if stop.is_set():
                    raise BundleError(f"{name}: the fetch was stopped")
                found.update(part)
                file.write(part)
            if found.hexdigest() != digest:
                raise BundleError(f"{name}: its SHA-256 differs from the manifest's")
            file.flush()
            os.fsync(file.fileno())
        return folder / digest

    def _link(self, file: Path, path: Path) -> None:
        """Let a path of a bundle name a file, in one step."""
        if path.is_file() and path.samefile(file):
            return
        with _placed(path, self._folder / "files") as new:
            link_or_copy(file, new)

    def _evict(self) -> None:
        """Remove the bundles that were fetched longest ago, and files that no bundle holds. What is open stays readable.

        A start without the store needs the bundles that were served last, so they go last.
        """
        fetched: dict[Path, tuple[bool, float]] = {}
        served = self._served()
        for root in (self._folder / "bundles").iterdir():
            with suppress(FileNotFoundError):  # another process has removed it
                fetched[root] = (root.name in served, root.stat().st_mtime)
        for root in sorted(fetched, key=fetched.__getitem__)[:-_KEPT]:
            shutil.rmtree(root, ignore_errors=True)
        for file in (self._folder / "files").iterdir():
            with suppress(FileNotFoundError):
                found = file.stat()
                if found.st_nlink == 1 and time.time() - found.st_ctime > _UNUSED_SECONDS:
                    file.unlink()

    def _served(self) -> list[str]:
        """Return the hashes of the manifests of the latest records."""
        found: dict[str, float] = {}
        for record in (self._folder / "urls").glob("*"):
            with suppress(OSError, ValidationError):
                served = ServedBundle.model_validate_json(record.read_bytes())
                found[served.manifest] = max(record.stat().st_mtime, found.get(served.manifest, 0.0))
        return sorted(found, key=found.__getitem__)[-_KEPT_SERVED:]


@contextmanager
def _placed(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to; it takes the place of `path` when the block ends, and is removed when the block fails.

    It is beside `path`, or in `folder`: what a killed process leaves within a bundle would be a file that its manifest lacks.
    The name is unique also among containers that share the folder, whose processes have the same ids.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = (folder or path.parent) / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
