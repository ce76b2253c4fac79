"""Mistakes in a program that uses the Python client: each is refused before anything is sent, and names the argument."""

from __future__ import annotations

import asyncio
import inspect
import io
import math
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed_client import (
    ArgumentTypeError,
    ArgumentValueError,
    AsyncClient,
    CallError,
    CertificateError,
    ClientStateError,
    Event,
    Mode,
    RecommenderError,
    RecommendRequest,
    Tls,
    UsageError,
    errors,
)
from atspeed_client.v1 import recommendation_pb2 as pb
from tests.fake_service import FakeService, connected

LONE = "\udcff"
NOT_TEXT: list[Any] = [None, 5, b"a", ["a"], object(), 1.5, True]
NOT_LISTS: list[Any] = [
    "181",
    b"181",
    5,
    {"a": 1},
    object(),
    {"a", "b"},
    bytearray(b"a"),
    np.array("a"),
    io.StringIO("a"),
]
NOT_IDS: list[Any] = [*NOT_TEXT, "", LONE, np.int64(3), np.bytes_(b"a")]
NOT_WHOLE: list[Any] = ["5", 5.0, True, None, np.float64(5), np.bool_(True), [5], -1, 2**31, 10**5000]
NOT_NUMBERS: list[Any] = [
    "1",
    None,
    True,
    1j,
    [1.0],
    float("nan"),
    float("inf"),
    -float("inf"),
    10**400,
    np.float32("nan"),
]


def mistakes() -> list[tuple[str, dict[str, Any]]]:
    """The field that each names, and the options of a recommendation."""
    wrong: dict[str, list[Any]] = {
        "k": [*NOT_WHOLE, 0],
        "beam_width": NOT_WHOLE,
        "least_beam_width": NOT_WHOLE,
        "items_per_path": NOT_WHOLE,
        "beam_widths": [bad for bad in NOT_LISTS if bad is not None],
        "user_fields": ["age=5", [("age", "5")], 5],
        "seed": [*(bad for bad in NOT_WHOLE if bad is not None and bad != 2**31), 2**63],
        "mode": ["magic", "STRICT", "", 2, None, b"strict", pb.MODE_STRICT, "unknown"],
        "tolerance": [*NOT_NUMBERS, -0.1],
        "temperature": [*(bad for bad in NOT_NUMBERS if bad is not None), 0, -1],
        "exclude_seen": ["no", 1, 0, None, "False"],
        "priority": ["no", 1, True, b"batch"],
        "code_paths": ["no", 1, None],
        "statistics": ["no", 1, None],
        "tenant": [*NOT_TEXT, LONE],
        "excluded": [bad for bad in NOT_LISTS if not isinstance(bad, set)],
        "allowed": [[], (), *(bad for bad in NOT_LISTS if not isinstance(bad, set))],
    }
    cases = [(field, {"user_id": "a", field: bad}) for field, values in wrong.items() for bad in values]
    cases += [("history", {"history": bad}) for bad in NOT_LISTS]
    cases += [(f"{name}[1]", {"user_id": "a", name: ["x", bad]}) for name in ("excluded", "allowed") for bad in NOT_IDS]
    cases += [("history[1]", {"history": ["x", bad]}) for bad in NOT_IDS]
    cases += [("beam_widths[1]", {"user_id": "a", "beam_widths": [5, bad]}) for bad in [*NOT_WHOLE, 0]]
    cases += [("user_fields['age']", {"user_id": "a", "user_fields": {"age": bad}}) for bad in (5, "", LONE, None)]
    cases += [(f"user_fields[{bad!a}]", {"user_id": "a", "user_fields": {bad: "5"}}) for bad in (5, "", LONE, None)]
    cases += [("beam_widths", {"user_id": "a", "beam_width": 5, "beam_widths": [5]})]
    cases += [("user_id", {"user_id": bad}) for bad in ["", LONE, *(bad for bad in NOT_TEXT if bad is not None)]]
    return [*cases, ("user_id", {}), ("user_id", {"user_id": "a", "history": ["b"]}), ("user_id", {"history": None})]


async def refused(service: FakeService, field: str, call: Callable[[], Any]) -> UsageError:
    """The mistake that a call is refused for, of the built-in type that it stands for, with nothing sent."""
    with pytest.raises(UsageError) as caught:
        await call()
    mistake = caught.value
    assert isinstance(mistake, (TypeError, ValueError))
    assert (mistake.field, mistake.code) == (field, grpc.StatusCode.INVALID_ARGUMENT)
    assert str(mistake).startswith(f"{field}: ")
    assert len(str(mistake)) < 400
    assert not service.calls
    return mistake


async def test_recommend_refuses_invalid_options() -> None:
    service = FakeService()
    async with connected(service) as client:
        for field, options in mistakes():
            await refused(service, field, lambda: client.recommend(**options))  # noqa: B023 - awaited at once


