"""The tree of exceptions, and the gRPC status of each."""

from __future__ import annotations

import base64
import inspect
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import pytest

from atspeed import errors
from atspeed.engine import errors as engine_errors
from atspeed.errors import InvalidArgumentError, Reason, ServiceError, Violation
from atspeed.rpc import grpc_status
from atspeed.rpc.grpc_status import MAX_DETAILS, call_status
from atspeed.v1 import errors_pb2


def exceptions_of(module: Any) -> dict[str, type[Exception]]:
    found = inspect.getmembers(module, inspect.isclass)
    return {name: kind for name, kind in found if issubclass(kind, Exception) and kind.__module__ == module.__name__}


@pytest.mark.parametrize("module", [errors, engine_errors])
def test_the_tree_of_exceptions_in_the_docstring_is_complete(module: Any) -> None:
    drawn: dict[str, str | None] = {}
    branch: list[str] = []
    for line in (module.__doc__ or "").splitlines():
        if match := re.match(r"(?:    )?((?:\|   )*)(\+-- )?(\w+Error)\b", line):
            depth = len(match[1]) // 4 + bool(match[2])
            drawn[match[3]] = branch[depth - 1] if depth else None
            branch[depth:] = [match[3]]
    defined = exceptions_of(module)
    parents = {name: kind.__bases__[0].__name__ for name, kind in defined.items()}
    assert drawn == {name: parent if parent in defined else None for name, parent in parents.items()}


def test_every_leaf_has_a_status_of_its_own() -> None:
    leaves = [
        kind for kind in exceptions_of(errors).values() if issubclass(kind, ServiceError) and not kind.__subclasses__()
    ]
    codes = [kind.code for kind in leaves]
    assert len(set(codes)) == len(codes)
    assert not {grpc.StatusCode.UNKNOWN, grpc.StatusCode.OK, grpc.StatusCode.INTERNAL} & set(codes)


@pytest.mark.parametrize("kind", exceptions_of(engine_errors).values(), ids=lambda kind: kind.__name__)
def test_engine_errors_have_a_status(kind: type[Exception]) -> None:
    status = call_status(kind("private"))
    if kind in (engine_errors.PromptError, engine_errors.CapacityError):
        assert status == grpc_status.CallStatus(grpc.StatusCode.INVALID_ARGUMENT, "private", Reason.INVALID_REQUEST)
    elif kind is engine_errors.OverloadedError:
        assert status == grpc_status.CallStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, "private", Reason.OVERLOADED)
    elif kind is engine_errors.DeviceError:
        text = "the model's device failed"
        assert status == grpc_status.CallStatus(grpc.StatusCode.UNAVAILABLE, text, Reason.BACKEND_UNAVAILABLE)
    else:
        assert status.code is grpc.StatusCode.INTERNAL
        assert re.fullmatch("internal error [0-9a-f]{12}", status.details)


@pytest.mark.parametrize("letter", ["x", "é", "漢", "🙂"])
def test_a_status_stays_small_enough_for_a_trailer(letter: str) -> None:
    """8 KiB: the percent-encoded message, and the details in base64, whatever the fields hold."""
    more = [Violation(letter * 40, letter * 90) for _ in range(10_000)]
    status = call_status(InvalidArgumentError("item_ids", letter * 10_000, more=more))
    message = len(quote(status.details))
    details = sum(len(base64.b64encode(value)) for _, value in status.trailers if isinstance(value, bytes))
    assert len(status.details.encode()) <= MAX_DETAILS
    assert message + details < 7680


def test_reasons_are_those_of_the_contract() -> None:
    contract = {
        name.removeprefix("ERROR_REASON_")
        for name in errors_pb2.DESCRIPTOR.enum_types_by_name["ErrorReason"].values_by_name
    }
    assert {reason.value for reason in Reason} == contract - {"UNSPECIFIED"}


def test_every_error_has_a_reason_of_its_own_status() -> None:
    """The contract's comment of each reason begins with its status."""
    source = (Path(__file__).parents[3] / "protos/atspeed/v1/errors.proto").read_text(encoding="utf-8")
    found = re.findall(r"// ([A-Z_]+): .*\n(?:  // .*\n)*  ERROR_REASON_(\w+) =", source)
    codes = {reason: code for code, reason in found}
    for kind in exceptions_of(errors).values():
        if issubclass(kind, ServiceError) and kind.code != "UNKNOWN":
            assert codes[kind.reason] == kind.code
