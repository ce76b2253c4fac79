"""A pool of Redis connections that finds out before a call what a connection is worth.

A connection is of no use in two ways. It answers, but no longer from a server that takes writes: after a failover the old
master is a replica, and the address leads to another server. Or it is silent, because something between dropped it. So

- a connection that was not heard for `_FRESH_SECONDS`, or since another one fell silent, is asked before it is used;
- every one is asked after `_CHECK_SECONDS` as well, idle or not, which keeps idle ones from being dropped by what lies between;
- the question is a write that changes nothing; who refuses it, or does not answer in time, is connected again;
- after a refusal all connections that were opened before it are opened anew, as they lead where that one led.

A refused command has changed nothing, so it is sent once more over a new connection, whatever it is. A command that was sent
and not answered may have been executed: it fails, and is never sent twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from dataclasses import dataclass
from typing import Any

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, MasterDownError, ReadOnlyError, RedisError, ResponseError

_FRESH_SECONDS = 0.01  # a busy connection is used more often; others pay a round trip
_CHECK_SECONDS = 2.0
# A server that refuses for long, such as one whose disk is full, must not cost every call a new connection.
_REFUSAL_SECONDS = 1.0
# No key has this name: all that begin with it go on. Redis refuses to change it as it would refuse to change another.
_NOTHING = "kv:"
# From Redis 7 on a script's error has the code of the command's; Redis 6.2 quotes it.
_REFUSAL = re.compile(r"(Error running script .*: -)?(READONLY|LOADING|MASTERDOWN|MISCONF|NOREPLICAS) ")


class RefusedError(ResponseError):
    """Redis has not executed a command because it takes no writes at present: no replica, no disk."""


_REFUSALS = (ReadOnlyError, BusyLoadingError, MasterDownError, RefusedError)


async def change_nothing(client: Redis) -> None:
    """Ask Redis for a write that changes nothing. Raises RedisError or OSError where it would take none."""
    await client.unlink(_NOTHING)


@dataclass
class _Doubts:
    """Shared by the connections of a pool. silent_at: when a call last ended without an answer; refused_at: with a refusal."""

    silent_at: float = -float("inf")
    refused_at: float = -float("inf")

    def refused(self) -> None:
        now = time.monotonic()
        if now - self.refused_at > _REFUSAL_SECONDS:
            self.refused_at = now


class _Asked(AbstractConnection):
    """A connection that knows when it was opened and last heard. ask_seconds: how long the question may take."""

    def __init__(self, *, doubts: _Doubts, ask_seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._doubts = doubts
        self._ask_seconds = ask_seconds
        self._opened_at = self._heard_at = self._asked_at = -float("inf")

    async def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        """Connect, unless it is connected."""
        if not self.is_connected:
            self._opened_at = self._asked_at = time.monotonic()
        await super().connect_check_health(check_health, retry_socket_connect)

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """One answer. A refusal makes this connection, and all older ones, connect again."""
        try:
            answer = await super().read_response(*args, **options)
        except (ResponseError, BusyLoadingError) as error:
            self._heard_at = time.monotonic()
            if (refusal := _refusal(error)) is None:
                raise
            self.mark_for_reconnect()  # type: ignore[no-untyped-call]  # redis-py's types are incomplete
            self._doubts.refused()
            raise refusal from None
        except BaseException:
            self._doubts.silent_at = time.monotonic()
            raise
        self._heard_at = time.monotonic()
        return answer

    async def is_of_use(self) -> bool:
        """Whether commands may be sent on it: it stands, leads where a new one would, and takes writes, or did so just now."""
        if not self.is_connected:
            return True
        if self._opened_at <= self._doubts.refused_at:
            return False
        now = time.monotonic()
        silent = self._heard_at < max(now - _FRESH_SECONDS, self._doubts.silent_at)
        # Answers to reads alone do not tell whether it still leads to a server that takes writes.
        if silent or self._asked_at < now - _CHECK_SECONDS:
            return await self._takes_writes()
        return True

    async def _takes_writes(self) -> bool:
        self._asked_at = time.monotonic()
        try:
            async with asyncio.timeout(self._ask_seconds):
                await self.send_command("UNLINK", _NOTHING, check_health=False)
                await self.read_response()
        except _REFUSALS:
            return False
        except ResponseError:
            return True  # it answers; who may not write everywhere may still read
        except (RedisError, OSError):
            return False
        return True


class _Tcp(_Asked, Connection):
    pass


class _Unix(_Asked, UnixDomainSocketConnection):
    pass


class _Tls(_Asked, SSLConnection):
    """Reads the files for every handshake: redis-py alone would for the first, and a renewed certificate would go unused."""

    def _connection_arguments(self) -> Any:
        self.ssl_context.context = None
        return super()._connection_arguments()


_KINDS: dict[type[Any], type[Any]] = {Connection: _Tcp, SSLConnection: _Tls, UnixDomainSocketConnection: _Unix}


class CheckedPool(BlockingConnectionPool):
    """Connections as in the module's docstring, `max_connections` at most; who wants one more waits for it."""

    def __init__(self, *, ask_seconds: float, connection_class: type[Any] = Connection, **options: Any) -> None:
        super().__init__(
            connection_class=_KINDS[connection_class],
            doubts=_Doubts(),
            ask_seconds=ask_seconds,
            retry=Retry(NoBackoff(), 1, supported_errors=_REFUSALS),
            **options,
        )
        self._checks: asyncio.Task[None] | None = None

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        """A connection that is of use, within `timeout` seconds."""
        if self._checks is None or self._checks.done():
            self._checks = asyncio.get_running_loop().create_task(self._check_forever(), name="redis-checks")
        try:
            return await super().get_connection(*args, **options)  # type: ignore[no-untyped-call]
        except BaseException:
            # Who is cancelled just as it is told of a free connection would leave the next one waiting.
            async with self._condition:
                self._condition.notify()
            raise

    async def ensure_connection(self, connection: Any) -> None:
        """Connect what is not connected, or of no use."""
        if not await connection.is_of_use():
            await connection.disconnect(nowait=True)
        await super().ensure_connection(connection)

    async def release(self, connection: Any) -> None:
        """Take a connection back. One that must be opened anew is closed before the pool is locked, without waiting."""
        if connection.should_reconnect():
            await connection.disconnect(nowait=True)
        await super().release(connection)

    async def aclose(self) -> None:
        """Close the connections and stop asking."""
        if self._checks is not None:
            self._checks.cancel()
            await asyncio.gather(self._checks, return_exceptions=True)
        await super().aclose()

    async def _check_forever(self) -> None:
        # A cancellation that meets the end of a call to Redis raises nothing, as its client's own timeout can swallow it.
        while (task := asyncio.current_task()) and not task.cancelling():
            await asyncio.sleep(_CHECK_SECONDS)
            idle = [connection for connection in self._available_connections if connection.is_connected]
            await asyncio.gather(*(self._check(connection) for connection in idle))

    async def _check(self, connection: Any) -> None:
        """Ask an idle connection, and close it where it is of no use. Nobody else can use it meanwhile."""
        if connection not in self._available_connections:
            return
        self._available_connections.remove(connection)
        self._in_use_connections.add(connection)
        try:
            if not await connection.is_of_use():
                with contextlib.suppress(RedisError):
                    await connection.disconnect(nowait=True)
        finally:
            await self.release(connection)


def _refusal(error: RedisError) -> RedisError | None:
    """The same error as one of `_REFUSALS`, if it is one."""
    if isinstance(error, _REFUSALS):
        return error
    return RefusedError(str(error)) if _REFUSAL.match(str(error)) else None
