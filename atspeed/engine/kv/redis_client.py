"""Redis clients that fail soon, over TLS whose certificates may be renewed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import ConnectionPool, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig


@dataclass(frozen=True)
class RedisTls:
    """PEM files for rediss://. ca: of Redis's certificate, the system's CAs without one; certificate and key: what it sees."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


class _TlsConnection(SSLConnection):
    """Reads the files for every handshake: redis-py alone would for the first, and a renewed certificate would go unused."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None
        return super()._connection_arguments()


def connect(url: str, *, timeout_seconds: float, tls: RedisTls | None = None) -> Redis:
    """A Redis client that fails within about `timeout_seconds` instead of retrying behind its caller's back.

    Ten retries are the default of `Redis()`, none that of `from_url`, in redis-py 8; said here, it cannot change. A retry
    is seconds where a request has milliseconds, and an RPUSH that runs twice when only its reply was lost.
    """
    encrypted = url.startswith("rediss://")
    files = tls or RedisTls()
    pool = ConnectionPool.from_url(
        url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        # Where these are on, as by default, redis-py takes a pooled connection that the server has closed for one with a
        # notification, and the first call on each after a restart of the server fails.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        **(
            {"ssl_ca_certs": files.ca, "ssl_certfile": files.certificate, "ssl_keyfile": files.key} if encrypted else {}
        ),
    )
    if encrypted:
        pool.connection_class = _TlsConnection
    return Redis.from_pool(pool)
