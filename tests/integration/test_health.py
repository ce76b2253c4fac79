"""Health towards watchers that do not read."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from atspeed.rpc.server import RunningServer, running
from tests.echo import SERVICE, Echo, call, leave, settings, until, watch

_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_INITIAL_WINDOW_SIZE = 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def header(name: str, value: str) -> bytes:
    """HPACK: literal, not indexed."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


@asynccontextmanager
async def watcher_without_a_window(server: RunningServer) -> AsyncIterator[None]:
    """HTTP/2 by hand: asks for `Watch` and allows the server not one byte of an answer."""
    asked = {":method": "POST", ":scheme": "http", ":path": "/grpc.health.v1.Health/Watch", ":authority": "x"}
    headers = b"".join(
        header(*pair) for pair in {**asked, "te": "trailers", "content-type": "application/grpc"}.items()
    )
    message = health_pb2.HealthCheckRequest(service=SERVICE).SerializeToString()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    writer.write(frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, 0)))
    writer.write(frame(_HEADERS, _END_HEADERS, 1, headers))
    writer.write(frame(_DATA, _END_STREAM, 1, b"\0" + struct.pack(">I", len(message)) + message))
    try:
        async with asyncio.timeout(5):
            while (await next_frame(reader)) != (_HEADERS, 1):
                pass  # until the server has begun to answer
        yield
    finally:
        writer.close()


async def next_frame(reader: asyncio.StreamReader) -> tuple[int, int]:
    """Its kind and stream."""
    head = await reader.readexactly(9)
    await reader.readexactly(int.from_bytes(head[:3], "big"))
    return head[3], int.from_bytes(head[5:9], "big")


async def test_a_watcher_that_does_not_read_holds_up_neither_others_nor_the_shutdown(tmp_path: Path) -> None:
    """The library's servicer wrote to it under the lock that every change of the state takes."""
    states: list[int] = []
    manager = running(settings(tmp_path, drain_seconds=1), [Echo().registration()])
    up = await manager.__aenter__()
    async with watcher_without_a_window(up), grpc.aio.insecure_channel(up.address) as channel:
        watching = asyncio.create_task(watch(channel, states))
        await until(lambda: states)
        assert await call(channel, "UnaryUnary", "hello") == "hello"
        await asyncio.wait_for(leave(manager), 15)
        await watching
    assert states == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
