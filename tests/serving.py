"""Parts of all tests of running services: the random bundle, clients, and lists that can be compared.

The clients are gRPC's blocking ones: a test reads from top to bottom, and `submit` runs several calls at once.
"""

from __future__ import annotations

import queue
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atspeed.engine.bundle.bundle import Bundle
from atspeed.local.stack import ServiceProcess
from atspeed.rpc.addresses import target_uri
from atspeed.rpc.channels import channel_options
from atspeed.v1 import (
    draft_pb2,
    draft_pb2_grpc,
    recommendation_pb2,
    recommendation_pb2_grpc,
    target_pb2,
    target_pb2_grpc,
)
from atspeed.v1 import recommendation_pb2 as pb

# For what must end at all, on however slow a machine.
LIVENESS_SECONDS = 60.0
WINDOW = 8
LEVELS = 4
ROUNDING = 1e-4  # between scores of our services and those of other software
SERVING = int(health_pb2.HealthCheckResponse.SERVING)
Reply = TypeVar("Reply")
RECOMMENDATION = recommendation_pb2.DESCRIPTOR.services_by_name["RecommendationService"].full_name
TARGET = target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name
DRAFT = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name
MODES = [
    pb.MODE_TARGET_ONLY,
    pb.MODE_STRICT,
    pb.MODE_TOLERANCE,
    pb.MODE_RELAXED_SAMPLING,
    pb.MODE_EXACT_SAMPLING,
]
SAMPLING = [pb.MODE_RELAXED_SAMPLING, pb.MODE_EXACT_SAMPLING]
PLAIN = [mode for mode in MODES if mode not in SAMPLING]


class Link:
    """A path that services follow, which names one bundle, another one, or none."""

    def __init__(self, path: Path, bundle: Bundle | None = None) -> None:
        self.path = path
        if bundle:
            self.point_to(bundle)

    def point_to(self, bundle: Bundle) -> None:
        """In one step, as `ln -sfn` and a rename do."""
        new = self.path.with_suffix(".new")
        new.symlink_to(bundle.root)
        new.replace(self.path)

    def remove(self) -> None:
        """It names none."""
        self.path.unlink(missing_ok=True)


class Client:
    """Calls of an orchestrator. Without other arguments they have time enough for any machine."""

    def __init__(self, address: str, options: Sequence[tuple[str, str | int]] = ()) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1), *options])
        self.stub: recommendation_pb2_grpc.RecommendationServiceStub = (
            recommendation_pb2_grpc.RecommendationServiceStub(self._channel)
        )
        self.channel = self._channel

    @classmethod
    def of_replicas(cls, addresses: Sequence[str]) -> Self:
        """A client that balances over several orchestrators, as the Python client does."""
        options = channel_options(RECOMMENDATION, ["Recommend"], max_message_bytes=-1)
        return cls(target_uri(",".join(addresses)), options)

    def recommend(
        self, history: Sequence[str] | None = None, /, *, timeout: float = LIVENESS_SECONDS, **fields: Any
    ) -> pb.RecommendResponse:
        """The list for a history, or for the `user_id` among the fields."""
        request = request_of(history, **fields)
        return self.stub.Recommend(request, timeout=timeout, wait_for_ready=True)

    def batch(self, requests: Sequence[pb.RecommendRequest]) -> dict[int, pb.RecommendBatchResponse]:
        """All results of a batch, by index."""
        answers = list(self.stub.RecommendBatch(pb.RecommendBatchRequest(requests=requests), timeout=LIVENESS_SECONDS))
        results = {answer.index: answer for answer in answers}
        assert len(results) == len(answers)
        return results

    def record(self, user_id: str, item_ids: Sequence[str]) -> pb.RecordEventsResponse:
        """Append to a history."""
        return self.stub.RecordEvents(
            pb.RecordEventsRequest(user_id=user_id, events=[pb.Event(item_id=item) for item in item_ids]),
            timeout=LIVENESS_SECONDS,
        )

    def history(self, user_id: str) -> list[str]:
        """A stored history."""
        reply = self.stub.GetHistory(pb.GetHistoryRequest(user_id=user_id), timeout=LIVENESS_SECONDS)
        return [event.item_id for event in reply.events]

    def info(self) -> pb.GetServiceInfoResponse:
        """Versions, limits, state."""
        return self.stub.GetServiceInfo(pb.GetServiceInfoRequest(), timeout=LIVENESS_SECONDS)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def request_of(history: Sequence[str] | None = None, /, **fields: Any) -> pb.RecommendRequest:
    """A request for five items unless the fields say otherwise."""
    subject = {} if history is None else {"history": pb.History(item_ids=history)}
    return pb.RecommendRequest(**{"k": 5, **subject, **fields})


