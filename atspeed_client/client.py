"""The client for code that is not async."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self, TypeVar

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


class Client:
    """Calls a recommendation service. Thread-safe; make one for each process, at any place.

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
        self._channels: Channels[grpc.Channel] = Channels(self._endpoint, grpc.insecure_channel, grpc.secure_channel)
        self._closed = False

    def recommend(
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
        return self.send(request, track=track, timeout_seconds=timeout_seconds)

    def send(
        self,
        request: RecommendRequest,
        *,
        track: Track | str | None = None,
        timeout_seconds: float | None = None,
    ) -> Recommendation:
        """Return the list of a request.

        track: the release track to ask instead of the user's own; that needs the scope admin.
        """
        return self._call(calls.recommend(request, track), timeout_seconds)

    def explain(
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
        return self._call(calls.explain(request, items, wider_beam_width, track), timeout_seconds)

    def recommend_batch(
        self, requests: Iterable[RecommendRequest], *, timeout_seconds: float | None = None
    ) -> Iterator[tuple[int, Recommendation | CallError]]:
        """Yield each request's index with its list or its error, in the order of completion.

        Requests that a busy service refuses are asked for again, until the deadline or the last retry.
        """
        batch = Batch(requests)
        return self._batch(batch, self._attempt(timeout_seconds))

    def record(
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
        return self._call(calls.record(user_id, events, tenant), timeout_seconds)

    def record_batch(
        self, batch: Iterable[UserEvents], *, timeout_seconds: float | None = None
    ) -> list[Recorded | CallError]:
        """Add events of many users in one call. Returns what was stored of each one, or its error, in their order.

        A user's events that were refused can be recorded again: each event has an `event_id`. All users' events together are at
        most the service's `max_batch_events`.
        """
        return self._call(calls.record_batch(batch), timeout_seconds)

    def history(self, user_id: str, *, tenant: str = "", timeout_seconds: float | None = None) -> History:
        """Return a user's stored events, oldest first; none if nothing is stored."""
        return self._call(calls.history(user_id, tenant), timeout_seconds)

    def forget(self, user_id: str, *, tenant: str = "", timeout_seconds: float | None = None) -> bool:
        """Erase a user's history. Returns True if there was one."""
        return self._call(calls.forget(user_id, tenant), timeout_seconds)

    def info(self, *, timeout_seconds: float | None = None) -> ServiceInfo:
        """Return versions, limits, and the state of the services behind this one."""
        return self._call(calls.info(), timeout_seconds)

    def close(self) -> None:
        """Close the connection; running calls end with CallError, CANCELLED. A second call has no effect."""
        self._closed = True
        if (channel := self._channels.take()) is not None:
            channel.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attempt(self, timeout_seconds: float | None) -> Attempt:
        self._check_open()
        return Attempt(self._timeout if timeout_seconds is None else _timeout(timeout_seconds), self._retries)

    def _call(self, call: Call[_Reply], timeout_seconds: float | None) -> _Reply:
        attempt = self._attempt(timeout_seconds)
        while True:
            channel = self._channels.current()
            try:
                reply = call.on(channel)(call.request, **attempt.options(call, self._endpoint))
            except grpc.RpcError as refused:
                error = self._error(refused, attempt)
                if (delay := attempt.delay(error, repeatable=call.repeatable)) is None:
                    raise error from None
                time.sleep(delay)
            except ValueError as error:
                raise self._state(error) from None
            else:
                return call.read(reply, attempt.request_id)

    def _batch(self, batch: Batch, attempt: Attempt) -> Iterator[tuple[int, Recommendation | CallError]]:
        while True:
            call, channel = batch.call(), self._channels.current()
            stream: Any = None
            try:
                stream = call.on(channel)(call.request, **attempt.options(call, self._endpoint))
                for one in stream:
                    if (result := batch.take(one, attempt)) is not None:
                        yield result
                delay = batch.delay()
            except grpc.RpcError as refused:
                error = self._error(refused, attempt)
                if (delay := attempt.delay(error)) is None:
                    raise error from None
            except ValueError as error:
                raise self._state(error) from None
            finally:
                if stream is not None:
                    stream.cancel()
            if delay is None:
                return
            time.sleep(delay)

    def _error(self, refused: grpc.RpcError, attempt: Attempt) -> CallError:
        if self._closed:
            return CallError(grpc.StatusCode.CANCELLED, "the client was closed during the call")
        return call_error(refused, attempt.request_id, attempt.number)

    def _state(self, error: ValueError) -> Exception:
        """Return what a ValueError of gRPC stands for, which says that the channel is closed."""
        return CallError(grpc.StatusCode.CANCELLED, "the client was closed during the call") if self._closed else error

    def _check_open(self) -> None:
        if self._closed:
            raise ClientStateError("the client is closed; create another one")


def _timeout(value: Any) -> float:
    return arguments.number("timeout_seconds", value, above=0.0, most=MAX_TIMEOUT_SECONDS)
