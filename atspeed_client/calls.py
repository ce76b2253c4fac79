"""Calls of the service, as both clients make them, and when they are made again."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from atspeed_client import arguments, reading
from atspeed_client.arguments import MAX_INT32
from atspeed_client.channels import SERVICE, Endpoint
from atspeed_client.enums import Track
from atspeed_client.errors import REQUEST_ID_HEADER, ArgumentValueError, CallError, status_error
from atspeed_client.explanations import Explanation, to_explanation
from atspeed_client.replies import History, Recommendation, Recorded, ServiceInfo
from atspeed_client.requests import Event, RecommendRequest, UserEvents, events
from atspeed_client.v1 import recommendation_pb2 as pb

_TRACK_HEADER = "x-atspeed-track"
_Reply = TypeVar("_Reply")
MAX_TIMEOUT_SECONDS = 86_400.0  # gRPC treats a value too large for its clock as an expired deadline
MAX_RETRIES = 100
# Seconds. The first waits stay far below a request's usual deadline of 10 s.
_FIRST_BACKOFF, _MAX_BACKOFF = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Call(Generic[_Reply]):
    """Call of one method.

    Attributes:
        method: name of the method.
        request: the message to send.
        reply: type of the message to receive.
        read: reads a reply, given the request id.
        metadata: metadata of the call.
        repeatable: whether a second call does no more than one.
    """

    method: str
    request: Any
    reply: Any
    read: Callable[[Any, str], _Reply]
    metadata: tuple[tuple[str, str], ...] = ()
    repeatable: bool = True

    def on(self, channel: Any) -> Any:
        """Return the method of a channel."""
        make = channel.unary_stream if self.method == "RecommendBatch" else channel.unary_unary
        return make(
            f"/{SERVICE}/{self.method}",
            request_serializer=type(self.request).SerializeToString,
            response_deserializer=self.reply.FromString,
        )


def recommend(request: RecommendRequest, track: Track | str | None) -> Call[Recommendation]:
    """Return the call for a list."""
    asked = arguments.message("request", request, RecommendRequest).message
    metadata = () if track is None else ((_TRACK_HEADER, arguments.choice("track", track, Track).value),)
    return Call("Recommend", asked, pb.RecommendResponse, reading.to_recommendation, metadata)


def explain(
    request: RecommendRequest, items: Iterable[str], wider_beam_width: int, track: Track | str | None
) -> Call[Explanation]:
    """Return the call for a list with its explanation."""
    listed = recommend(request, track)
    asked = pb.ExplainRequest(
        request=listed.request,
        item_ids=arguments.item_ids("items", items),
        wider_beam_width=arguments.whole("wider_beam_width", wider_beam_width, 0, MAX_INT32),
    )
    return Call("Explain", asked, pb.ExplainResponse, to_explanation, listed.metadata)


def record(user_id: str, items: Iterable[str | Event], tenant: str) -> Call[Recorded]:
    """Return the call that stores events."""
    request = pb.RecordEventsRequest(**_user(user_id, tenant), events=events("events", items))
    repeatable = all(event.event_id for event in request.events)
    return Call("RecordEvents", request, pb.RecordEventsResponse, reading.to_recorded, repeatable=repeatable)


def record_batch(batch: Iterable[UserEvents]) -> Call[list[Recorded | CallError]]:
    """Return the call that stores events of many users."""
    asked = arguments.messages("batch", batch, UserEvents)
    if not asked:
        raise ArgumentValueError("batch", "must hold the events of at least one user")
    requests = [
        pb.RecordEventsRequest(**_user(one.user_id, one.tenant), events=events(f"batch[{place}].events", one.events))
        for place, one in enumerate(asked)
    ]
    repeatable = all(event.event_id for request in requests for event in request.events)
    message = pb.RecordEventsBatchRequest(requests=requests)
    reply = pb.RecordEventsBatchResponse
    return Call("RecordEventsBatch", message, reply, _recorded_each, repeatable=repeatable)


def _recorded_each(reply: pb.RecordEventsBatchResponse, request_id: str) -> list[Recorded | CallError]:
    return [
        reading.to_recorded(one.response, request_id)
        if one.WhichOneof("result") == "response"
        else status_error(one.error, request_id, 1)
        for one in reply.results
    ]


def history(user_id: str, tenant: str) -> Call[History]:
    """Return the call for a stored history."""
    return Call("GetHistory", pb.GetHistoryRequest(**_user(user_id, tenant)), pb.GetHistoryResponse, reading.to_history)


def forget(user_id: str, tenant: str) -> Call[bool]:
    """Return the call that erases a user."""
    request = pb.ForgetUserRequest(**_user(user_id, tenant))
    return Call("ForgetUser", request, pb.ForgetUserResponse, lambda reply, _: bool(reply.existed))


def info() -> Call[ServiceInfo]:
    """Return the call for versions, limits and state."""
    return Call("GetServiceInfo", pb.GetServiceInfoRequest(), pb.GetServiceInfoResponse, reading.to_info)


class Batch:
    """Requests of a batch that have no result yet. Refused ones are asked for again."""

    def __init__(self, requests: Iterable[RecommendRequest]) -> None:
        asked = arguments.messages("requests", requests, RecommendRequest)
        self._left = {index: one.message for index, one in enumerate(asked)}
        self._asked: list[int] = []
        self._refused: list[float] = []

    def call(self) -> Call[Any]:
        """Return the call for the requests that are left."""
        self._asked, self._refused = list(self._left), []
        request = pb.RecommendBatchRequest(requests=self._left.values())
        return Call("RecommendBatch", request, pb.RecommendBatchResponse, lambda reply, _: reply)

    def take(self, one: pb.RecommendBatchResponse, attempt: Attempt) -> tuple[int, Recommendation | CallError] | None:
        """Return index and result of a request; None if it is asked for again later."""
        index = self._asked[one.index]
        if one.WhichOneof("result") == "response":
            del self._left[index]
            return index, reading.to_recommendation(one.response, attempt.request_id)
        error = status_error(one.error, attempt.request_id, attempt.number)
        if (delay := attempt.delay(error)) is not None:
            self._refused.append(delay)
            return None
        del self._left[index]
        return index, error

    def delay(self) -> float | None:
        """Return the seconds until refused requests are asked for again; None if there are none."""
        return max(self._refused, default=None)


class Attempt:
    """Attempts of one call, until its deadline.

    Attributes:
        number: attempts so far.
        request_id: the id of all attempts in the service's logs.
    """

    def __init__(self, timeout_seconds: float, retries: int) -> None:
        self._end = time.monotonic() + timeout_seconds
        self._retries = retries
        self.number = 0
        self.request_id = secrets.token_hex(8)

    def options(self, call: Call[Any], endpoint: Endpoint) -> dict[str, Any]:
        """Return deadline and metadata of the next attempt."""
        self.number += 1
        metadata = ((REQUEST_ID_HEADER, self.request_id), *call.metadata, *endpoint.authorization())
        return {"timeout": max(0.0, self._end - time.monotonic()), "metadata": metadata}

    def delay(self, error: CallError, *, repeatable: bool = True) -> float | None:
        """Return the seconds until another attempt; None if the error stands.

        A busy service is asked again when its hint says so, and up to a quarter later, so that its callers spread.
        """
        if self.number > self._retries:
            return None
        if error.retry_after_seconds is not None and error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            seconds = error.retry_after_seconds * random.uniform(1.0, 1.25)  # noqa: S311
        elif error.code is grpc.StatusCode.UNAVAILABLE and repeatable:
            backoff = min(_FIRST_BACKOFF * 2**self.number, _MAX_BACKOFF)
            seconds = max(error.retry_after_seconds or 0.0, backoff * random.uniform(0.5, 1.0))  # noqa: S311
        else:
            return None
        return seconds if time.monotonic() + seconds < self._end else None


def _user(user_id: str, tenant: str) -> dict[str, str]:
    return {
        "user_id": arguments.text("user_id", user_id),
        "tenant": arguments.text("tenant", tenant, required=False),
    }
