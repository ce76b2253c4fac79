"""Small ONNX models as bytes, written without the package onnx.

Serving does not need it. The field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

ELEMENT_TYPES = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
"""The ONNX element type of each number format."""
_OPSET, _IR_VERSION = 18, 9
_INT = 2  # the type of an integer attribute


@dataclass(frozen=True)
class Node:
    """A node of ONNX's own operators; its attributes are integers."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name, its number format, and a size or a name for each axis."""

    name: str
    dtype: str
    axes: tuple[int | str, ...]


def model_bytes(
    nodes: Sequence[Node],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    constants: Mapping[str, npt.NDArray[Any]] | None = None,
) -> bytes:
    """Return a serialised ModelProto. constants: small arrays by name."""
    graph = b"".join(
        [
            *(_field(1, _node(node)) for node in nodes),
            _field(2, b"graph"),
            *(_field(5, _constant(name, array)) for name, array in (constants or {}).items()),
            *(_field(11, _value_info(tensor)) for tensor in inputs),
            *(_field(12, _value_info(tensor)) for tensor in outputs),
        ]
    )
    return _number(1, _IR_VERSION) + _field(7, graph) + _field(8, _number(2, _OPSET))


def _node(node: Node) -> bytes:
    names = [_field(1, name.encode()) for name in node.inputs] + [_field(2, name.encode()) for name in node.outputs]
    attributes = [_field(5, _integer(*attribute)) for attribute in node.attributes.items()]
    return b"".join([*names, _field(3, node.outputs[0].encode()), _field(4, node.operator.encode()), *attributes])


def _integer(name: str, value: int) -> bytes:
    return _field(1, name.encode()) + _number(3, value) + _number(20, _INT)


def _constant(name: str, array: npt.NDArray[Any]) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    kind = _number(2, ELEMENT_TYPES[array.dtype.name])
    return dims + kind + _field(8, name.encode()) + _field(9, np.ascontiguousarray(array).tobytes())


def _value_info(tensor: Tensor) -> bytes:
    axes = (_number(1, axis) if isinstance(axis, int) else _field(2, axis.encode()) for axis in tensor.axes)
    shape = b"".join(_field(1, axis) for axis in axes)
    tensor_type = _number(1, ELEMENT_TYPES[tensor.dtype]) + _field(2, shape)
    return _field(1, tensor.name.encode()) + _field(2, _field(1, tensor_type))


def _field(number: int, content: bytes) -> bytes:
    """Return a field of bytes: tag, length, content."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    """Return a field of a whole number: tag, value."""
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
