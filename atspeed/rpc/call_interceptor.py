"""Gives every call a request id, a concurrency limit, a status and a log line.

Handlers are coroutines or async generators that take their requests from the argument, not from `context.read()`.
A request that is not valid protobuf becomes INVALID_ARGUMENT; gRPC alone would answer UNKNOWN with protobuf's own text.
An async generator is closed before its call ends, even when the client is gone, so its `finally` frees state at once.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
import structlog

from atspeed.errors import DeadlineExceededError, InvalidArgumentError, ResourceExhaustedError
from atspeed.observability.logs import REQUEST_ID_HEADER, bind_peer, bind_request_id, peer
from atspeed.rpc.grpc_status import call_status
from atspeed.rpc.handlers import INFRASTRUCTURE_PREFIX, Behaviour, Context, Handler, WrappingInterceptor, wrap_handler
from atspeed.security.peers import Peers

# Chosen: several lists end in this time, and an interactive client can still afford it.
_RETRY_AFTER_SECONDS = 0.5
# A call counts against the limit while its message arrives. 30 s let a 32 MiB message pass at 10 Mbit/s.
_MESSAGE_SECONDS = 30.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class CallInterceptor(WrappingInterceptor):
    """Wraps every method of a server. Health and reflection have no limit, and their log lines have level debug."""

    def __init__(self, max_concurrent_calls: int, peers: Peers) -> None:
        super().__init__()
        self._max_calls = max_concurrent_calls
        self._peers = peers
        self._calls: Counter[str] = Counter()

    def wrap(self, method: str, handler: Handler) -> Handler:
        """Return the wrapped handler, which takes a stream of requests.

        grpc.aio calls a method of one request only after it has received that request. A method of many requests is called at
        once, so a call is counted, or refused, before its message is received.
        """
        infrastructure = method.startswith(INFRASTRUCTURE_PREFIX)
        respond = _send_stream if handler.response_streaming else _reply

        def around(behaviour: Behaviour) -> Behaviour:
            async def serve(requests: AsyncIterator[Any], context: Context) -> Any:
                self._count(method, limited=not infrastructure)
                try:
                    request = _valid_stream(requests) if handler.request_streaming else await _only(requests)
                    return await respond(behaviour(request, context), context)
                finally:
                    self._calls[method] -= 1

            async def call(requests: AsyncIterator[Any], context: Context) -> Any:
                request_id = bind_request_id(_offered_id(context))
                # The peer is read now, since a log line may be written after the connection has ended.
                bind_peer(partial(self._peers.describe, context.peer(), context.invocation_metadata() or ()))
                context.set_trailing_metadata(((REQUEST_ID_HEADER, request_id),))
                with _CallLog(method, quiet=infrastructure) as log:
                    try:
                        return await serve(requests, context)
                    except (grpc.aio.AbortError, grpc.aio.InternalError):
                        log.code = "ABORTED BY HANDLER"
                        raise  # gRPC has the status already, or the connection is gone
                    except Exception as error:  # noqa: BLE001 - call_status logs unknown errors
                        status = call_status(error)
                        log.code = status.code.name
                        context.set_code(status.code)  # for outer interceptors, which cannot read it from an abort
                        trailers = ((REQUEST_ID_HEADER, request_id), *status.trailers)
                        await context.abort(status.code, status.details, trailers)

            return call

        return wrap_handler(handler, around, as_stream=True, deserialize=_tolerant(handler.request_deserializer))

    def _count(self, method: str, *, limited: bool) -> None:
        """Count a call. Each method has its own limit, so a flood of one method leaves the others alone."""
        if limited and self._calls[method] >= self._max_calls:
            raise ResourceExhaustedError(
                "this replica holds as many calls of this method as it may; try another or later",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
            )
        self._calls[method] += 1


class _CallLog:
    """Writes one log line at the end of a call, with the address of the caller if the call fails."""

    def __init__(self, method: str, *, quiet: bool) -> None:
        self._method = method
        self._write = _log.debug if quiet else _log.info
        self._start = time.perf_counter_ns()
        self.code = "OK"

    def __enter__(self) -> _CallLog:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        code = "CANCELLED" if isinstance(error, (asyncio.CancelledError, GeneratorExit)) else self.code
        milliseconds = (time.perf_counter_ns() - self._start) / 1e6
        failed_peer = {} if code == "OK" else peer()
        self._write("call", method=self._method, code=code, duration_ms=round(milliseconds, 3), **failed_peer)


class _Malformed:
    """Stands for a request that is not valid protobuf."""


_MALFORMED = _Malformed()


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Return `deserialize` with `_MALFORMED` in place of an exception, whose text would reach the client."""

    def tolerant(data: bytes) -> Any:
        try:
            return deserialize(data) if deserialize else data
        except Exception:  # noqa: BLE001 - protobuf implementations differ in what they raise
            return _MALFORMED

    return tolerant


def _valid(request: Any) -> Any:
    if request is _MALFORMED:
        raise InvalidArgumentError("request", "not a valid message of this method")
    return request


async def _only(requests: AsyncIterator[Any]) -> Any:
    """Receive the only message of a method that takes one."""
    try:
        async with asyncio.timeout(_MESSAGE_SECONDS):
            return _valid(await anext(requests))
    except StopAsyncIteration:
        raise InvalidArgumentError("request", "the call ended before its message") from None
    except TimeoutError:
        raise DeadlineExceededError(f"the request did not arrive within {_MESSAGE_SECONDS:g} s") from None


async def _valid_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _valid(request)


async def _reply(answer: Awaitable[Any], _context: Context) -> Any:
    return await answer


async def _send_stream(answer: Any, context: Context) -> None:
    """Send the messages of an async generator. A coroutine sends its messages itself."""
    if not inspect.isasyncgen(answer):
        await answer
        return
    async with aclosing(answer):
        async for message in answer:
            await context.write(message)


def _offered_id(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_HEADER and isinstance(value, str):
            return value
    return None