@contextmanager
def models(address: str) -> Iterator[grpc.Channel]:
    """A channel to one replica of a model service, with room for large messages."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        yield channel


class EvaluateStream:
    """One Evaluate stream, message by message."""

    def __init__(self, channel: grpc.Channel) -> None:
        stub: target_pb2_grpc.TargetServiceStub = target_pb2_grpc.TargetServiceStub(channel)
        self._requests: queue.SimpleQueue[target_pb2.EvaluateRequest | None] = queue.SimpleQueue()
        self._replies = stub.Evaluate(iter(self._requests.get, None), timeout=LIVENESS_SECONDS, wait_for_ready=True)

    def send(self, request: target_pb2.EvaluateRequest) -> None:
        """Ask, without waiting for the answer."""
        self._requests.put(request)

    def receive(self) -> target_pb2.EvaluateResponse:
        """The next answer. Raises grpc.RpcError."""
        return next(self._replies)

    def ask(self, request: target_pb2.EvaluateRequest) -> target_pb2.EvaluateResponse:
        """One pass."""
        self.send(request)
        return self.receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        self._replies.cancel()

    def end(self) -> list[target_pb2.EvaluateResponse]:
        """Say that nothing more will be asked; what still comes."""
        self._requests.put(None)
        return list(self._replies)


@contextmanager
def refused(code: grpc.StatusCode, field: str) -> Iterator[None]:
    """The block's call ends with this status, whose message begins with the field at fault."""
    with pytest.raises(grpc.RpcError) as refusal:
        yield
    status = cast("grpc.Call", refusal.value)
    details = status.details() or ""
    assert (status.code(), field) == (code, named_field(details, field)), details


def named_field(details: str, field: str) -> str:
    """`field` where the message names it first, else the whole message."""
    return field if re.match(rf"{re.escape(field)}(?![\w.])", details) else details


def ids(reply: pb.RecommendResponse) -> list[str]:
    """The items of a list, in order."""
    return [item.item_id for item in reply.items]


def assert_same_list(reply: pb.RecommendResponse, expected: pb.RecommendResponse) -> None:
    """Equal items in equal order, with the same scores bit for bit."""
    assert [(item.item_id, item.score) for item in reply.items] == [
        (item.item_id, item.score) for item in expected.items
    ]


def storm(
    calls: Sequence[Callable[[], Reply]], events: Mapping[int, Callable[[], object]], *, concurrency: int = 4
) -> list[Reply]:
    """Run calls, several at once; after so many answers, let something happen. The answers, in the order of the calls."""
    with ThreadPoolExecutor(concurrency) as pool:
        futures: list[Future[Reply]] = [pool.submit(call) for call in calls]
        for answered, _ in enumerate(as_completed(futures), start=1):
            events.get(answered, lambda: None)()
        return [future.result() for future in futures]


def until(condition: Callable[[], bool], *, pause: float = 0.01) -> None:
    """Return when a condition holds that has no event."""
    end = time.monotonic() + LIVENESS_SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(pause)


def recovered(client: Client, history: Sequence[str]) -> pb.RecommendResponse:
    """The first list after an outage. Until the orchestrator has reached a replica again, UNAVAILABLE and nothing else."""
    end = time.monotonic() + LIVENESS_SECONDS
    while True:
        try:
            return client.recommend(history)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                raise


def suspend(service: ServiceProcess) -> None:
    """SIGSTOP: the process keeps its connections and answers nothing."""
    assert service.process is not None
    service.process.send_signal(signal.SIGSTOP)


def resume(service: ServiceProcess) -> None:
    """SIGCONT."""
    if service.process is not None:
        service.process.send_signal(signal.SIGCONT)


class HealthWatch:
    """A Watch stream of a server's health."""

    def __init__(self, address: str, service: str = "") -> None:
        self._channel = grpc.insecure_channel(address)
        stub: Any = health_pb2_grpc.HealthStub(self._channel)  # its methods are not in the type stubs
        request = health_pb2.HealthCheckRequest(service=service)
        self._states: Any = stub.Watch(request, timeout=LIVENESS_SECONDS, wait_for_ready=True)

    def next(self) -> int:
        """The next state; blocks until it is announced."""
        reply: health_pb2.HealthCheckResponse = next(self._states)
        return int(reply.status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._states.cancel()
        self._channel.close()


def check_health(channel: grpc.Channel, service: str) -> int:
    """The state of a service now."""
    stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods are not in the type stubs
    request = health_pb2.HealthCheckRequest(service=service)
    return int(stub.Check(request, timeout=LIVENESS_SECONDS).status)


PlanAnswer = Callable[[draft_pb2.PlanRequest, grpc.ServicerContext], bytes]


class FakeDraft:
    """A DraftService in this process that answers whatever the test puts into `answer`, as bytes."""

    def __init__(self) -> None:
        self.answer: PlanAnswer = empty_plan
        self.asked = threading.Semaphore(0)
        plan = grpc.unary_unary_rpc_method_handler(
            self._plan, request_deserializer=draft_pb2.PlanRequest.FromString, response_serializer=bytes
        )
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_send_message_length", -1)])
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(DRAFT, {"Plan": plan}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def _plan(self, request: draft_pb2.PlanRequest, context: grpc.ServicerContext) -> bytes:
        self.asked.release()
        return self.answer(request, context)

    def was_asked(self) -> bool:
        """Return true if a call came since the last question, and count from now on."""
        count = 0
        while self.asked.acquire(blocking=False):
            count += 1
        return count > 0


def empty_plan(request: draft_pb2.PlanRequest, context: grpc.ServicerContext) -> bytes:
    """Nothing planned: valid, and of no use."""
    return draft_pb2.PlanResponse().SerializeToString()


def draft_stub(channel: grpc.Channel) -> draft_pb2_grpc.DraftServiceStub:
    """The stub of a draft replica."""
    return draft_pb2_grpc.DraftServiceStub(channel)


def target_stub(channel: grpc.Channel) -> target_pb2_grpc.TargetServiceStub:
    """The stub of a target replica."""
    return target_pb2_grpc.TargetServiceStub(channel)
