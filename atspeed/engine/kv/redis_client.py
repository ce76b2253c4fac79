"""Redis clients that fail fast, over TLS with renewable certificates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis
from redis.maint_notifications import MaintNotificationsConfig

from atspeed.engine.kv.redis_pool import CheckedPool
from atspeed.engine.kv.redis_url import check_redis_url

# More concurrent calls wait for a connection. A server has a limit for all of its clients, 10,000 by default.
_MAX_CONNECTIONS = 64
# Time for the check of a connection, as a share of the timeout, and its limit. A connection that does not answer by then is
# replaced, and the call has the rest of its time for another one. Chosen, not measured.
_CHECK_SHARE = 0.3
_MAX_CHECK_SECONDS = 1.0


@dataclass(frozen=True)
class RedisTls:
    """PEM files for rediss://.

    Attributes:
        ca: the CA of Redis's certificate; None for the CAs of the system.
        certificate: the client certificate that Redis sees.
        key: its private key.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


def connect(url: str, *, timeout_seconds: float, tls: RedisTls | None = None) -> Redis:
    """Return a Redis client that fails within about `timeout_seconds` and does not retry by itself.

    A call waits at most that time for a connection, and once more for its answer. A command that was sent and not answered is
    not sent again: a retry takes seconds while a request has milliseconds, and an RPUSH would run twice if only its reply was
    lost. A command that Redis refused to execute is sent again (`redis_pool`). Raises ValueError for an invalid URL.
    """
    files = tls or RedisTls()
    encrypted = {"ssl_ca_certs": files.ca, "ssl_certfile": files.certificate, "ssl_keyfile": files.key}
    by_network = {} if url.startswith("unix://") else {"socket_keepalive": True}
    pool = CheckedPool.from_url(
        check_redis_url(url),
        max_connections=_MAX_CONNECTIONS,
        timeout=timeout_seconds,
        check_seconds=min(timeout_seconds * _CHECK_SHARE, _MAX_CHECK_SECONDS),
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        # With notifications, the default, redis-py mistakes a connection that the server closed for one with a notification,
        # and the first call on each connection fails after a restart of the server.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        **by_network,
        **(encrypted if url.startswith("rediss://") else {}),
    )
    return Redis.from_pool(pool)
