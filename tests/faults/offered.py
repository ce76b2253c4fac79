"""Offered load: requests at a rate that does not depend on the answers, from a process of their own."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Self

import grpc

from atspeed.v1 import recommendation_pb2 as pb
from atspeed.v1 import recommendation_pb2_grpc

_TIMEOUT_SECONDS = 20.0


@dataclass
class Outcome:
    """Outcomes of requests. seconds: how long those took that ended with a code. details: texts of the failures."""

    lasted: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    details: Counter[str] = field(default_factory=Counter)

    @property
    def goodput(self) -> float:
        """Answers a second."""
        return self.codes["OK"] / self.lasted

    def note(self, code: str, seconds: float) -> None:
        """One request has ended."""
        self.codes[code] += 1
        self.seconds.setdefault(code, []).append(seconds)


class Caller:
    """A process that sends requests to one orchestrator, so that its work is not this one's."""

    def __init__(self, address: str, requests: Sequence[pb.RecommendRequest]) -> None:
        self._address, self._requests = address, [request.SerializeToString() for request in requests]
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def at_once(self, callers: int, seconds: float) -> Future[Outcome]:
        """Run so many callers, each of which asks again when it has its answer."""
        return self._pool.submit(_run, self._address, self._requests, seconds, callers, 0.0)

    def at_rate(self, rate: float, seconds: float) -> Future[Outcome]:
        """Send so many requests a second."""
        return self._pool.submit(_run, self._address, self._requests, seconds, 0, rate)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _run(address: str, requests: list[bytes], seconds: float, callers: int, rate: float) -> Outcome:
    return asyncio.run(
        _offer(address, [pb.RecommendRequest.FromString(one) for one in requests], seconds, callers, rate)
    )


async def _offer(
    address: str, requests: list[pb.RecommendRequest], seconds: float, callers: int, rate: float
) -> Outcome:
    outcome = Outcome()
    async with grpc.aio.insecure_channel(address) as channel:
        stub: recommendation_pb2_grpc.RecommendationServiceAsyncStub = (
            recommendation_pb2_grpc.RecommendationServiceStub(channel)
        )

        async def one(number: int) -> None:
            asked = time.monotonic()
            try:
                await stub.Recommend(requests[number % len(requests)], timeout=_TIMEOUT_SECONDS)
                outcome.note("OK", time.monotonic() - asked)
            except grpc.aio.AioRpcError as error:
                outcome.note(error.code().name, time.monotonic() - asked)
                outcome.details[f"{error.code().name}: {error.details()}"] += 1

        async def again_and_again(first: int) -> None:
            for number in range(first, 1_000_000, callers):
                if time.monotonic() >= end:
                    return
                await one(number)

        begun = time.monotonic()
        end = begun + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(callers):
                group.create_task(again_and_again(number))
            sent = 0
            while rate and time.monotonic() < end:
                while sent < (time.monotonic() - begun) * rate:
                    group.create_task(one(sent))
                    sent += 1
                await asyncio.sleep(0.002)
        outcome.lasted = time.monotonic() - begun
    return outcome
