"""The place that a setting names a bundle by: a path, or a URL.

Both may be a link. A path is a symbolic link then. A URL names an object whose text is the name of a bundle beside it, since
object stores have no links.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Protocol

from atspeed.artefacts.bundle_cache import BundleCache, ServedBundle
from atspeed.artefacts.object_store import ObjectStore, StoreError
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import MANIFEST, SIGNATURE, Manifest, parse_manifest
from atspeed.engine.errors import BundleError
from atspeed.security.file_watch import file_signature

if TYPE_CHECKING:
    from atspeed.artefacts.signature import TrustedKeys

LINKED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


class NamedBundle(Protocol):
    """The bundle that a source names at one moment. Its methods block, and raise BundleError."""

    @property
    def place(self) -> str:
        """Return the folder or URL."""

    @property
    def revision(self) -> Hashable:
        """Return a value that changes with the bundle."""

    def version(self) -> str:
        """Check the signature, if one is asked for, and return the version in the manifest."""

    def open(self, stop: Event) -> Bundle:
        """Return the bundle in a local folder. It may take minutes, and ends early once `stop` is set."""

    def record_served(self) -> None:
        """Record in the cache that the bundle is served, for a start without the store. Raises BundleError when this fails."""


class BundleSource(Protocol):
    """A place that names a bundle."""

    @property
    def place(self) -> str:
        """Return the path or URL."""

    def look(self) -> NamedBundle | None:
        """Return the bundle that the place names now; None without one. Raises StoreError when the store cannot say."""

    def last_served(self) -> NamedBundle | None:
        """Return the last served bundle from the cache, without the store; None if there is none."""


def bundle_source(place: Path | str, keys: TrustedKeys | None, cache: BundleCache) -> BundleSource:
    """Return the source for a path or a URL. keys: those that must have signed a bundle; None for any bundle."""
    return LinkSource(place, keys) if isinstance(place, Path) else UrlSource(place, keys, cache)


@dataclass(frozen=True)
class _Folder:
    """A bundle in a local folder."""

    root: Path
    revision: Hashable
    keys: TrustedKeys | None

    @property
    def place(self) -> str:
        return str(self.root)

    def version(self) -> str:
        return self._manifest().version

    def open(self, stop: Event) -> Bundle:  # noqa: ARG002 - it takes no time
        return Bundle(self.root, self._manifest())

    def record_served(self) -> None:
        """Do nothing: a folder is always there."""

    def _manifest(self) -> Manifest:
        """Parse the bytes whose signature was checked."""
        try:
            content = (self.root / MANIFEST).read_bytes()
        except OSError as error:
            raise BundleError(f"{self.root / MANIFEST}: {error.strerror}") from error
        if self.keys:
            self.keys.check(self.place, content, _read_or_none(self.root / SIGNATURE))
        return parse_manifest(f"{self.root / MANIFEST}", content)


class LinkSource:
    """A directory, or a symbolic link to one. The link is resolved once, so a link that moves cannot mix two bundles."""

    def __init__(self, path: Path, keys: TrustedKeys | None = None) -> None:
        self._path = path
        self._keys = keys

    @property
    def place(self) -> str:
        """Return the path."""
        return str(self._path)

    def look(self) -> NamedBundle | None:
        """Return the bundle that the path names now."""
        try:
            root = self._path.resolve()
        except (OSError, RuntimeError):  # RuntimeError: a circle of links
            return None
        found = file_signature(root / MANIFEST)
        if found is None:
            return None
        signed = file_signature(root / SIGNATURE) if self._keys else None
        return _Folder(root, (str(root), found, signed), self._keys)

    def last_served(self) -> None:
        """Return None: a folder needs no store."""
        return


@dataclass(frozen=True)
class _Stored:
    """A bundle in a store."""

    place: str
    content: bytes
    signature: bytes | None
    source: UrlSource

    @property
    def revision(self) -> Hashable:
        return self.place, hashlib.sha256(self.content).digest(), self.signature

    def version(self) -> str:
        return self._manifest().version

    def open(self, stop: Event) -> Bundle:
        store, place = self.source.store, self.place
        try:
            return self.source.cache.fetch(
                self.content, self._manifest(), lambda name: store.chunks(f"{place}/{name}"), stop
            )
        except StoreError:
            raise
        except BundleError as error:
            text = str(error)
            raise BundleError(text if place in text else f"{place}: {text}") from error

    def record_served(self) -> None:
        digest = hashlib.sha256(self.content).hexdigest()
        signature = None if self.signature is None else base64.b64encode(self.signature)
        self.source.cache.record_served(
            ServedBundle(url=self.source.place, place=self.place, manifest=digest, signature=signature)
        )

    def _manifest(self) -> Manifest:
        if self.source.keys:
            self.source.keys.check(self.place, self.content, self.signature)
        return parse_manifest(f"{self.place}/{MANIFEST}", self.content)


class UrlSource:
    """A URL of a bundle, or of an object whose text names a bundle beside it.

    Attributes:
        store: the store behind the URL.
        keys: the keys of which one must have signed a bundle; None for any bundle.
        cache: the folder of fetched bundles.
    """

    def __init__(self, url: str, keys: TrustedKeys | None, cache: BundleCache) -> None:
        self._url = url
        self.keys = keys
        self.cache = cache
        self.store = ObjectStore(url)

    @property
    def place(self) -> str:
        """Return the URL."""
        return self._url

    def look(self) -> NamedBundle | None:
        """Return the bundle that the URL names now."""
        return self._stored(self._url) or self._linked()

    def last_served(self) -> NamedBundle | None:
        """Return the last served bundle from the cache. Its signature and files are checked like those of the store."""
        served = self.cache.last_served(self._url)
        content = self.cache.manifest(served) if served else None
        return _Stored(served.place, content, served.signature, self) if served and content else None

    def _linked(self) -> _Stored | None:
        text = self.store.read(self._url)
        if text is None:
            return None
        name = text[:1024].decode(errors="replace").strip()
        if not LINKED_NAME.fullmatch(name):
            raise BundleError(f"{self._url}: neither a bundle nor the name of one beside it")
        return self._stored(f"{self._url.rpartition('/')[0]}/{name}")

    def _stored(self, url: str) -> _Stored | None:
        content = self.store.read(f"{url}/{MANIFEST}")
        if content is None:
            return None
        return _Stored(url, content, self.store.read(f"{url}/{SIGNATURE}") if self.keys else None, self)


def _read_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
