"""Calls of the consumer: events of many messages in one RecordEventsBatch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from atspeed.event_consumer.messages import MOST_BYTES
from atspeed.v1 import recommendation_pb2 as pb
from atspeed_client.channels import SERVICE, Channels, Endpoint
from atspeed_client.errors import REQUEST_ID_HEADER, CallError, call_error, status_error


class EventRecorder:
    """The service that stores the events.

    Args:
        endpoint: address, certificates and token of the service.
        timeout_seconds: the deadline of a call.
        max_events: most events of a call.
    """

    def __init__(self, endpoint: Endpoint, *, timeout_seconds: float, max_events: int) -> None:
        self._endpoint = endpoint
        self._timeout_seconds = timeout_seconds
        self._max_events = max_events
        self._channels: Channels[grpc.Channel] = Channels(endpoint, grpc.insecure_channel, grpc.secure_channel)

    def packed(self, requests: Sequence[pb.RecordEventsRequest]) -> Iterator[Sequence[pb.RecordEventsRequest]]:
        """Yield the requests of one call after the other, in their order."""
        start = events = size = 0
        for place, request in enumerate(requests):
            own_events, own_size = max(1, len(request.events)), request.ByteSize()
            if place > start and (events + own_events > self._max_events or size + own_size > MOST_BYTES):
                yield requests[start:place]
                start, events, size = place, 0, 0
            events, size = events + own_events, size + own_size
        if start < len(requests):
            yield requests[start:]

    def record(
        self, requests: Sequence[pb.RecordEventsRequest], request_id: str
    ) -> list[pb.RecordEventsResponse | CallError]:
        """Make one call. Returns what was stored of each request, or its error. Raises CallError if the call failed."""
        call: Any = self._channels.current().unary_unary(
            f"/{SERVICE}/RecordEventsBatch",
            request_serializer=pb.RecordEventsBatchRequest.SerializeToString,
            response_deserializer=pb.RecordEventsBatchResponse.FromString,
        )
        metadata = ((REQUEST_ID_HEADER, request_id), *self._endpoint.authorization())
        try:
            reply = call(
                pb.RecordEventsBatchRequest(requests=requests), timeout=self._timeout_seconds, metadata=metadata
            )
        except grpc.RpcError as error:
            raise call_error(error, request_id, 1) from None
        if len(reply.results) != len(requests):
            raise CallError(grpc.StatusCode.INTERNAL, f"{len(reply.results)} results for {len(requests)} requests")
        return [
            one.response if one.WhichOneof("result") == "response" else status_error(one.error, request_id, 1)
            for one in reply.results
        ]

    def close(self) -> None:
        """Close the connection."""
        if (channel := self._channels.take()) is not None:
            channel.close()