@pytest.mark.parametrize("name", ["exclude", "top_k", "timeout", "user", "batch_priority"])
async def test_an_option_that_does_not_exist_is_a_type_error(name: str) -> None:
    service = FakeService()
    untyped: Any
    async with connected(service) as untyped:
        with pytest.raises(TypeError, match=name):
            await untyped.recommend("a", **{name: 5})
    with pytest.raises(TypeError, match="positional"):
        await untyped.recommend("a", 10)
    assert not service.calls


async def test_other_calls_refuse_invalid_arguments() -> None:
    service, request = FakeService(), RecommendRequest("a")
    untyped: Any
    async with connected(service) as untyped:
        for bad in NOT_LISTS:
            await refused(service, "events", lambda: untyped.record("bob", bad))  # noqa: B023
            await refused(service, "requests", lambda: anext(untyped.recommend_batch(bad)))  # noqa: B023
        for bad in NOT_IDS:
            await refused(service, "events[1]", lambda: untyped.record("bob", ["172", bad]))  # noqa: B023
            await refused(service, "requests[1]", lambda: anext(untyped.recommend_batch([request, bad])))  # noqa: B023
        for bad in [*NOT_TEXT, "", LONE]:
            for call in (untyped.history, untyped.forget, lambda user: untyped.record(user, ["a"])):
                await refused(service, "user_id", lambda: call(bad))  # noqa: B023
        for bad in [*NOT_TEXT, LONE]:
            await refused(service, "tenant", lambda: untyped.history("a", tenant=bad))  # noqa: B023
            await refused(service, "tenant", lambda: untyped.forget("a", tenant=bad))  # noqa: B023
            await refused(service, "tenant", lambda: untyped.record("a", ["b"], tenant=bad))  # noqa: B023
        for bad in [None, {"user_id": "a"}, "a", request.message, pb.History()]:
            await refused(service, "request", lambda: untyped.send(bad))  # noqa: B023
        for bad in ["Canary", "", 1, True, Mode.STRICT]:
            await refused(service, "track", lambda: untyped.send(request, track=bad))  # noqa: B023
        await refused(service, "requests", lambda: anext(untyped.recommend_batch(request)))
        await refused(service, "events", lambda: untyped.record("bob", None))
        await refused(service, "events", lambda: untyped.record("bob", []))
        await refused(service, "events", lambda: untyped.record("bob", iter(())))
        for field, event in (
            ("item_id", Event("")),
            ("item_id", Event(LONE)),
            ("type", Event("a", type=None)),  # type: ignore[arg-type]
            ("event_id", Event("a", event_id=5)),  # type: ignore[arg-type]
            ("recommendation_id", Event("a", recommendation_id=None)),  # type: ignore[arg-type]
            ("weight", Event("a", weight=math.nan)),
            ("time", Event("a", time=datetime(2026, 1, 1))),  # noqa: DTZ001
            ("time", Event("a", time=1_700_000_000)),  # type: ignore[arg-type]
        ):
            await refused(service, f"events[0].{field}", lambda: untyped.record("bob", [event]))  # noqa: B023
        for bad in [*NOT_NUMBERS, 0, -1, 1e9]:
            if bad is not None:
                await refused(service, "timeout_seconds", lambda: untyped.info(timeout_seconds=bad))  # noqa: B023


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *(("address", bad) for bad in [*NOT_TEXT, "", LONE, "nowhere", "a:0", "a b:1", "ipv4:zz", "dns:"]),
        *(("timeout_seconds", bad) for bad in [*NOT_NUMBERS, 0, -1, 0.0, 1e9]),
        *(("token", bad) for bad in ["", "secret\n", "sec ret", "secrét", LONE, b"secret", 5, ["secret"]]),
        *(("tls", bad) for bad in [True, "ca.pem", ("ca.pem",)]),
        *(("retries", bad) for bad in ["5", 5.0, True, None, -1, 101]),
    ],
)
async def test_client_refuses_invalid_settings(field: str, bad: Any) -> None:
    name = field.partition(".")[0]
    with pytest.raises(UsageError) as caught:
        AsyncClient(**{"address": "127.0.0.1:1", name: bad})
    assert caught.value.field == field
    assert "sec" not in str(caught.value).replace("seconds", ""), "a token is a secret"


