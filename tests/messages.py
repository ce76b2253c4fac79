"""Messages to the model services: good ones, and mutations that make them invalid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from atspeed.engine.search.trie import ROOT
from atspeed.rpc import wire
from atspeed.v1 import target_pb2, types_pb2

Change = Callable[[Any], object]


def array(values: Any, dtype: str) -> types_pb2.Array:
    """Return the array as a message."""
    return wire.to_array(np.asarray(values, dtype=dtype))


def first_message(version: str, nodes: Sequence[int] = (ROOT,)) -> target_pb2.EvaluateRequest:
    """A good first message to a target that serves this model version."""
    start = target_pb2.EvaluateStart(model_version=version, prompt=array([1, 3, 4, 5, 6, 2], "int64"))
    return target_pb2.EvaluateRequest(start=start, nodes=array(nodes, "int32"))


def next_message(nodes: Sequence[int]) -> target_pb2.EvaluateRequest:
    """More nodes, on the same stream."""
    return target_pb2.EvaluateRequest(nodes=array(nodes, "int32"))


def put(path: str, value: Any) -> Change:
    """A change that sets a field, a message or a scalar."""
    *parents, name = path.split(".")

    def change(message: Any) -> None:
        for parent in parents:
            message = getattr(message, parent)
        if hasattr(value, "DESCRIPTOR"):
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)

    return change


def malformed(field: str, dtype: str, wrong_dtype: str) -> list[tuple[str, Change]]:
    """Every way in which an Array can be none."""
    good = np.ones(4, dtype=dtype).tobytes()
    data_type = array([], dtype).dtype
    arrays = {
        "dtype": array([1], wrong_dtype),
        "no dtype": types_pb2.Array(shape=[4], data=good),
        "unknown dtype": types_pb2.Array(dtype=99, shape=[4], data=good),  # type: ignore[arg-type]
        "scalar": types_pb2.Array(dtype=data_type, data=good[: len(good) // 4]),
        "two axes": types_pb2.Array(dtype=data_type, shape=[2, 2], data=good),
        "negative": types_pb2.Array(dtype=data_type, shape=[-4], data=good),
        "too few bytes": types_pb2.Array(dtype=data_type, shape=[4], data=good[:-1]),
        "too many bytes": types_pb2.Array(dtype=data_type, shape=[4], data=good + b"\0"),
        "huge": types_pb2.Array(dtype=data_type, shape=[2**62], data=good),
    }
    return [(f"{field}: {name}", put(field, value)) for name, value in arrays.items()]
