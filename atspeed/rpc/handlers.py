"""Wraps gRPC method handlers of all four kinds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs only
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Behaviour = Callable[[Any, Context], Any]
"""The method of a servicer. Its first argument is a request, or an iterator of requests."""

# The name prefix of gRPC's own services: health and reflection.
INFRASTRUCTURE_PREFIX = "/grpc."


def wrap_handler(
    handler: Handler,
    around: Callable[[Behaviour], Behaviour],
    *,
    as_stream: bool = False,
    deserialize: Callable[[bytes], Any] | None = None,
) -> Handler:
    """Return a handler whose method is `around(the method of handler)`.

    Args:
        as_stream: serve a method of one request as one of many. gRPC then calls it before it has received a message.
        deserialize: replaces the handler's own deserializer.
    """
    inner = getattr(handler, _kind(handler.request_streaming, handler.response_streaming))
    kind = _kind(as_stream or handler.request_streaming, handler.response_streaming)
    build: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
    return build(
        around(inner),
        request_deserializer=deserialize or handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _kind(request_streaming: bool, response_streaming: bool) -> str:
    """Return grpc's name of a kind of method, such as `unary_stream`."""
    return f"{'stream' if request_streaming else 'unary'}_{'stream' if response_streaming else 'unary'}"


class WrappingInterceptor(grpc.aio.ServerInterceptor):
    """An interceptor that wraps each handler once. An inner interceptor may give several handlers of one method."""

    def __init__(self) -> None:
        self._wrapped: dict[tuple[str, Handler], Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the wrapped handler of a method, or None for an unknown method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        key = (handler_call_details.method, handler)
        if key not in self._wrapped:
            self._wrapped[key] = self.wrap(*key)
        return self._wrapped[key]

    @abstractmethod
    def wrap(self, method: str, handler: Handler) -> Handler:
        """Return the wrapped handler."""
