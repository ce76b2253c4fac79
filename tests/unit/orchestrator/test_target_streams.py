"""When a stream of the target holds a place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from atspeed.errors import DeadlineExceededError, InvalidArgumentError
from atspeed.rpc.admission import Admission, Priority
from atspeed.v1 import target_pb2
from target_service.server import TargetServicer


async def messages(*sent: target_pb2.EvaluateRequest) -> AsyncIterator[target_pb2.EvaluateRequest]:
    for message in sent:
        yield message
    await asyncio.Event().wait()


async def first_answer(idle_seconds: float, *sent: target_pb2.EvaluateRequest) -> object:
    """Where the only place is taken and nobody may wait for it."""
    admission = Admission(places=1, queue=0)
    servicer = TargetServicer(cast("Any", None), admission, idle_seconds)  # no model: it is not asked for one
    async with admission.place(Priority.INTERACTIVE):
        return await anext(aiter(servicer.Evaluate(messages(*sent), cast("Any", None))))


async def test_a_stream_that_says_nothing_asks_for_no_place_and_ends() -> None:
    """It once held one from its beginning on, for as long as its client liked."""
    with pytest.raises(DeadlineExceededError, match="silent"):
        await first_answer(0.05)


async def test_a_stream_without_start_asks_for_no_place() -> None:
    with pytest.raises(InvalidArgumentError, match="start"):
        await first_answer(60, target_pb2.EvaluateRequest())
