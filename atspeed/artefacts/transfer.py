"""Copies a bundle to a URL, and from one.

What is said to be copied was read back and compared.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING

from atspeed.artefacts.bundle_cache import BundleCache
from atspeed.artefacts.bundle_source import LINKED_NAME, UrlSource
from atspeed.artefacts.object_store import ObjectStore
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.bundle_files import files_below, read_file
from atspeed.engine.bundle.manifest import MANIFEST, SIGNATURE, link_files
from atspeed.engine.errors import BundleError

if TYPE_CHECKING:
    from atspeed.artefacts.signature import TrustedKeys


def push_bundle(root: Path, url: str, link: str | None = None) -> Bundle:
    """Copy a bundle to a URL, and let a link name it. Returns the bundle.

    The manifest is written last, so that a bundle that is half there is none. A push that was interrupted is pushed again.

    Args:
        root: the bundle's folder. Its files are compared with the manifest before.
        url: where the bundle will be. Raises BundleError when another bundle is there.
        link: the URL of an object beside the bundle, which services follow.
    """
    if link and (link.rpartition("/")[0] != url.rpartition("/")[0] or link == url):
        raise BundleError(f"{link}: must be beside {url}, since a link holds a name")
    if link and not LINKED_NAME.fullmatch(url.rpartition("/")[2]):
        raise BundleError(f"{url}: the last part of its name can be in no link: letters, digits, . - and _ can")
    bundle = Bundle(root)
    bundle.verify()
    content = read_file(root, MANIFEST)
    store = ObjectStore(url)
    there = store.read(f"{url}/{MANIFEST}")
    if there not in {None, content}:
        raise BundleError(f"{url}: another bundle is there; push to a new name")
    for name, digest in bundle.manifest.files.items():
        store.upload(root / name, f"{url}/{name}")
        _check_stored(store, f"{url}/{name}", digest)
    if SIGNATURE in files_below(root):
        _write(store, f"{url}/{SIGNATURE}", read_file(root, SIGNATURE))
    _write(store, f"{url}/{MANIFEST}", content)
    if link:
        _write(store, link, f"{url.rpartition('/')[2]}\n".encode())
    return bundle


def pull_bundle(url: str, out: Path, keys: TrustedKeys | None = None) -> Bundle:
    """Copy the bundle that a URL names into a new folder, which appears in one step. Returns the bundle.

    Raises BundleError when it is not signed by one of `keys`, or differs from its manifest, or when `out` is there.
    """
    if out.exists():
        raise BundleError(f"{out}: is there already")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        source = UrlSource(url, keys, BundleCache(Path(temporary, "cache")))
        named = source.look()
        if named is None:
            raise BundleError(f"{url}: no bundle is there")
        fetched = named.open(Event())
        whole = Path(temporary, "bundle")
        whole.mkdir()
        link_files(fetched.root, [*fetched.manifest.files, MANIFEST], whole)
        if (signature := source.store.read(f"{named.place}/{SIGNATURE}")) is not None:
            (whole / SIGNATURE).write_bytes(signature)
        whole.rename(out)
    return Bundle(out, fetched.manifest)


def _write(store: ObjectStore, url: str, content: bytes) -> None:
    store.write(url, content)
    if store.read(url) != content:
        raise BundleError(f"{url}: was written, but reads differently")


def _check_stored(store: ObjectStore, url: str, digest: str) -> None:
    """Read an object back and compare its hash."""
    found = hashlib.sha256()
    for part in store.chunks(url):
        found.update(part)
    if found.hexdigest() != digest:
        raise BundleError(f"{url}: was written, but its SHA-256 differs")
