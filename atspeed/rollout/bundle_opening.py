"""Sources of a service's bundles, and the bundle that a service starts with."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import structlog

from atspeed.artefacts.bundle_cache import BundleCache, default_cache
from atspeed.artefacts.bundle_source import BundleSource, NamedBundle, bundle_source
from atspeed.artefacts.object_store import StoreError
from atspeed.artefacts.signature import TrustedKeys
from atspeed.configuration.settings import ServiceSettings
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import MANIFEST
from atspeed.engine.errors import BundleError
from atspeed.rollout.release_track import Track

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def bundle_sources(settings: ServiceSettings) -> Mapping[Track, BundleSource]:
    """Return the place of each track in the settings. Raises BundleError for keys or a scheme that cannot be used."""
    keys = None
    if settings.bundle_public_key is not None:
        keys = TrustedKeys(settings.bundle_public_key)
    cache = BundleCache(settings.bundle_cache or default_cache())
    places = {Track.STABLE: settings.bundle, Track.CANARY: settings.canary_bundle}
    return {track: bundle_source(place, keys, cache) for track, place in places.items() if place is not None}


def open_bundle(path: Path) -> Bundle:
    """Open the bundle that a path names now. The link is resolved once, so a link that moves cannot mix two bundles."""
    return Bundle(path.resolve())


async def open_named(named: NamedBundle) -> Bundle:
    """Open a bundle in a thread, which ends early when the caller is cancelled. Raises BundleError."""
    stop = threading.Event()
    try:
        return await asyncio.to_thread(named.open, stop)
    except asyncio.CancelledError:
        stop.set()
        raise


async def open_first(source: BundleSource) -> Bundle:
    """Open the bundle that a source names at the start; if the store cannot be reached, the last served one.

    Raises BundleError, also when there is none.
    """
    try:
        named = await asyncio.to_thread(source.look)
        if named is None:
            raise BundleError(f"{source.place}/{MANIFEST}: No such file or directory")
        return await open_named(named)
    except StoreError as error:
        named = await asyncio.to_thread(source.last_served)
        if named is None:
            raise
        bundle = await open_named(named)
        reason = " ".join(str(error).split())
        _log.warning("bundle_from_cache", root=named.place, version=bundle.manifest.version, reason=reason)
        return bundle
