"""Around every call: a request id, the bound on how many are held, exceptions to statuses, one log line.

Handlers are coroutines or async generators that take their requests from the argument (not from `context.read()`). A
request that is not valid protobuf becomes INVALID_ARGUMENT; gRPC alone would answer UNKNOWN with protobuf's own text.
An async generator is closed before its call ends, also when the client goes away, so its `finally` frees state at once.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import structlog

from atspeed.errors import DeadlineExceededError, InvalidArgumentError, ResourceExhaustedError
from atspeed.observability.logs import REQUEST_ID_HEADER, bind_request_id
from atspeed.rpc.grpc_status import call_status

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs only
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Behaviour = Callable[[Any, Context], Any]

# Health and reflection stay reachable on a busy server, and out of its log.
_INFRASTRUCTURE = "/grpc."
_RETRY_AFTER_SECONDS = 0.5
# A call holds its place while its message arrives.
_MESSAGE_SECONDS = 30.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of a server, of all four kinds."""

    def __init__(self, max_concurrent_calls: int) -> None:
        self._max_calls = max_concurrent_calls
        self._calls: Counter[str] = Counter()
        self._wrapped: dict[tuple[str, Handler], Handler] = {}  # an interceptor below may refuse by another handler

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The method's handler, wrapped; gRPC's own answer where there is no such method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        key = (handler_call_details.method, handler)
        if key not in self._wrapped:
            self._wrapped[key] = self._wrap(*key)
        return self._wrapped[key]

    def _wrap(self, method: str, handler: Handler) -> Handler:
        """grpc.aio calls what takes one message only when all of it is there, so every method is served as one that takes many:
        it is counted, or refused, before its message is received.
        """
        behaviour = _behaviour(handler)
        respond = _stream if handler.response_streaming else _one
        build = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )

        quiet = method.startswith(_INFRASTRUCTURE)

        async def serve(requests: AsyncIterator[Any], context: Context) -> Any:
            self._take(method, quiet)
            try:
                request = _valid_stream(requests) if handler.request_streaming else await _only(requests)
                return await respond(behaviour(request, context), context)
            finally:
                self._calls[method] -= 1

        async def call(requests: AsyncIterator[Any], context: Context) -> Any:
            request_id = bind_request_id(_offered_id(context))
            context.set_trailing_metadata(((REQUEST_ID_HEADER, request_id),))
            with _Logged(method, quiet) as logged:
                try:
                    return await serve(requests, context)
                except (grpc.aio.AbortError, grpc.aio.InternalError):
                    logged.code = "ABORTED BY HANDLER"
                    raise  # gRPC has the status already, or the connection is gone
                except Exception as error:  # noqa: BLE001 - call_status logs what it does not know
                    status = call_status(error)
                    logged.code = status.code.name
                    context.set_code(status.code)  # which the interceptors around this one cannot see in an abort
                    trailers = ((REQUEST_ID_HEADER, request_id), *status.trailers)
                    await context.abort(status.code, status.details, trailers)

        return build(
            call,
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _take(self, method: str, quiet: bool) -> None:
        """Each method has a bound of its own, so a flood of one leaves the others, and the server's memory, alone."""
        if self._calls[method] >= self._max_calls and not quiet:
            raise ResourceExhaustedError(
                "this replica holds as many calls of this method as it may; try another or later",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
            )
        self._calls[method] += 1


class _Logged:
    """One log line at the end of a call."""

    def __init__(self, method: str, quiet: bool) -> None:
        self._method = method
        self._write = _log.debug if quiet else _log.info
        self._start = time.perf_counter_ns()
        self.code = "OK"

    def __enter__(self) -> _Logged:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        code = "CANCELLED" if isinstance(error, (asyncio.CancelledError, GeneratorExit)) else self.code
        milliseconds = (time.perf_counter_ns() - self._start) / 1e6
        self._write("call", method=self._method, code=code, duration_ms=round(milliseconds, 3))


class _Malformed:
    """Stands for a request that is not valid protobuf."""


_MALFORMED = _Malformed()


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Like `deserialize`, but gives `_MALFORMED` where that fails: its exception would reach the client as it is."""

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
    """The message of a method that takes one."""
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


async def _one(answer: Awaitable[Any], _context: Context) -> Any:
    return await answer


async def _stream(answer: Any, context: Context) -> None:
    """Send what an async generator yields, or let a coroutine send by itself."""
    if not inspect.isasyncgen(answer):
        await answer
        return
    async with aclosing(answer):
        async for message in answer:
            await context.write(message)


def _behaviour(handler: Handler) -> Behaviour:
    """The method itself."""
    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): handler.unary_unary,
        (False, True): handler.unary_stream,
        (True, False): handler.stream_unary,
        (True, True): handler.stream_stream,
    }
    behaviour: Behaviour = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    return behaviour


def _offered_id(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_HEADER and isinstance(value, str):
            return value
    return None
