"""The tree of exceptions, and the gRPC status of each."""

from __future__ import annotations

import inspect
import re
from typing import Any

import grpc
import pytest

from atspeed import errors
from atspeed.engine import errors as engine_errors
from atspeed.errors import InvalidArgumentError, ServiceError
from atspeed.rpc import grpc_status
from atspeed.rpc.grpc_status import MAX_DETAILS, call_status


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
        assert status == grpc_status.CallStatus(grpc.StatusCode.INVALID_ARGUMENT, "private")
    elif kind is engine_errors.OverloadedError:
        assert status == grpc_status.CallStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, "private")
    elif kind is engine_errors.DeviceError:
        assert status == grpc_status.CallStatus(grpc.StatusCode.UNAVAILABLE, "the model's device failed")
    else:
        assert status.code is grpc.StatusCode.INTERNAL
        assert re.fullmatch("internal error [0-9a-f]{12}", status.details)


def test_details_stay_small_enough_for_a_trailer() -> None:
    assert len(call_status(InvalidArgumentError("item_ids", "é" * 10_000)).details) == MAX_DETAILS
