"""A channel whose certificate and bearer token may change while it is used.

gRPC's Python channels keep the certificates that they were made with. This one looks before each call whether the files have
changed and, if so, opens a new channel beside the old one. Calls stay on the old one until the new one is connected, unless the
old one no longer is; it closes when its last call has ended. Every call carries the token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import grpc

from atspeed.security.tls import WatchedPems

Opener = Callable[[grpc.ChannelCredentials | None], grpc.aio.Channel]
AUTHORIZATION = "authorization"


@dataclass(eq=False)
class _Generation:
    """A channel, and how many of its calls have not ended."""

    channel: grpc.aio.Channel
    calls: int = 0
    retired: bool = False
    closing: asyncio.Task[None] | None = field(default=None, repr=False)
    knock: Any = field(default=None, repr=False)

    @property
    def connected(self) -> bool:
        """Whether a replica that serves is at its other end."""
        return self.channel.get_state() is grpc.ChannelConnectivity.READY

    def connect(self) -> None:
        """Begin to. A channel whose calls go by their key does so for calls alone; this one's answer is of no interest."""
        if self.knock is None or self.knock.done():
            check: Any = self.channel.unary_unary("/grpc.health.v1.Health/Check")
            self.knock = check(b"", wait_for_ready=True)

    def call(self, kind: str, method: str, coding: dict[str, Any], arguments: tuple[Any, ...], options: Any) -> Any:
        started = getattr(self.channel, kind)(method, **coding)(*arguments, **options)
        self.calls += 1
        started.add_done_callback(self._ended)
        return started

    def retire(self) -> None:
        self.retired = True
        self._close_when_idle()

    def _ended(self, _call: object) -> None:
        self.calls -= 1
        self._close_when_idle()

    def _close_when_idle(self) -> None:
        if self.retired and not self.calls and self.closing is None:
            self.closing = asyncio.get_running_loop().create_task(self.channel.close())


class RotatingChannel(grpc.aio.Channel):
    """See the module. open_with: makes the channel; pems: None for plain text; token: gives that of the next call."""

    def __init__(self, open_with: Opener, pems: WatchedPems | None, token: Callable[[], str] | None) -> None:
        self._open_with = open_with
        self._pems = pems
        self._token = token
        self._old: set[_Generation] = set()
        self._now = self._opened()
        self._next: _Generation | None = None  # of newer certificates, until it is connected

    @property
    def current(self) -> grpc.aio.Channel:
        """The channel that the next call will be made on."""
        return self._chosen().channel

    def _chosen(self) -> _Generation:
        """The newest generation that is connected; the newest of all where none is."""
        if self._pems and self._pems.changed():
            if self._next:
                self._retire(self._next)
            self._next = self._opened()
        if self._next is None:
            return self._now
        if not self._next.connected:
            self._next.connect()
            return self._now if self._now.connected else self._next
        self._retire(self._now)
        self._now, self._next = self._next, None
        return self._now

    def _retire(self, generation: _Generation) -> None:
        generation.retire()
        self._old = {old for old in self._old | {generation} if not (old.closing and old.closing.done())}

    def unary_unary(self, method: str, *serializers: Any, **options: Any) -> Any:
        """A method of one request and one reply."""
        return self._method("unary_unary", method, serializers, options)

    def unary_stream(self, method: str, *serializers: Any, **options: Any) -> Any:
        """A method of one request and many replies."""
        return self._method("unary_stream", method, serializers, options)

    def stream_unary(self, method: str, *serializers: Any, **options: Any) -> Any:
        """A method of many requests and one reply."""
        return self._method("stream_unary", method, serializers, options)

    def stream_stream(self, method: str, *serializers: Any, **options: Any) -> Any:
        """A method of many requests and many replies."""
        return self._method("stream_stream", method, serializers, options)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """The current channel's."""
        return self.current.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """The current channel's."""
        await self.current.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """The current channel's."""
        await self.current.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        """Close all channels."""
        for generation in (*self._old, self._now, *([self._next] if self._next else [])):
            await generation.channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _opened(self) -> _Generation:
        return _Generation(self._open_with(self._pems.current.channel_credentials() if self._pems else None))

    def _method(self, kind: str, method: str, serializers: tuple[Any, ...], coding: dict[str, Any]) -> Any:
        names = ("request_serializer", "response_deserializer")
        coding = {**dict(zip(names, serializers, strict=False)), **coding}

        def call(*arguments: Any, **options: Any) -> Any:
            chosen = self._chosen()
            options["metadata"] = (*(options.get("metadata") or ()), *self._authorization())
            return chosen.call(kind, method, coding, arguments, options)

        return call

    def _authorization(self) -> tuple[tuple[str, str], ...]:
        return ((AUTHORIZATION, f"Bearer {self._token()}"),) if self._token else ()
