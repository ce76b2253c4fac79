"""Redis clients that fail soon, over TLS whose certificates may be renewed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis
from redis.maint_notifications import MaintNotificationsConfig

from atspeed.engine.kv.redis_pool import CheckedPool
from atspeed.engine.kv.redis_url import check_redis_url

# More calls at once wait for one of these. A server has a limit for all of its clients, 10,000 by default.
_MAX_CONNECTIONS = 64
# A connection that does not answer by then is replaced, and the call has the rest of its time for another one.
_ASKING_SHARE, _MOST_ASK_SECONDS = 0.3, 1.0


@dataclass(frozen=True)
class RedisTls:
    """PEM files for rediss://. ca: of Redis's certificate, the system's CAs without one; certificate and key: what it sees."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


def connect(url: str, *, timeout_seconds: float, tls: RedisTls | None = None) -> Redis:
    """A Redis client that fails within about `timeout_seconds` instead of retrying behind its caller's back.

    A call waits so long for a connection, and so long for its answer. A command that was sent and not answered is not sent
    again: a retry is seconds where a request has milliseconds, and an RPUSH that runs twice when only its reply was lost. Only
    one that Redis refused to execute is (`redis_pool`). Raises ValueError for a URL that names no Redis.
    """
    files = tls or RedisTls()
    encrypted = {"ssl_ca_certs": files.ca, "ssl_certfile": files.certificate, "ssl_keyfile": files.key}
    by_network = {} if url.startswith("unix://") else {"socket_keepalive": True}
    pool = CheckedPool.from_url(
        check_redis_url(url),
        max_connections=_MAX_CONNECTIONS,
        timeout=timeout_seconds,
        ask_seconds=min(timeout_seconds * _ASKING_SHARE, _MOST_ASK_SECONDS),
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        # Where these are on, as by default, redis-py takes a pooled connection that the server has closed for one with a
        # notification, and the first call on each after a restart of the server fails.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        **by_network,
        **(encrypted if url.startswith("rediss://") else {}),
    )
    return Redis.from_pool(pool)
