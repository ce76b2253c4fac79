"""The Python client of the recommendation service.

    async with RecommenderClient("localhost:50051") as client:
        await client.record("alice", ["item-1", "item-2"])
        reply = await client.recommend("alice", k=10)
        print([item.item_id for item in reply.items])

Replies are the protobuf messages themselves: the generated stubs give every field a type, and dataclasses would be a second
copy of the contract. Requests are keyword arguments. Code that is not async needs one `asyncio.run` around such a block.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from atspeed.client import arguments
from atspeed.client.arguments import MAX_UINT32, MAX_UINT64
from atspeed.client.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CallError,
    CertificateError,
    ClientStateError,
    RecommenderError,
    call_error,
    field_at_fault,
)
from atspeed.engine.search.mode import Mode
from atspeed.rollout.release_track import TRACK_HEADER, Track
from atspeed.rpc import wire
from atspeed.rpc.channels import open_channel, target_uri
from atspeed.security.tls import ClientTls, TlsError, TlsFiles
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import recommendation_pb2_grpc

__all__ = ["SERVICE", "CallError", "Mode", "Options", "RecommenderClient", "RecommenderError", "recommend_request"]

SERVICE = pb.DESCRIPTOR.services_by_name["RecommendationService"].full_name
# RecordEvents is not retried, since a repeated call would append twice.
_RETRIED = ("Recommend", "GetHistory", "ForgetUser", "GetServiceInfo")
_MAX_MESSAGE_BYTES = 33_554_432  # 32 MiB, more than any list or history needs
_MAX_TIMEOUT_SECONDS = 86_400.0  # gRPC treats a value too large for its clock as an expired deadline
_NULLABLE = {"history", "temperature", "seed", "excluded", "allowed", "beam_widths"}
_Reply = TypeVar("_Reply")


class Options(TypedDict, total=False):
    """Options of a recommendation; the contract's `RecommendRequest` describes each field.

    Modes may be text. Items may be any iterable of ids. None is no list, and `allowed` without any id is refused.
    """

    history: Iterable[str] | None
    k: int
    beam_width: int
    mode: Mode | str
    tolerance: float
    temperature: float | None
    seed: int | None
    excluded: Iterable[str] | None
    allowed: Iterable[str] | None
    exclude_seen: bool
    tenant: str
    batch_priority: bool
    least_beam_width: int
    items_per_path: int
    beam_widths: Iterable[int] | None


def recommend_request(user_id: str | None = None, **options: Unpack[Options]) -> pb.RecommendRequest:
    """Build a request for a stored user or, with `history`, for the items given; 10 items by default.

    Raises ArgumentTypeError or ArgumentValueError, which name the option at fault.
    """
    _refuse_unknown(options)
    given: dict[str, Any] = {
        name: value for name, value in options.items() if value is not None or name not in _NULLABLE
    }
    if (user_id is None) == ("history" not in given):
        raise ArgumentValueError("user_id", "give either user_id or history")
    request = pb.RecommendRequest(
        k=arguments.whole("k", given.get("k", 10), 1, MAX_UINT32),
        beam_width=arguments.whole("beam_width", given.get("beam_width", 0), 0, MAX_UINT32),
        mode=wire.to_mode(arguments.choice("mode", given.get("mode", Mode.STRICT), Mode)),
        tolerance=arguments.number("tolerance", given.get("tolerance", 0.0), least=0.0),
        excluded_item_ids=arguments.item_ids("excluded", given.get("excluded", ()), ordered=False),
        exclude_seen=arguments.flag("exclude_seen", given.get("exclude_seen", False)),
        tenant=arguments.text("tenant", given.get("tenant", ""), required=False),
        least_beam_width=arguments.whole("least_beam_width", given.get("least_beam_width", 0), 0, MAX_UINT32),
        items_per_path=arguments.whole("items_per_path", given.get("items_per_path", 0), 0, MAX_UINT32),
        beam_widths=arguments.wholes("beam_widths", given.get("beam_widths", ()), 1, MAX_UINT32),
    )
    if request.beam_width and request.beam_widths:
        raise ArgumentValueError("beam_widths", "give either beam_width or beam_widths")
    if arguments.flag("batch_priority", given.get("batch_priority", False)):
        request.priority = pb.PRIORITY_BATCH
    if "temperature" in given:
        request.temperature = arguments.number("temperature", given["temperature"], above=0.0)
    if "seed" in given:
        request.seed = arguments.whole("seed", given["seed"], 0, MAX_UINT64)
    if "allowed" in given:
        request.allowed_item_ids.extend(arguments.item_ids("allowed", given["allowed"], ordered=False, required=True))
    if user_id is not None:
        request.user_id = arguments.text("user_id", user_id)
    else:
        request.history.CopyFrom(pb.History(item_ids=arguments.item_ids("history", given["history"])))
    return request


class RecommenderClient:
    """Calls a recommendation service. An async context manager, created and used inside one event loop.

    Calls that can be repeated without a change are retried while the service is UNAVAILABLE, up to three times in all and
    within their deadline. A call raises CallError when it fails, and UsageError, before anything is sent, for a mistaken
    argument. Both are a RecommenderError (atspeed/client/errors.py). Errors of a `token` function are passed on.

    Args:
        address: NAME:PORT, or IP:PORT,IP:PORT for several replicas.
        timeout_seconds: the deadline of every call, at most a day.
        tls: the TLS settings, `ClientTls()` for a server with a public certificate; plain text without it.
        token: a bearer token, or a function that returns the current one.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = 10.0,
        tls: ClientTls | None = None,
        token: str | Callable[[], str] | None = None,
    ) -> None:
        self._loop = _running_loop()
        self._closed = False
        self._timeout = arguments.number("timeout_seconds", timeout_seconds, above=0.0, most=_MAX_TIMEOUT_SECONDS)
        self._channel = _channel(_target(address), _tls(tls), _shown(token))
        self._stub: recommendation_pb2_grpc.RecommendationServiceAsyncStub = (
            recommendation_pb2_grpc.RecommendationServiceStub(self._channel)
        )

    async def recommend(
        self, user_id: str | None = None, *, track: Track | str | None = None, **options: Unpack[Options]
    ) -> pb.RecommendResponse:
        """Return the list of a stored user or, with `history=[...]`, of the items given. track: see `send`."""
        return await self.send(recommend_request(user_id, **options), track)

    async def send(self, request: pb.RecommendRequest, track: Track | str | None = None) -> pb.RecommendResponse:
        """Return the list of a request made by `recommend_request`, or by hand.

        track: the release track to ask instead of the user's own; that needs the scope admin.
        """
        asked = arguments.message("request", request, pb.RecommendRequest)
        metadata = () if track is None else ((TRACK_HEADER, arguments.choice("track", track, Track).value),)
        return await self._call(self._stub.Recommend, asked, metadata)

    async def recommend_batch(
        self, requests: Iterable[pb.RecommendRequest]
    ) -> AsyncIterator[tuple[int, pb.RecommendResponse | CallError]]:
        """Yield each request's index with its list or its error, in the order of completion. See `recommend_request`."""
        asked = pb.RecommendBatchRequest(requests=arguments.messages("requests", requests, pb.RecommendRequest))
        self._check_usable()
        with self._translated():
            async for one in self._stub.RecommendBatch(asked, timeout=self._timeout):
                yield one.index, _batch_result(one)

    async def record(self, user_id: str, item_ids: Iterable[str], tenant: str = "") -> pb.RecordEventsResponse:
        """Append items, oldest first, to a user's history. Not retried.

        Items that the catalogue does not know are stored too, and the reply names them.
        """
        request = pb.RecordEventsRequest(
            user_id=arguments.text("user_id", user_id),
            events=[pb.Event(item_id=item) for item in arguments.item_ids("item_ids", item_ids, required=True)],
            tenant=arguments.text("tenant", tenant, required=False),
        )
        return await self._call(self._stub.RecordEvents, request)

    async def history(self, user_id: str, tenant: str = "") -> list[str]:
        """Return the ids of a user's stored items, oldest first; empty without any."""
        reply = await self._call(self._stub.GetHistory, pb.GetHistoryRequest(**_user(user_id, tenant)))
        return [event.item_id for event in reply.events]

    async def forget(self, user_id: str, tenant: str = "") -> bool:
        """Erase a user's history. Returns True if there was one."""
        reply = await self._call(self._stub.ForgetUser, pb.ForgetUserRequest(**_user(user_id, tenant)))
        return reply.existed

    async def info(self) -> pb.GetServiceInfoResponse:
        """Return versions, limits, and the state of the services behind this one."""
        return await self._call(self._stub.GetServiceInfo, pb.GetServiceInfoRequest())

    async def close(self) -> None:
        """Close the connection; running calls end with CallError, CANCELLED. A second call has no effect."""
        if not self._closed:
            self._check_usable()
            self._closed = True
            await self._channel.close()

    async def __aenter__(self) -> Self:
        self._check_usable()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Any, _Reply],
        request: Message,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> _Reply:
        self._check_usable()
        with self._translated():
            return await method(request, timeout=self._timeout, metadata=metadata)

    def _check_usable(self) -> None:
        if self._closed:
            raise ClientStateError("the client is closed; create another one")
        if _running_loop() is not self._loop:
            raise ClientStateError("the client belongs to another event loop; create one in each loop that needs one")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise call_error(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or (task and task.cancelling()):
                raise
            # gRPC cancels the calls of a closed channel, and their tasks see this as their own cancellation.
            raise CallError(grpc.StatusCode.CANCELLED, "the client was closed during the call") from None


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise ClientStateError("create and use the client inside an event loop, as in asyncio.run(main())") from None


def _channel(target: str, tls: ClientTls | None, token: Callable[[], str] | None) -> grpc.aio.Channel:
    try:
        return open_channel(
            target, SERVICE, retried=_RETRIED, max_message_bytes=_MAX_MESSAGE_BYTES, tls=tls, token=token
        )
    except TlsError as error:
        raise CertificateError("tls", str(error)) from None


def _target(address: str) -> str:
    try:
        return target_uri(arguments.text("address", address))
    except ArgumentValueError:
        raise
    except ValueError as error:
        raise ArgumentValueError("address", str(error)) from None


def _tls(tls: ClientTls | None) -> ClientTls | None:
    if tls is None:
        return None
    checked = arguments.message("tls", tls, ClientTls)
    arguments.message("tls.files", checked.files, TlsFiles)
    arguments.text("tls.server_name", checked.server_name, required=False)
    for path in checked.files.paths:
        arguments.message("tls.files", path, Path)
    if (checked.files.certificate is None) != (checked.files.key is None):
        raise ArgumentValueError("tls", "certificate and key go together")
    return checked


def _shown(token: str | Callable[[], str] | None) -> Callable[[], str] | None:
    """Return the function that gives each call its token; None without one."""
    if token is None:
        return None
    if callable(token):
        return lambda: arguments.token("token", token())
    fixed = arguments.token("token", token)
    return lambda: fixed


def _user(user_id: str, tenant: str) -> dict[str, str]:
    return {
        "user_id": arguments.text("user_id", user_id),
        "tenant": arguments.text("tenant", tenant, required=False),
    }


def _refuse_unknown(options: Iterable[str]) -> None:
    known = list(Options.__annotations__)
    for name in options:
        if name not in known:
            raise ArgumentTypeError(name, f"is not an option of a recommendation; the options are: {', '.join(known)}")


def _batch_result(one: pb.RecommendBatchResponse) -> pb.RecommendResponse | CallError:
    if one.WhichOneof("result") == "response":
        return one.response
    codes = {code.value[0]: code for code in grpc.StatusCode}
    code, message = codes.get(one.error.code, grpc.StatusCode.UNKNOWN), one.error.message
    return CallError(code, message, field=field_at_fault(code, message))
