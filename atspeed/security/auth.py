"""Checks bearer tokens, scopes and quotas; denies by default.

A call carries `authorization: Bearer TOKEN`. A call without a valid token ends with UNAUTHENTICATED.
A token without the method's scope, or one bound to other tenants than a message names, gets PERMISSION_DENIED.
Token and scope are checked before a message is received. A caller beyond its quota gets RESOURCE_EXHAUSTED.
Health needs no token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence, Set
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from atspeed.errors import PermissionDeniedError, Reason, ServiceError, UnauthenticatedError
from atspeed.observability.metrics import ServerMetrics
from atspeed.rpc.handlers import Behaviour, Context, Handler, wrap_handler
from atspeed.rpc.rotating_channel import AUTHORIZATION
from atspeed.security.callers import Authenticator, Caller
from atspeed.security.quotas import LARGEST_CALL, Quotas
from atspeed.security.scopes import METADATA_SCOPES, METHOD_SCOPES, OPEN_TO_ALL
from atspeed.v1.recommendation_pb2 import ExplainRequest

_SCHEME = "bearer"
_NO_TOKEN = "this service wants `authorization: Bearer TOKEN`"  # noqa: S105 - the text of an error
_BAD_TOKEN = "the token is not valid here"  # noqa: S105 - the text of an error
_TENANT = "tenant"
_REQUESTS = "requests"


_caller: ContextVar[Caller] = ContextVar("caller")


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Authorizes calls. It runs inside `CallInterceptor`, which turns its errors into statuses and log lines."""

    def __init__(self, authenticators: Sequence[Authenticator], metrics: ServerMetrics) -> None:
        self._authenticators = authenticators
        self._quotas = Quotas()
        self._calls = metrics.caller_calls
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
            caller = await self._identify(metadata)
            structlog.contextvars.bind_contextvars(caller=caller.name)
            _check_scopes(caller, method, {key for key, _ in metadata})
        except ServiceError as error:
            return self._refusal(method, handler, error)
        _caller.set(caller)
        self._calls.labels(caller.group, method.rpartition("/")[2]).inc()
        if method not in self._guarded:
            self._guarded[method] = _guard(handler, self._quotas)
        return self._guarded[method]

    async def _identify(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        shown = [value for key, value in metadata if key == AUTHORIZATION]
        scheme, _, token = str(shown[0]).partition(" ") if len(shown) == 1 else ("", "", "")
        if scheme.lower() != _SCHEME:
            raise UnauthenticatedError(_NO_TOKEN)
        for authenticator in self._authenticators:
            if (found := await authenticator.authenticate(token.strip())) is not None:
                return found
        raise UnauthenticatedError(_BAD_TOKEN)

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
        raise PermissionDeniedError("tenant: the token is bound to others", reason=Reason.TENANT_DENIED)
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


def _check_quota(message: Any, quotas: Quotas) -> Any:
    """Take the requests that a message counts as from the caller's quota."""
    caller = _caller.get()
    if caller.grant.quota is not None:
        quotas.take((caller.group, caller.name), caller.grant.quota, price(message))
    return message


def price(message: Any) -> int:
    """Return the number of requests that a message counts as: one per search, and at least one."""
    if isinstance(message, ExplainRequest):
        return LARGEST_CALL if message.item_ids else 1
    if isinstance(message, Message) and _REQUESTS in message.DESCRIPTOR.fields_by_name:
        return max(1, len(getattr(message, _REQUESTS)))
    return 1


def _guard(handler: Handler, quotas: Quotas) -> Handler:
    """Return the handler with checks of each message's tenants, and of the caller's quota. Streams have no quota."""

    def around(behaviour: Behaviour) -> Behaviour:
        if handler.request_streaming:
            return lambda requests, context: behaviour(_each_checked(requests), context)
        return lambda request, context: behaviour(_check_quota(_check_tenants(request), quotas), context)

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
