"""Requests that no client should send: each gets its status, and the next request is served."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from atspeed.local.stack import LocalStack, ServiceProcess
from atspeed.rpc import healthcheck, wire
from atspeed.v1 import draft_pb2, target_pb2
from atspeed.v1 import recommendation_pb2 as pb
from tests.faults.conftest import Case
from tests.faults.mutations import mutated
from tests.secured import path_of, rpcs
from tests.serving import LIVENESS_SECONDS, Client, assert_same_list, draft_stub, models, target_stub

# Whatever came, it was either understood or the client's own fault.
PROPER = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
AT_ONCE = 24


@dataclass(frozen=True)
class Ending:
    """How a call of a method ended. details: of a status that is not proper."""

    method: str
    code: grpc.StatusCode
    details: str = ""


def user_requests(cases: Sequence[Case]) -> Mapping[str, list[Message]]:
    """Valid requests of the public service, by method."""
    history = pb.History(item_ids=cases[0].history)
    plain = pb.RecommendRequest(history=history, k=3, beam_width=4)
    known = {"user_id": "somebody", "tenant": "shop"}
    recommend = [
        plain,
        pb.RecommendRequest(user_id="somebody", k=1, mode=pb.MODE_TARGET_ONLY, exclude_seen=True, tenant="shop"),
        pb.RecommendRequest(
            history=history, k=2, mode=pb.MODE_TOLERANCE, tolerance=0.5, allowed_item_ids=["item-1", "item-2"]
        ),
        pb.RecommendRequest(history=history, k=2, mode=pb.MODE_EXACT_SAMPLING, seed=3, temperature=0.7),
        pb.RecommendRequest(history=history, k=3, beam_widths=[1, 4, 3], least_beam_width=3),
        pb.RecommendRequest(history=history, k=2, mode=pb.MODE_RELAXED_SAMPLING, excluded_item_ids=["item-1"]),
    ]
    events = pb.RecordEventsRequest(events=[pb.Event(item_id="item-1")], **known)
    return {
        "Recommend": list(recommend),
        "RecommendBatch": [pb.RecommendBatchRequest(requests=recommend[:2])],
        "Explain": [pb.ExplainRequest(request=one, item_ids=["item-1", "item-2", "nothing"]) for one in recommend],
        "RecordEvents": [events],
        "RecordEventsBatch": [pb.RecordEventsBatchRequest(requests=[events, events])],
        "GetHistory": [pb.GetHistoryRequest(**known)],
        "ForgetUser": [pb.ForgetUserRequest(**known)],
        "GetServiceInfo": [pb.GetServiceInfoRequest()],
    }


def draft_requests(version: str) -> Mapping[str, list[Message]]:
    plan = draft_pb2.PlanRequest(
        model_version=version,
        prompt=wire.to_array(np.arange(1, 9)),
        beams=wire.to_array(np.zeros(1, dtype=np.int32)),
        scores=wire.to_array(np.zeros(1)),
        beam_width=4,
        beam_widths=[2, 4],
        width=4,
        max_nodes=16,
        proposal=draft_pb2.PROPOSAL_TOP,
        with_evaluation=True,
    )
    return {"GetModelInfo": [draft_pb2.DraftServiceGetModelInfoRequest()], "Plan": [plan]}


def target_requests(version: str) -> Mapping[str, list[Message]]:
    start = target_pb2.EvaluateStart(model_version=version, prompt=wire.to_array(np.arange(1, 9)), max_children=8)
    evaluate = target_pb2.EvaluateRequest(start=start, nodes=wire.to_array(np.arange(4, dtype=np.int32)))
    search = target_pb2.EvaluateRequest(nodes=evaluate.nodes, start=start)
    search.start.MergeFrom(target_pb2.EvaluateStart(beam_width=4, beam_widths=[2, 4], prefetches=True))
    return {"GetModelInfo": [target_pb2.TargetServiceGetModelInfoRequest()], "Evaluate": [evaluate, search]}


@pytest.fixture(scope="module")
def valid(shared_stack: LocalStack, cases: list[Case]) -> dict[str, Mapping[str, list[Message]]]:
    """By service and method."""
    with models(shared_stack.drafts[0].address) as draft, models(shared_stack.targets[0].address) as target:
        asked = draft_pb2.DraftServiceGetModelInfoRequest(), target_pb2.TargetServiceGetModelInfoRequest()
        draft_version = draft_stub(draft).GetModelInfo(asked[0], timeout=LIVENESS_SECONDS).model.model_version
        target_version = target_stub(target).GetModelInfo(asked[1], timeout=LIVENESS_SECONDS).model.model_version
    return {
        "RecommendationService": user_requests(cases),
        "DraftService": draft_requests(draft_version),
        "TargetService": target_requests(target_version),
    }


def address_of(stack: LocalStack, method: MethodDescriptor) -> str:
    service = {"DraftService": stack.drafts, "TargetService": stack.targets}
    return service.get(method.containing_service.name, stack.orchestrators)[0].address


async def status(channel: grpc.aio.Channel, method: MethodDescriptor, messages: Sequence[bytes]) -> Ending:
    """How a call with these messages ends; a stream's are sent one after another, each after the answer to the last."""
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }
    call: Any = kinds[method.client_streaming, method.server_streaming](path_of(method))
    try:
        if method.client_streaming:
            await talk(call(timeout=LIVENESS_SECONDS), messages)
        elif method.server_streaming:
            async for _ in call(messages[0], timeout=LIVENESS_SECONDS):
                pass
        else:
            await call(messages[0], timeout=LIVENESS_SECONDS)
    except grpc.aio.AioRpcError as error:
        proper = error.code() in PROPER
        return Ending(method.name, error.code(), "" if proper else error.details() or "")
    return Ending(method.name, grpc.StatusCode.OK)


