# ruff: noqa: N802 - gRPC names the methods of a servicer
"""HTTP codes of all errors, the order of a batch's lines and health, by a real Envoy before a server that does as it is told."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from atspeed.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from atspeed.local.edge import LocalEdge
from atspeed.rpc.server import Registration
from atspeed.rpc.server import running as serving
from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import recommendation_pb2_grpc
from tests.echo import settings
from tests.edge import HttpClient, needs_envoy, running
from tests.serving import LIVENESS_SECONDS, RECOMMENDATION

pytestmark = needs_envoy

ERRORS: dict[str, tuple[ServiceError | Exception, int]] = {
    "invalid": (InvalidArgumentError("k", "must be at least 1"), 400),
    "precondition": (FailedPreconditionError("another version"), 400),
    "unauthenticated": (UnauthenticatedError("no token"), 401),
    "denied": (PermissionDeniedError("not this tenant"), 403),
    "missing": (NotFoundError("user_id", "no history"), 404),
    "busy": (ResourceExhaustedError("busy", retry_after_seconds=1.2), 429),
    "disabled": (UnimplementedError("no Redis"), 501),
    "unavailable": (UnavailableError("no target"), 503),
    "late": (DeadlineExceededError("too late"), 504),
    "bug": (ValueError("secret"), 500),
}


class Told(recommendation_pb2_grpc.RecommendationServiceServicer):
    """Raises the error that a user id names. The second line of a batch waits for `release`."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def Recommend(self, request: pb.RecommendRequest, context: Any) -> pb.RecommendResponse:
        raise ERRORS[request.user_id][0]

    async def Unused(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    Explain = RecordEvents = RecordEventsBatch = GetHistory = ForgetUser = GetServiceInfo = Unused

    async def RecommendBatch(
        self, request: pb.RecommendBatchRequest, context: Any
    ) -> AsyncIterator[pb.RecommendBatchResponse]:
        for index in range(len(request.requests)):
            if index:
                await self.release.wait()
            yield pb.RecommendBatchResponse(index=index, response=pb.RecommendResponse())

    def register(self, server: Any) -> None:
        recommendation_pb2_grpc.add_RecommendationServiceServicer_to_server(self, server)


class Server:
    """`Told` on an event loop of its own."""

    def __init__(self, bundle: Path) -> None:
        self._bundle, self.told = bundle, Told()
        self._loop = asyncio.new_event_loop()
        self._ready, self._end = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self.address = ""

    async def _serve(self) -> None:
        registrations = [Registration(RECOMMENDATION, self.told.register)]
        async with serving(settings(self._bundle, drain_seconds=0.1), registrations) as server:
            self.address = server.address
            self._ready.set()
            await self._end.wait()

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self.told.release.set)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(LIVENESS_SECONDS)

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._ready.wait(LIVENESS_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.close()


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with Server(bundle) as server:
        yield server


@pytest.fixture(scope="module")
def address(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an Envoy before it."""
    with LocalEdge([server.address], tmp_path_factory.mktemp("edge") / "edge.log") as edge:
        yield f"127.0.0.1:{edge.port}"


@pytest.mark.parametrize("name", ERRORS)
def test_each_error_has_its_code_its_reason_and_its_id(address: str, name: str) -> None:
    error, code = ERRORS[name]
    answer = HttpClient(address)("POST", "/v1/recommendations", {"user_id": name}, x_request_id="r-1")
    assert answer.code == code
    assert answer.headers["x-request-id"] == "r-1"
    info = answer.json["details"][0]
    assert info["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"
    assert (info["domain"], info["reason"]) == ("atspeed", str(getattr(error, "reason", "INTERNAL")))
    assert (str(error) in answer.json["message"]) is (name != "bug")
    assert ("retry-after" in answer.headers) is (name == "busy")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "LOCALHOST:8080", "[::1]", "[::1]:80"])
def test_names_of_this_machine_are_answered(address: str, host: str) -> None:
    assert HttpClient(address)("POST", "/v1/recommendations", {"user_id": "denied"}, host=host).code == 403
    assert HttpClient(address)("GET", "/openapi.json", host=host).json["openapi"] == "3.1.0"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.2", ""])
@pytest.mark.parametrize("path", ["/v1/recommendations", "/openapi.json", "/nothing"])
def test_a_name_that_others_can_point_here_is_refused(address: str, host: str, path: str) -> None:
    """A page of that name would have the same origin as the service, so CORS would not refuse it."""
    answer = HttpClient(address)("POST", path, {"user_id": "invalid"}, host=host, origin=f"http://{host}")
    assert "access-control-allow-origin" not in answer.headers
    if host:
        assert (answer.code, answer.json["code"]) == (403, 7)
        assert answer.json["message"] == "host: this name is not served here; atspeed up --http-host NAME adds it"
    else:
        assert answer.code in {400, 403}


def test_names_can_be_added(server: Server, tmp_path: Path) -> None:
    with LocalEdge([server.address], tmp_path / "edge.log", hosts=["models.example"]) as edge:
        client = HttpClient(f"127.0.0.1:{edge.port}")
        for host, code in (("models.example:8080", 400), ("localhost", 400), ("other.example", 403)):
            assert client("POST", "/v1/recommendations", {"user_id": "invalid"}, host=host).code == code


def test_grpc_at_another_name_is_refused_too(address: str) -> None:
    with grpc.insecure_channel(address, options=[("grpc.default_authority", "evil.example")]) as channel:
        info: Any = channel.unary_unary(f"/{RECOMMENDATION}/GetServiceInfo")
        with pytest.raises(grpc.RpcError) as caught:
            info(b"", timeout=LIVENESS_SECONDS)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "host: this name is not served here" in str(caught.value.details())


@pytest.mark.parametrize("timeout", ["soon", "", "5", "123456789S", "-1S", "1s"])
def test_a_timeout_that_is_no_time_is_400(address: str, timeout: str) -> None:
    for path in ("/v1/recommendations", f"/{RECOMMENDATION}/Recommend"):
        answer = HttpClient(address)("POST", path, {"user_id": "denied"}, grpc_timeout=timeout)
        assert (answer.code, answer.json["code"]) == (400, 3)
        assert answer.json["message"].startswith("grpc-timeout: must be up to 8 digits")


@pytest.mark.parametrize("timeout", ["2S", "99999999m", "1H"])
def test_a_timeout_that_is_a_time_is_passed_on(address: str, timeout: str) -> None:
    answer = HttpClient(address)("POST", "/v1/recommendations", {"user_id": "denied"}, grpc_timeout=timeout)
    assert answer.code == 403


def test_a_busy_service_says_when_to_come_back(address: str) -> None:
    answer = HttpClient(address)("POST", "/v1/recommendations", {"user_id": "busy"})
    assert answer.headers["retry-after"] == "2"  # whole seconds, not before 1.2 s
    (hint,) = [one for one in answer.json["details"] if one["@type"].endswith("/google.rpc.RetryInfo")]
    assert hint["retry_delay"] == "1.200s"


def test_a_line_of_a_batch_comes_before_the_next_is_ready(server: Server, address: str) -> None:
    with closing(http.client.HTTPConnection(address, timeout=LIVENESS_SECONDS)) as connection:
        connection.request("POST", "/v1/recommendations:batch", json.dumps({"requests": [{}, {}]}))
        reply = connection.getresponse()
        assert json.loads(reply.readline())["index"] == 0
        server.release()
        assert json.loads(reply.readline())["index"] == 1
        assert reply.readline() == b""


@contextmanager
def unused_port() -> Iterator[str]:
    """The address of a port at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_health_is_that_of_the_replicas(address: str, tmp_path: Path) -> None:
    assert HttpClient(address)("GET", "/healthz").code == 200
    with unused_port() as nobody, running([nobody], tmp_path) as envoy:
        client = HttpClient(envoy.address)
        assert client("GET", "/healthz").code == 503
        answer = client("POST", "/v1/recommendations", {"user_id": "x"})
        assert (answer.code, answer.json["code"]) == (503, 14)
        assert client("GET", "/openapi.json").json["openapi"] == "3.1.0"
