"""ONNX models as bytes, without the package onnx: writes small ones, finds weights.

Serving does not need it. The field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True)
class StoredWeight:
    """The place of a weight in a file beside the graph.

    Attributes:
        name: its name in the graph.
        shape: its sizes.
        element_type: the number of its format; see ELEMENT_TYPES.
        offset: its first byte in the file.
        length: the number of its bytes.
    """

    name: str
    shape: tuple[int, ...]
    element_type: int
    offset: int
    length: int


def stored_weights(model: bytes) -> list[StoredWeight]:
    """Return the places of a serialised ModelProto's external weights, in the order of the graph.

    Raises ValueError for bytes that are no such message.
    """
    graphs = [content for number, content in _fields(model) if number == 7 and isinstance(content, bytes)]
    tensors = [content for graph in graphs for number, content in _fields(graph) if number == 5]
    return [weight for tensor in tensors if isinstance(tensor, bytes) and (weight := _stored_weight(tensor))]


def _stored_weight(tensor: bytes) -> StoredWeight | None:
    """Return the place of a TensorProto's values; None if it holds them itself."""
    shape, name, kind, place = [], "", 0, dict[str, str]()
    for number, content in _fields(tensor):
        match number, content:
            case 1, int():
                shape.append(content)
            case 1, bytes():  # packed
                shape += _varints(content)
            case 2, int():
                kind = content
            case 8, bytes():
                name = content.decode()
            case 13, bytes():
                key, value = (part.decode() for _, part in _fields(content) if isinstance(part, bytes))
                place[key] = value
    if "location" not in place:
        return None
    return StoredWeight(name, tuple(shape), kind, int(place.get("offset", 0)), int(place["length"]))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message: a number for varints, bytes for everything else."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _read_varint(message, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _read_varint(message, at)
        else:
            length = {1: 8, 5: 4}.get(kind, len(message))
        if at + length > len(message):
            raise ValueError("not a serialised ONNX model")
        yield number, message[at : at + length]
        at += length


def _varints(packed: bytes) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _read_varint(packed, at)
        yield value


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a varint and the place behind it."""
    value, shift = 0, 0
    while at < len(message):
        byte = message[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if not byte & 0x80:
            return value, at
    raise ValueError("not a serialised ONNX model")