async def talk(call: Any, messages: Sequence[bytes]) -> None:
    """Raises grpc.aio.AioRpcError when the server ends the stream."""
    for message in messages:
        await call.write(message)
        await call.read()
    call.cancel()


async def send_mutated(
    stack: LocalStack, valid: dict[str, Mapping[str, list[Message]]], count: int, seed: int
) -> Counter[Ending]:
    """Send so many mutated requests, an equal share for each method, and count how they end."""
    methods, ended = rpcs(), Counter[Ending]()

    async def some(method: MethodDescriptor, channel: grpc.aio.Channel, source: random.Random, share: int) -> None:
        seeds = valid[method.containing_service.name][method.name]
        for _ in range(share):
            messages = [mutated(seeds, source) for _ in range(2 if method.client_streaming else 1)]
            ended[await status(channel, method, messages)] += 1

    async with asyncio.TaskGroup() as group:
        channels = [grpc.aio.insecure_channel(address_of(stack, method)) for method in methods]
        at_once = max(1, AT_ONCE // len(methods))
        for number, (method, channel) in enumerate(zip(methods, channels, strict=True)):
            for part in range(at_once):
                source = random.Random(seed * 1000 + number * 10 + part)
                group.create_task(some(method, channel, source, count // (len(methods) * at_once)))
    for channel in channels:
        await channel.close()
    return ended


def assert_well(stack: LocalStack, cases: Sequence[Case]) -> None:
    """The same processes serve, and the next list is right."""
    assert all(service.running for service in stack.services)
    with Client(stack.address) as client:
        assert_same_list(client.recommend(cases[0].history, k=20), cases[0].expected)


def assert_only_proper(ended: Counter[Ending]) -> None:
    assert [ending for ending in ended if ending.code not in PROPER] == []
    refused = sum(count for ending, count in ended.items() if ending.code is grpc.StatusCode.INVALID_ARGUMENT)
    assert refused > ended.total() / 10  # else they would be hardly mutated


async def test_mutated_requests_get_a_proper_status(
    stack: LocalStack, cases: list[Case], valid: dict[str, Mapping[str, list[Message]]]
) -> None:
    assert_only_proper(await send_mutated(stack, valid, 600, seed=1))
    assert_well(stack, cases)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
async def test_a_hundred_thousand_mutated_requests(
    stack: LocalStack, cases: list[Case], valid: dict[str, Mapping[str, list[Message]]], seed: int
) -> None:
    assert_only_proper(await send_mutated(stack, valid, 10_200, seed=100 + seed))
    assert_well(stack, cases)


def nothing_of_http2(source: random.Random) -> bytes:
    return source.randbytes(source.randint(1, 4096))


def after_the_preface(source: random.Random) -> bytes:
    """Random frames: the connection is HTTP/2, what follows is not."""
    frames = b"".join(
        len(body).to_bytes(3, "big") + source.randbytes(1) + source.randbytes(1) + source.randbytes(4) + body
        for body in (source.randbytes(source.randint(0, 64)) for _ in range(source.randint(1, 20)))
    )
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + frames


async def throw(
    service: ServiceProcess, seconds: float, source: random.Random, kind: Callable[[random.Random], bytes]
) -> int:
    """Connection after connection that sends such bytes; how many there were."""
    end, thrown = asyncio.get_running_loop().time() + seconds, 0
    while asyncio.get_running_loop().time() < end:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        try:
            writer.write(kind(source))
            await writer.drain()
            async with asyncio.timeout(0.2):
                await reader.read(65_536)
        except (ConnectionError, TimeoutError):
            pass
        finally:
            writer.close()
        thrown += 1
    return thrown


@pytest.mark.parametrize("seconds", [1.0, pytest.param(60.0, marks=pytest.mark.long)])
async def test_raw_bytes_are_survived(stack: LocalStack, cases: list[Case], seconds: float) -> None:
    """On all ports at once, while their health is asked for and found. None of them gets into a log."""
    kinds = (nothing_of_http2, after_the_preface)
    throwing = [
        asyncio.create_task(throw(service, seconds, random.Random(number), kind))
        for number, service in enumerate(stack.services)
        for kind in kinds
    ]
    while not all(task.done() for task in throwing):
        for service in stack.services:
            assert (
                await asyncio.to_thread(healthcheck.state, service.address, timeout_seconds=LIVENESS_SECONDS)
                == "SERVING"
            )
    assert all(await asyncio.gather(*throwing))
    assert_well(stack, cases)
    for service in stack.services:
        assert service.process
        assert all(json.loads(line) for line in service.log.read_text(encoding="utf-8").splitlines())
        assert len(list(Path(f"/proc/{service.process.pid}/fd").iterdir())) < 500  # noqa: ASYNC240
