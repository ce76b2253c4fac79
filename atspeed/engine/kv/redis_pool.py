"""A pool of Redis connections that checks each connection before a call uses it.

A connection can be useless in two ways. It answers, but no longer from a server that takes writes: after a failover the old
master is a replica, and the address points to another server. Or it is silent, because the network dropped it. So

- a connection without an answer for `_FRESH_SECONDS`, or since another one fell silent, is checked before it is used;
- every connection is checked after `_CHECK_SECONDS` as well, idle or not, so that no firewall drops it as idle;
- the check is a write that changes nothing; a connection that refuses it, or does not answer in time, is connected again;
- after a refusal all connections that were opened earlier are opened again, as they lead to the same server.

A refused command has changed nothing, so it is sent once more over a new connection, whatever it is. A command that was sent
and not answered may have been executed: it fails, and is never sent twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, MasterDownError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

_FRESH_SECONDS = 0.01  # a busy connection is used more often than that; an idle one pays a round trip
# Within this time after a failover all connections lead to the new master. Chosen, not measured.
_CHECK_SECONDS = 2.0
# A server that refuses for long, with a full disk for example, must not cost every call a new connection.
_REFUSAL_SECONDS = 1.0
# No key has this name: longer names begin with it. Redis refuses to change it whenever it refuses other writes.
_UNUSED_KEY = "kv:"
# From Redis 7 on the error of a script begins with the code of the command's error; Redis 6.2 quotes it.
_REFUSAL = re.compile(r"(Error running script .*: -)?(READONLY|LOADING|MASTERDOWN|MISCONF|NOREPLICAS) ")


class RefusedError(ResponseError):
    """A command that Redis did not execute because it takes no writes now: no replica, no disk."""


_REFUSALS = (ReadOnlyError, BusyLoadingError, MasterDownError, RefusedError)


async def check_writable(client: Redis) -> None:
    """Make a write that changes nothing. Raises RedisError or OSError when Redis takes no writes."""
    await client.unlink(_UNUSED_KEY)


@dataclass
class _PoolFailures:
    """The last failures of a pool, shared by its connections. Times are of `time.monotonic`.

    Attributes:
        silent_at: the time at which a call last ended without an answer.
        refused_at: the time at which a call last ended with a refusal.
    """

    silent_at: float = -float("inf")
    refused_at: float = -float("inf")

    def record_refusal(self) -> None:
        now = time.monotonic()
        if now - self.refused_at > _REFUSAL_SECONDS:
            self.refused_at = now


class _CheckedConnection(AbstractConnection):
    """A connection that records when it was opened, checked and last answered. check_seconds: time limit of a check."""

    def __init__(self, *, failures: _PoolFailures, check_seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._failures = failures
        self._check_seconds = check_seconds
        self._opened_at = -float("inf")
        self._answered_at = -float("inf")
        self._checked_at = -float("inf")

    async def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        """Connect if the connection is not connected."""
        if not self.is_connected:
            now = time.monotonic()
            self._opened_at = now
            self._checked_at = now
        await super().connect_check_health(check_health, retry_socket_connect)

    async def send_packed_command(self, *args: Any, **options: Any) -> None:
        """Send commands. Raises RedisError or OSError when the connection is lost."""
        try:
            await super().send_packed_command(*args, **options)
        except RuntimeError as error:  # uvloop's, for a transport that has just closed
            raise RedisConnectionError(f"the connection was lost: {error}") from error

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read one answer. After a refusal this connection, and all older ones, connect again."""
        try:
            answer = await super().read_response(*args, **options)
        except (ResponseError, BusyLoadingError) as error:
            self._answered_at = time.monotonic()
            if (refusal := _refusal(error)) is None:
                raise
            self.mark_for_reconnect()  # type: ignore[no-untyped-call]  # redis-py's types are incomplete
            self._failures.record_refusal()
            raise refusal from None
        except BaseException:
            self._failures.silent_at = time.monotonic()
            raise
        self._answered_at = time.monotonic()
        return answer

    async def is_usable(self) -> bool:
        """Return whether commands can be sent: the connection answers, and the server takes writes, or did so just now."""
        if not self.is_connected:
            return True
        if self._opened_at <= self._failures.refused_at:
            return False
        now = time.monotonic()
        silent = self._answered_at < max(now - _FRESH_SECONDS, self._failures.silent_at)
        # Answers to reads alone do not show that the server still takes writes.
        if silent or self._checked_at < now - _CHECK_SECONDS:
            return await self._takes_writes()
        return True

    async def _takes_writes(self) -> bool:
        self._checked_at = time.monotonic()
        try:
            async with asyncio.timeout(self._check_seconds):
                await self.send_command("UNLINK", _UNUSED_KEY, check_health=False)
                await self.read_response()
        except _REFUSALS:
            return False
        except ResponseError:
            return True  # it answers: a user without the right to write here may still read
        except (RedisError, OSError):
            return False
        return True


