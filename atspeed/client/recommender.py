"""The Python client of the recommendation service.

    async with RecommenderClient("localhost:50051") as client:
        await client.record("alice", ["item-1", "item-2"])
        reply = await client.recommend("alice", k=10)
        print([item.item_id for item in reply.items])

Replies are the protobuf messages themselves: frozen dataclasses beside them would be a second copy of the contract, and the
generated stubs already give every field a type. Requests are keyword arguments. From code that is not
async, one `asyncio.run` around such a block is all it takes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self, TypedDict, TypeVar, Unpack

import grpc

from atspeed.engine.search.mode import Mode
from atspeed.rollout.release_track import TRACK_HEADER, Track
from atspeed.rpc import wire
from atspeed.rpc.channels import open_channel, target_uri
from atspeed.rpc.grpc_status import retry_after_seconds
from atspeed.security.tls import ClientTls
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import recommendation_pb2_grpc

__all__ = ["SERVICE", "Mode", "Options", "RecommenderClient", "RecommenderError", "recommend_request"]

SERVICE = pb.DESCRIPTOR.services_by_name["RecommendationService"].full_name
# Appending twice is not appending once, so RecordEvents is not among them.
_RETRIED = ("Recommend", "GetHistory", "ForgetUser", "GetServiceInfo")
_MAX_MESSAGE_BYTES = 33_554_432
_Reply = TypeVar("_Reply")


class RecommenderError(Exception):
    """A call that failed. code: its gRPC status; message: what the service said.

    retry_after_seconds: when another try may succeed, where a busy service said so.
    """

    def __init__(self, code: grpc.StatusCode, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code, self.message, self.retry_after_seconds = code, message, retry_after_seconds


class Options(TypedDict, total=False):
    """What a recommendation may be asked for; the contract's `RecommendRequest` says what each field means."""

    history: Sequence[str]
    k: int
    beam_width: int
    mode: Mode
    tolerance: float
    temperature: float | None
    seed: int | None
    excluded: Sequence[str]
    allowed: Sequence[str]
    exclude_seen: bool
    tenant: str
    batch_priority: bool
    least_beam_width: int


def recommend_request(user_id: str | None = None, **options: Unpack[Options]) -> pb.RecommendRequest:
    """A request for a stored user's list or, with `history`, for that of the items given; 10 items by default."""
    request = pb.RecommendRequest(
        k=options.get("k", 10),
        beam_width=options.get("beam_width", 0),
        mode=wire.to_mode(options.get("mode", Mode.STRICT)),
        tolerance=options.get("tolerance", 0.0),
        temperature=options.get("temperature"),
        seed=options.get("seed"),
        excluded_item_ids=options.get("excluded", ()),
        allowed_item_ids=options.get("allowed", ()),
        exclude_seen=options.get("exclude_seen", False),
        tenant=options.get("tenant", ""),
        priority=pb.PRIORITY_BATCH if options.get("batch_priority", False) else pb.PRIORITY_UNSPECIFIED,
        least_beam_width=options.get("least_beam_width", 0),
    )
    if (user_id is None) == ("history" not in options):
        raise ValueError("give either user_id or history")
    if user_id is not None:
        request.user_id = user_id
    else:
        request.history.CopyFrom(pb.History(item_ids=options["history"]))
    return request


class RecommenderClient:
    """Calls a recommendation service. An async context manager; made and used inside one event loop.

    address: NAME:PORT, or IP:PORT,IP:PORT for several replicas; ValueError when it is neither. timeout_seconds: the
    deadline of every call, travelling with it. tls: how to speak TLS, `ClientTls()` for a server with a public certificate;
    without it the connection is plain text. token: a bearer token, or what gives the one to show now. TlsError names a file at
    fault.

    Calls that change nothing when repeated are retried while the service is UNAVAILABLE, up to three times in all and
    within their deadline. Every call raises RecommenderError when it fails.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = 10.0,
        tls: ClientTls | None = None,
        token: str | Callable[[], str] | None = None,
    ) -> None:
        self._channel = open_channel(
            target_uri(address),
            SERVICE,
            retried=_RETRIED,
            max_message_bytes=_MAX_MESSAGE_BYTES,
            tls=tls,
            token=(lambda: token) if isinstance(token, str) else token,
        )
        self._stub: recommendation_pb2_grpc.RecommendationServiceAsyncStub = (
            recommendation_pb2_grpc.RecommendationServiceStub(self._channel)
        )
        self._timeout = timeout_seconds

    async def recommend(
        self, user_id: str | None = None, *, track: Track | None = None, **options: Unpack[Options]
    ) -> pb.RecommendResponse:
        """The list for a stored user or, with `history=[...]`, for the items given. track: see `send`."""
        return await self.send(recommend_request(user_id, **options), track)

    async def send(self, request: pb.RecommendRequest, track: Track | None = None) -> pb.RecommendResponse:
        """The list for a request made by `recommend_request`, or by hand.

        track: of which bundle, where it is not the user's who decides; that needs the scope admin.
        """
        metadata = ((TRACK_HEADER, track.value),) if track else ()
        return await _answer(self._stub.Recommend(request, timeout=self._timeout, metadata=metadata))

    async def recommend_batch(
        self, requests: Sequence[pb.RecommendRequest]
    ) -> AsyncIterator[tuple[int, pb.RecommendResponse | RecommenderError]]:
        """Each request's index with its list or its error, as they are ready. See `recommend_request`."""
        with _translated():
            async for one in self._stub.RecommendBatch(
                pb.RecommendBatchRequest(requests=requests), timeout=self._timeout
            ):
                yield one.index, _batch_result(one)

    async def record(self, user_id: str, item_ids: Sequence[str], tenant: str = "") -> pb.RecordEventsResponse:
        """Append items, oldest first, to a user's history. Not retried."""
        events = [pb.Event(item_id=item_id) for item_id in item_ids]
        request = pb.RecordEventsRequest(user_id=user_id, events=events, tenant=tenant)
        return await _answer(self._stub.RecordEvents(request, timeout=self._timeout))

    async def history(self, user_id: str, tenant: str = "") -> list[str]:
        """Ids of a user's stored items, oldest first; empty when there are none."""
        call = self._stub.GetHistory(pb.GetHistoryRequest(user_id=user_id, tenant=tenant), timeout=self._timeout)
        return [event.item_id for event in (await _answer(call)).events]

    async def forget(self, user_id: str, tenant: str = "") -> bool:
        """Erase a user's history; whether there was one."""
        call = self._stub.ForgetUser(pb.ForgetUserRequest(user_id=user_id, tenant=tenant), timeout=self._timeout)
        return (await _answer(call)).existed

    async def info(self) -> pb.GetServiceInfoResponse:
        """Versions, limits, and the state of the services behind this one."""
        return await _answer(self._stub.GetServiceInfo(pb.GetServiceInfoRequest(), timeout=self._timeout))

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


async def _answer(call: Awaitable[_Reply]) -> _Reply:
    with _translated():
        return await call


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise RecommenderError(error.code(), error.details() or "", retry_after_seconds(error)) from None


def _batch_result(one: pb.RecommendBatchResponse) -> pb.RecommendResponse | RecommenderError:
    if one.WhichOneof("result") == "response":
        return one.response
    codes = {code.value[0]: code for code in grpc.StatusCode}
    code, after = codes.get(one.error.code, grpc.StatusCode.UNKNOWN), one.error.retry_after_ms
    return RecommenderError(code, one.error.message, after / 1000 if after else None)
