"""Traces and counts every call, except those of health and reflection.

It is the outermost interceptor.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from atspeed.concurrency.deadline import is_over
from atspeed.observability import tracing
from atspeed.observability.metrics import ServerMetrics
from atspeed.rpc.handlers import INFRASTRUCTURE_PREFIX, Behaviour, Context, Handler, WrappingInterceptor, wrap_handler


class TelemetryInterceptor(WrappingInterceptor):
    """Wraps handlers that are coroutines. `CallInterceptor` makes such handlers, for streams too."""

    def __init__(self, metrics: ServerMetrics) -> None:
        super().__init__()
        self._metrics = metrics

    def wrap(self, method: str, handler: Handler) -> Handler:
        """Return the handler with a span and metrics around each call."""
        if method.startswith(INFRASTRUCTURE_PREFIX):
            return handler
        name = method.rpartition("/")[2]
        in_flight = self._metrics.in_flight.labels(name)
        seconds = self._metrics.seconds.labels(name)

        def around(behaviour: Behaviour) -> Behaviour:
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

            return observed

        return wrap_handler(handler, around)


def _status(error: BaseException, context: Context, took: float) -> str:
    """Return the status of a call that raised `error`. An abort has left its code in the context by then."""
    if isinstance(error, asyncio.CancelledError):
        left: float | None = context.time_remaining()
        return "DEADLINE_EXCEEDED" if left is not None and is_over(left, left + took) else "CANCELLED"
    code: Any = context.code()  # the stubs say int
    return code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"
