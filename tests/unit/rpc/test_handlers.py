"""Wrapped gRPC handlers: kind, serializers, and methods served as streams."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from atspeed.rpc.handlers import Behaviour, Handler, wrap_handler

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def handler_of(kind: str) -> Handler:
    build: Any = getattr(grpc, f"{kind}_rpc_method_handler")
    handler: Handler = build(lambda request, _: [request], request_deserializer=bytes.decode, response_serializer=str)
    return handler


def twice(behaviour: Behaviour) -> Behaviour:
    return lambda request, context: behaviour(request, context) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_wrapped_handler_keeps_kind_and_serializers(kind: str) -> None:
    wrapped: Any = wrap_handler(handler_of(kind), twice)
    assert [name for name in KINDS if getattr(wrapped, name)] == [kind]
    assert getattr(wrapped, kind)("a", None) == ["a", "a"]
    original = handler_of(kind)
    assert wrapped.request_deserializer == original.request_deserializer
    assert wrapped.response_serializer == original.response_serializer


@pytest.mark.parametrize("kind", KINDS)
def test_handler_as_stream_takes_requests_as_a_stream(kind: str) -> None:
    wrapped = wrap_handler(handler_of(kind), twice, as_stream=True, deserialize=bytes)
    assert [name for name in KINDS if getattr(wrapped, name)] == [f"stream_{kind.partition('_')[2]}"]
    assert wrapped.request_deserializer is bytes
