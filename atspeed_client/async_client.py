"""The client for async code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

import grpc

from atspeed_client import arguments, calls
from atspeed_client.calls import MAX_RETRIES, MAX_TIMEOUT_SECONDS, Attempt, Batch, Call
from atspeed_client.channels import Channels, Endpoint, Tls
from atspeed_client.enums import Mode, Priority, Track
from atspeed_client.errors import CallError, ClientStateError, call_error
from atspeed_client.explanations import Explanation
from atspeed_client.replies import History, Recommendation, Recorded, ServiceInfo
from atspeed_client.requests import Event, RecommendRequest, UserEvents

_Reply = TypeVar("_Reply")


_Loops = WeakKeyDictionary[asyncio.AbstractEventLoop, Channels[grpc.aio.Channel]]


class AsyncClient:
    """Calls a recommendation service. Make one for each process, at any place: it opens a connection for each event loop.

    A call raises CallError when it fails, and UsageError, before anything is sent, for a mistaken argument. Both are a
    RecommenderError (`atspeed_client.errors`). Errors of a `token` function are passed on.

    A busy service is asked again when its hint says so, within the deadline. So is an unavailable one, for calls that can be
    repeated: all but `record` with events whose `event_id` is empty.

    Args:
        address: NAME:PORT, or IP:PORT,IP:PORT for several replicas (`atspeed_client.addresses`).
        timeout_seconds: the deadline of every call with its retries, at most a day.
        retries: how often a call is made again; 0 for never.
        tls: the TLS settings, `Tls()` for a server with a public certificate; plain text without it.
        token: a bearer token, or a function that returns the current one.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = 10.0,
        retries: int = 2,
        tls: Tls | None = None,
        token: str | Callable[[], str] | None = None,
    ) -> None:
        self._timeout = _timeout(timeout_seconds)
        self._retries = arguments.whole("retries", retries, 0, MAX_RETRIES)
        self._endpoint = Endpoint(address, tls, token)
        self._loops: _Loops = WeakKeyDictionary()
        self._closed = False

    async def recommend(
        self,
        user_id: str | None = None,
        *,
        history: Iterable[str] | None = None,
        k: int = 10,
        beam_width: int = 0,
        beam_widths: Iterable[int] | None = None,
        least_beam_width: int = 0,
        mode: Mode | str = Mode.STRICT,
        tolerance: float = 0.0,
        temperature: float | None = None,
        seed: int | None = None,
        excluded: Iterable[str] | None = None,
        allowed: Iterable[str] | None = None,
        exclude_seen: bool = False,
        items_per_path: int = 0,
        user_fields: Mapping[str, str] | None = None,
        tenant: str = "",
        priority: Priority | str | None = None,
        code_paths: bool = True,
        statistics: bool = True,
        track: Track | str | None = None,
        timeout_seconds: float | None = None,
    ) -> Recommendation:
        """Return the list of a stored user or, with `history`, of the items given. See RecommendRequest and `send`."""
        request = RecommendRequest(
            user_id,
            history=history,
            k=k,
            beam_width=beam_width,
            beam_widths=beam_widths,
            least_beam_width=least_beam_width,
            mode=mode,
            tolerance=tolerance,
            temperature=temperature,
            seed=seed,
            excluded=excluded,
            allowed=allowed,
            exclude_seen=exclude_seen,
            items_per_path=items_per_path,
            user_fields=user_fields,
            tenant=tenant,
            priority=priority,
            code_paths=code_paths,
            statistics=statistics,
        )
        return await self.send(request, track=track, timeout_seconds=timeout_seconds)

    async def send(
        self,
        request: RecommendRequest,
        *,
        track: Track | str | None = None,
        timeout_seconds: float | None = None,
    ) -> Recommendation:
        """Return the list of a request.

        track: the release track to ask instead of the user's own; that needs the scope admin.
        """
        return await self._call(calls.recommend(request, track), timeout_seconds)

    async def explain(
        self,
        request: RecommendRequest,
        *,
        items: Iterable[str] = (),
        wider_beam_width: int = 0,
        track: Track | str | None = None,
        timeout_seconds: float | None = None,
    ) -> Explanation:
        """Return the list of a request with its search, its time, and why `items` are not in it. It needs the scope explain.

        wider_beam_width: beam width of the list of the target alone in which the items get a rank; 0 for the service's choice.
        """
        return await self._call(calls.explain(request, items, wider_beam_width, track), timeout_seconds)

    def recommend_batch(
        self, requests: Iterable[RecommendRequest], *, timeout_seconds: float | None = None
    ) -> AsyncIterator[tuple[int, Recommendation | CallError]]:
        """Yield each request's index with its list or its error, in the order of completion.

        Requests that a busy service refuses are asked for again, until the deadline or the last retry.
        """
        batch = Batch(requests)
        return self._batch(batch, self._attempt(timeout_seconds))

    async def record(
        self,
        user_id: str,
        events: Iterable[str | Event],
        *,
        tenant: str = "",
        timeout_seconds: float | None = None,
    ) -> Recorded:
        """Add events, or items that the user has just met, to a user's history.

        Items that the catalogue does not know are stored too, and the reply names them.
        """
        return await self._call(calls.record(user_id, events, tenant), timeout_seconds)

    async def record_batch(
        self, batch: Iterable[UserEvents], *, timeout_seconds: float | None = None
    ) -> list[Recorded | CallError]:
        """Add events of many users in one call. Returns what was stored of each one, or its error, in their order.

        A user's events that were refused can be recorded again: each event has an `event_id`. All users' events together are at
        most the service's `max_batch_events`.
        """
        return await self._call(calls.record_batch(batch), timeout_seconds)

    async def history(self, user_id: str, *, tenant: str = "", timeout_seconds: float | None = None) -> History:
        """Return a user's stored events, oldest first; none if nothing is stored."""
        return await self._call(calls.history(user_id, tenant), timeout_seconds)

    async def forget(self, user_id: str, *, tenant: str = "", timeout_seconds: float | None = None) -> bool:
        """Erase a user's history. Returns True if there was one."""
        return await self._call(calls.forget(user_id, tenant), timeout_seconds)

    async def info(self, *, timeout_seconds: float | None = None) -> ServiceInfo:
        """Return versions, limits, and the state of the services behind this one."""
        return await self._call(calls.info(), timeout_seconds)

    async def close(self) -> None:
        """Close the connection; running calls end with CallError, CANCELLED. A second call has no effect."""
        self._closed = True
        loop = asyncio.get_running_loop()
        for other, channels in list(self._loops.items()):
            if other is loop and (channel := channels.take()) is not None:
                await channel.close()
            elif other is not loop and other.is_running():
                other.call_soon_threadsafe(_close_soon, channels)

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _attempt(self, timeout_seconds: float | None) -> Attempt:
        self._check_open()
        return Attempt(self._timeout if timeout_seconds is None else _timeout(timeout_seconds), self._retries)

    async def _call(self, call: Call[_Reply], timeout_seconds: float | None) -> _Reply:
        attempt = self._attempt(timeout_seconds)
        while True:
            channel = self._channel()
            try:
                with self._told_apart():
                    reply = await call.on(channel)(call.request, **attempt.options(call, self._endpoint))
                return call.read(reply, attempt.request_id)
            except grpc.aio.AioRpcError as refused:
                error = call_error(refused, attempt.request_id, attempt.number)
                if (delay := attempt.delay(error, repeatable=call.repeatable)) is None:
                    raise error from None
            await asyncio.sleep(delay)

    async def _batch(self, batch: Batch, attempt: Attempt) -> AsyncIterator[tuple[int, Recommendation | CallError]]:
        while True:
            call, channel = batch.call(), self._channel()
            stream: Any = None
            try:
                stream = call.on(channel)(call.request, **attempt.options(call, self._endpoint))
                async for one in self._received(stream):
                    if (result := batch.take(one, attempt)) is not None:
                        yield result
                delay = batch.delay()
            except grpc.aio.AioRpcError as refused:
                error = call_error(refused, attempt.request_id, attempt.number)
                if (delay := attempt.delay(error)) is None:
                    raise error from None
            finally:
                if stream is not None:
                    stream.cancel()
            if delay is None:
                return
            await asyncio.sleep(delay)

    async def _received(self, stream: Any) -> AsyncIterator[Any]:
        with self._told_apart():
            async for one in stream:
                yield one

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        """Raise CallError where a closed client ended the call: gRPC cancels it, and its task sees that as its own."""
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or (task and task.cancelling()):
                raise
            raise CallError(grpc.StatusCode.CANCELLED, "the client was closed during the call") from None

    def _channel(self) -> grpc.aio.Channel:
        """Return the channel of the running loop."""
        self._check_open()
        loop = asyncio.get_running_loop()
        if (channels := self._loops.get(loop)) is None:
            channels = self._loops[loop] = Channels(self._endpoint, grpc.aio.insecure_channel, grpc.aio.secure_channel)
        return channels.current()

    def _check_open(self) -> None:
        if self._closed:
            raise ClientStateError("the client is closed; create another one")


def _close_soon(channels: Channels[grpc.aio.Channel]) -> None:
    """Close the channel of a loop, in this loop."""
    if (channel := channels.take()) is not None:
        closing = asyncio.ensure_future(channel.close())
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)


_closing: set[asyncio.Future[Any]] = set()


def _timeout(value: Any) -> float:
    return arguments.number("timeout_seconds", value, above=0.0, most=MAX_TIMEOUT_SECONDS)