class _Tcp(_CheckedConnection, Connection):
    """A checked TCP connection."""


class _Unix(_CheckedConnection, UnixDomainSocketConnection):
    """A checked connection over a Unix domain socket."""


class _Tls(_CheckedConnection, SSLConnection):
    """A checked TLS connection that reads the certificate files at every handshake; redis-py reads them at the first only."""

    def _connection_arguments(self) -> Any:
        self.ssl_context.context = None
        return super()._connection_arguments()


_KINDS: dict[type[Any], type[Any]] = {Connection: _Tcp, SSLConnection: _Tls, UnixDomainSocketConnection: _Unix}


class CheckedPool(BlockingConnectionPool):
    """A pool of checked connections, at most `max_connections`; a call that needs one more waits."""

    def __init__(self, *, check_seconds: float, connection_class: type[Any] = Connection, **options: Any) -> None:
        super().__init__(
            connection_class=_KINDS[connection_class],
            failures=_PoolFailures(),
            check_seconds=check_seconds,
            retry=Retry(NoBackoff(), 1, supported_errors=_REFUSALS),
            **options,
        )
        self._checks: asyncio.Task[None] | None = None

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        """Return a usable connection within `timeout` seconds."""
        if self._checks is None or self._checks.done():
            # It outlives the call that starts it, and must not keep the call's metadata, such as a token.
            self._checks = asyncio.get_running_loop().create_task(
                self._check_forever(), name="redis-checks", context=Context()
            )
        try:
            return await super().get_connection(*args, **options)  # type: ignore[no-untyped-call]
        except BaseException:
            # A caller that is cancelled while it is notified of a free connection passes the notification on.
            async with self._condition:
                self._condition.notify()
            raise

    async def ensure_connection(self, connection: Any) -> None:
        """Connect a connection that is not connected or not usable."""
        if not await connection.is_usable():
            await connection.disconnect(nowait=True)
        await super().ensure_connection(connection)

    async def release(self, connection: Any) -> None:
        """Return a connection to the pool. If it must be opened again, close it before the pool is locked, without waiting."""
        if connection.should_reconnect():
            await connection.disconnect(nowait=True)
        await super().release(connection)

    async def aclose(self) -> None:
        """Close the connections and stop the checks."""
        if self._checks is not None:
            self._checks.cancel()
            await asyncio.gather(self._checks, return_exceptions=True)
        await super().aclose()

    async def _check_forever(self) -> None:
        # The check of `cancelling`: a cancellation at the end of a Redis call may be swallowed by the client's own timeout.
        while (task := asyncio.current_task()) and not task.cancelling():
            await asyncio.sleep(_CHECK_SECONDS)
            idle = [connection for connection in self._available_connections if connection.is_connected]
            await asyncio.gather(*(self._check(connection) for connection in idle))

    async def _check(self, connection: Any) -> None:
        """Check an idle connection, and close it if it is not usable. No call can use it meanwhile."""
        if connection not in self._available_connections:
            return
        self._available_connections.remove(connection)
        self._in_use_connections.add(connection)
        try:
            if not await connection.is_usable():
                with contextlib.suppress(RedisError):
                    await connection.disconnect(nowait=True)
        finally:
            await self.release(connection)


def _refusal(error: RedisError) -> RedisError | None:
    """Return the error as one of `_REFUSALS`; None if it is no refusal."""
    if isinstance(error, _REFUSALS):
        return error
    return RefusedError(str(error)) if _REFUSAL.match(str(error)) else None
