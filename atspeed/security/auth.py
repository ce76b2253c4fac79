"""Who may call what: bearer tokens against the table of scopes, before a message is even parsed. Deny by default.

A call brings `authorization: Bearer TOKEN`. Without a valid token it ends UNAUTHENTICATED; with one whose scopes do not include
the method's, or that is bound to other tenants than a message names, PERMISSION_DENIED. Health is open to all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Set
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from atspeed.errors import PermissionDeniedError, ServiceError, UnauthenticatedError
from atspeed.rpc.rotating_channel import AUTHORIZATION
from atspeed.security.scopes import METADATA_SCOPES, METHOD_SCOPES, OPEN_TO_ALL
from atspeed.security.tokens import Grant, Tokens

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs only
_SCHEME = "bearer"
_NO_TOKEN = "this service wants `authorization: Bearer TOKEN`"  # noqa: S105 - the text of an error
_BAD_TOKEN = "the token is not valid here"  # noqa: S105 - the text of an error
_TENANT = "tenant"


@dataclass(frozen=True)
class Caller:
    """Who makes the running call."""

    name: str
    grant: Grant


_caller: ContextVar[Caller] = ContextVar("caller")


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Inside `CallInterceptor`, which turns refusals into statuses and log lines with the caller's name."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._guarded: dict[str, Handler] = {}
        self._refusing: dict[tuple[str, str], Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The method's handler, one that refuses, or gRPC's own answer where there is no such method."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or method in OPEN_TO_ALL:
            return handler
        try:
            metadata = tuple(handler_call_details.invocation_metadata or ())
            caller = self._identify(metadata)
            structlog.contextvars.bind_contextvars(caller=caller.name)
            _check_scopes(caller, method, {key for key, _ in metadata})
        except ServiceError as error:
            return self._refusal(method, handler, error)
        _caller.set(caller)
        if method not in self._guarded:
            self._guarded[method] = _guard(handler)
        return self._guarded[method]

    def _identify(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        shown = [value for key, value in metadata if key == AUTHORIZATION]
        scheme, _, token = str(shown[0]).partition(" ") if len(shown) == 1 else ("", "", "")
        if scheme.lower() != _SCHEME:
            raise UnauthenticatedError(_NO_TOKEN)
        if (found := self._tokens.holder(token.strip())) is None:
            raise UnauthenticatedError(_BAD_TOKEN)
        return Caller(*found)

    def _refusal(self, method: str, handler: Handler, error: ServiceError) -> Handler:
        """A handler that raises `error`, made once for each method and text: whoever wraps handlers may remember them."""
        key = (method, str(error))
        if key not in self._refusing:
            self._refusing[key] = _refusing(handler, error)
        return self._refusing[key]


def _check_scopes(caller: Caller, method: str, keys: Set[str]) -> None:
    scope = METHOD_SCOPES.get(method)
    if scope is None:
        raise PermissionDeniedError("no token allows this method")
    if scope not in caller.grant.scopes:
        raise PermissionDeniedError(f"this method needs a token with the scope {scope}")
    for key, needed in METADATA_SCOPES.items():
        if key in keys and needed not in caller.grant.scopes:
            raise PermissionDeniedError(f"{key}: needs a token with the scope {needed}")


def _check_tenants(message: Any) -> Any:
    allowed = _caller.get().grant.tenants
    if allowed is not None and isinstance(message, Message) and any(name not in allowed for name in tenants(message)):
        raise PermissionDeniedError("tenant: the token is bound to others")
    return message


def tenants(message: Message) -> Iterator[str]:
    """Every tenant that a message names, in the message or in those within. An empty one is a tenant too."""
    for name in _leading_to_tenants(message.DESCRIPTOR):
        field = message.DESCRIPTOR.fields_by_name[name]
        value = getattr(message, name)
        if field.message_type is None:
            yield value
        elif field.is_repeated:
            for one in value:
                yield from tenants(one)
        elif message.HasField(name):
            yield from tenants(value)


@lru_cache
def _leading_to_tenants(kind: Descriptor) -> tuple[str, ...]:
    """The fields of a message type that are a tenant or hold messages that name one. Our messages do not nest in themselves."""
    return tuple(
        field.name
        for field in kind.fields
        if (field.name == _TENANT and field.message_type is None)
        or (field.message_type is not None and _leading_to_tenants(field.message_type))
    )


def _guard(handler: Handler) -> Handler:
    """The handler, with the tenants of each message checked first."""
    if handler.request_streaming:
        return _rebuilt(handler, lambda requests, context, inner: inner(_each_checked(requests), context))
    return _rebuilt(handler, lambda request, context, inner: inner(_check_tenants(request), context))


async def _each_checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _check_tenants(request)


def _refusing(handler: Handler, error: ServiceError) -> Handler:
    """A handler that raises a copy of `error`. It takes a stream, so that no message is received first."""
    kind, text = type(error), str(error)
    build = (
        grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    )

    async def refuse(_requests: Any, _context: Any) -> Any:
        raise kind(text)

    behaviour: Any = refuse
    return build(behaviour, response_serializer=handler.response_serializer)


def _rebuilt(handler: Handler, around: Callable[[Any, Any, Any], Any]) -> Handler:
    """A handler of the same kind whose behaviour is `around(request or requests, context, the old behaviour)`."""
    builders = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }
    build, inner = builders[bool(handler.request_streaming), bool(handler.response_streaming)]
    behaviour: Any = lambda request, context: around(request, context, inner)  # noqa: E731
    return build(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
