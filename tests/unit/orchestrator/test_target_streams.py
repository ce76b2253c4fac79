"""Streams of the target service and their places."""

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
    """The only slot is taken, and no call may wait."""
    admission = Admission(slots=1, queue_limit=0)
    servicer = TargetServicer(cast("Any", None), admission, idle_seconds)  # no model: it is not asked for one
    async with admission.slot(Priority.INTERACTIVE):
        return await anext(aiter(servicer.Evaluate(messages(*sent), cast("Any", None))))


async def test_silent_stream_takes_no_place_and_ends() -> None:
    """It once held one from its beginning on, for as long as its client liked."""
    with pytest.raises(DeadlineExceededError, match="silent"):
        await first_answer(0.05)


async def test_stream_without_start_takes_no_place() -> None:
    with pytest.raises(InvalidArgumentError, match="start"):
        await first_answer(60, target_pb2.EvaluateRequest())
