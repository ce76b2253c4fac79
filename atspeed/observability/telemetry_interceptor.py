"""The outermost interceptor: of every call but those of health and reflection a span, and what Prometheus counts of calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from atspeed.concurrency.deadline import is_over
from atspeed.observability import tracing
from atspeed.observability.metrics import ServerMetrics

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs only
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_INFRASTRUCTURE = "/grpc."
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class TelemetryInterceptor(grpc.aio.ServerInterceptor):
    """Goes around handlers that are coroutines, also where they serve streams, as `CallInterceptor` makes them."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._wrapped: dict[tuple[str, Handler], Handler] = {}  # one that refuses is another handler

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The method's handler, observed; there is none for a method that nobody has."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith(_INFRASTRUCTURE):
            return handler
        key = (method, handler)
        if key not in self._wrapped:
            self._wrapped[key] = self._wrap(*key)
        return self._wrapped[key]

    def _wrap(self, method: str, handler: Handler) -> Handler:
        kind = next(kind for kind in _KINDS if getattr(handler, kind))
        behaviour, name = getattr(handler, kind), method.rpartition("/")[2]
        in_flight, seconds = self._metrics.in_flight.labels(name), self._metrics.seconds.labels(name)

        async def observed(request: Any, context: Context) -> Any:
            begun, code = time.perf_counter(), "OK"
            in_flight.inc()
            try:
                with tracing.call(method, tuple(context.invocation_metadata() or ())):
                    return await behaviour(request, context)
            except BaseException as error:
                code = _status(error, context, time.perf_counter() - begun)
                raise
            finally:
                in_flight.dec()
                self._metrics.calls.labels(name, code).inc()
                seconds.observe(time.perf_counter() - begun)

        build: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
        return build(
            observed,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _status(error: BaseException, context: Context, took: float) -> str:
    """The status of a call that ended with an exception; by then an abort has left its code in the context."""
    if isinstance(error, asyncio.CancelledError):
        left: float | None = context.time_remaining()
        return "DEADLINE_EXCEEDED" if left is not None and is_over(left, left + took) else "CANCELLED"
    code: Any = context.code()  # the stubs say int
    return code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"
