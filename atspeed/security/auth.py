"""Checks bearer tokens and scopes before a message is received; denies by default.

A call carries `authorization: Bearer TOKEN`. A call without a valid token ends with UNAUTHENTICATED.
A token without the method's scope, or one bound to other tenants than a message names, gets PERMISSION_DENIED.
Health needs no token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Set
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from atspeed.errors import PermissionDeniedError, ServiceError, UnauthenticatedError
from atspeed.rpc.handlers import Behaviour, Context, Handler, wrap_handler
from atspeed.rpc.rotating_channel import AUTHORIZATION
from atspeed.security.scopes import METADATA_SCOPES, METHOD_SCOPES, OPEN_TO_ALL
from atspeed.security.tokens import Grant, Tokens

_SCHEME = "bearer"
_NO_TOKEN = "this service wants `authorization: Bearer TOKEN`"  # noqa: S105 - the text of an error
_BAD_TOKEN = "the token is not valid here"  # noqa: S105 - the text of an error
_TENANT = "tenant"


@dataclass(frozen=True)
class Caller:
    """The caller of the running call.

    Attributes:
        name: the token's name in the token file.
        grant: the token's scopes and tenants.
    """

    name: str
    grant: Grant


_caller: ContextVar[Caller] = ContextVar("caller")


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Authorizes calls. It runs inside `CallInterceptor`, which turns its errors into statuses and log lines."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._guarded: dict[str, Handler] = {}
        self._refusing: dict[tuple[str, str], Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the method's handler, a handler that refuses, or None for an unknown method."""
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
        if (found := self._tokens.authenticate(token.strip())) is None:
            raise UnauthenticatedError(_BAD_TOKEN)
        return Caller(*found)

    def _refusal(self, method: str, handler: Handler, error: ServiceError) -> Handler:
        """Return a handler that raises `error`. It is made once per method and text, since other interceptors cache it."""
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
    """Yield every tenant that a message or a nested message names. The empty name is a tenant too."""
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
    """Return the fields that are a tenant or hold messages with one. No message type contains itself."""
    return tuple(
        field.name
        for field in kind.fields
        if (field.name == _TENANT and field.message_type is None)
        or (field.message_type is not None and _leading_to_tenants(field.message_type))
    )


def _guard(handler: Handler) -> Handler:
    """Return the handler with a check of each message's tenants."""

    def around(behaviour: Behaviour) -> Behaviour:
        if handler.request_streaming:
            return lambda requests, context: behaviour(_each_checked(requests), context)
        return lambda request, context: behaviour(_check_tenants(request), context)

    return wrap_handler(handler, around)


async def _each_checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _check_tenants(request)


def _refusing(handler: Handler, error: ServiceError) -> Handler:
    """Return a handler that raises a copy of `error`. It takes a stream, so no message is received first."""
    kind = type(error)
    text = str(error)

    async def refuse(_requests: Any, _context: Context) -> Any:
        raise kind(text)

    return wrap_handler(handler, lambda _behaviour: refuse, as_stream=True)