@pytest.mark.parametrize(
    ("field", "settings"),
    [("tls", {"key": "key.pem"}), ("tls.ca", {"ca": 5}), ("tls.server_name", {"server_name": None})],
)
def test_tls_settings_that_cannot_be_are_refused(field: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        Tls(**settings)
    assert caught.value.field == field


def test_missing_certificates_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "ca.pem"
    with pytest.raises(CertificateError, match=re.escape(f"tls: {missing}: No such file")) as caught:
        AsyncClient("127.0.0.1:1", tls=Tls(ca=missing))
    assert isinstance(caught.value, RecommenderError)


async def test_token_of_a_function_is_checked_at_each_call() -> None:
    tokens = iter(["fine", "broken\n"])
    service = FakeService()
    async with connected(service, token=lambda: next(tokens)) as client:
        await client.info()
        service.calls.clear()
        await refused(service, "token", client.info)


async def test_valid_arguments_are_sent_unchanged() -> None:
    """numpy's numbers, any iterable of ids, modes as text, ids that repeat, None for an option that is not wanted."""
    service = FakeService()
    async with connected(service) as client:
        await client.recommend(
            history=(item for item in ("a", "é漢", "a")),
            k=np.int64(5),  # type: ignore[arg-type]
            mode="exact-sampling",
            temperature=np.float32(0.5),  # type: ignore[arg-type]
            seed=2**63 - 1,
            excluded={"b"},
            allowed=np.array(["c", "c"]),
            exclude_seen=np.bool_(True),  # type: ignore[arg-type]
            items_per_path=np.int64(2),  # type: ignore[arg-type]
        )
        await client.recommend("a", history=None, excluded=None, allowed=None, temperature=None, seed=None)
        await client.record("bob", iter(["172", "172"]))
        results = [one async for one in client.recommend_batch(RecommendRequest(user) for user in ("a", "b"))]
    assert service.calls[:2] == [
        pb.RecommendRequest(
            history=pb.History(item_ids=["a", "é漢", "a"]),
            k=5,
            mode=pb.MODE_EXACT_SAMPLING,
            temperature=0.5,
            seed=2**63 - 1,
            excluded_item_ids=["b"],
            allowed_item_ids=["c", "c"],
            exclude_seen=True,
            items_per_path=2,
        ),
        pb.RecommendRequest(user_id="a", k=10, mode=pb.MODE_STRICT),
    ]
    assert [event.item_id for event in service.calls[2].events] == ["172", "172"]
    assert len(results) == 2


def outcome(options: dict[str, Any]) -> tuple[pb.RecommendRequest | None, str]:
    """The request, or the field that it is refused for."""
    try:
        return RecommendRequest(**options).message, ""
    except UsageError as mistake:
        return None, mistake.field


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


OPTIONS = list(inspect.signature(RecommendRequest).parameters)


@given(st.dictionaries(st.sampled_from(OPTIONS), anything, max_size=4))
def test_request_of_arbitrary_options_is_complete_or_refused(options: dict[str, Any]) -> None:
    """Each option of a request is either given or has its default."""
    made, mistake = outcome(options)
    if made is None:
        assert mistake.partition("[")[0] in {*options, "user_id"}
    else:
        assert made.k == options.get("k", 10)
        assert list(made.excluded_item_ids) == list(options.get("excluded") or [])
        assert list(made.history.item_ids) == list(options.get("history") or [])
        assert made.ByteSize()


async def _first(client: AsyncClient) -> Any:
    return await anext(client.recommend_batch([]))


async def test_closed_client_raises_a_state_error() -> None:
    async with connected(FakeService()) as client:
        await client.close()
        await client.close()
        for call in (client.info, lambda: client.record("a", ["b"]), lambda: _first(client)):
            with pytest.raises(ClientStateError, match="closed") as caught:
                await call()
            assert isinstance(caught.value, RuntimeError)
            assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(ClientStateError, match="closed"):
            await client.__aenter__()


async def test_call_fails_when_its_client_closes_and_is_cancelled_when_its_task_is() -> None:
    """gRPC cancels both in the same way; a caller that is told of a cancellation of its own would end."""
    service = FakeService(delay=60.0)
    for end in ("close", "cancel"):
        async with connected(service) as client:
            task = asyncio.create_task(client.recommend("a"))
            await service.reached.wait()
            service.reached.clear()
            if end == "close":
                await client.close()
                with pytest.raises(CallError, match="closed during the call") as caught:
                    await task
                assert caught.value.code is grpc.StatusCode.CANCELLED
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task


def test_the_exception_tree_is_complete() -> None:
    """The drawing in the module's docstring names every exception of the module, with its built-in base."""
    drawn = set(re.findall(r"\b([A-Z]\w+Error)\b(?=  )", errors.__doc__ or ""))
    found = inspect.getmembers(errors, inspect.isclass)
    own = {name for name, kind in found if kind.__module__ == errors.__name__ and issubclass(kind, Exception)}
    assert drawn == own
    assert all(issubclass(getattr(errors, name), RecommenderError) for name in own)
    assert issubclass(ArgumentTypeError, TypeError)
    assert issubclass(ArgumentValueError, ValueError)
