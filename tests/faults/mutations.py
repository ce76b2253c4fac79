"""Valid requests, and what becomes of them: in their bytes, or in a field that is set to an extreme value."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

_INTEGERS = (0, 1, -1, 2, 127, 128, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
_FLOATS = (0.0, -0.0, 1e-300, -1.0, 1e300, math.inf, -math.inf, math.nan)
_TEXTS = ("", "\x00", "item-1", "é" * 100, "a" * 257, "a" * 5_000, "\U0010ffff", "../../etc", "%s%n", "1\n2")
_WHOLE = {Field.TYPE_INT32, Field.TYPE_INT64, Field.TYPE_UINT32, Field.TYPE_UINT64, Field.TYPE_ENUM}
_WIRE_PIECES = (
    b"\xff" * 10,
    b"\x00",
    b"\x80",
    b"\x7f",
    b"\x0a\xff\xff\xff\xff\x0f",
    b"\x0b" * 40,
    b"\x0c",
    b"\xc3\x28",
)


def mutated(seeds: Sequence[Message], source: random.Random) -> bytes:
    """A request made from one of the valid ones."""
    seed = source.choice(seeds)
    if seed.DESCRIPTOR.fields and source.random() < 0.5:
        message = type(seed)()
        message.CopyFrom(seed)
        for _ in range(source.randint(1, 3)):
            _mutate_field(message, source)
        return message.SerializeToString()
    data = bytearray(seed.SerializeToString())
    for _ in range(source.randint(1, 4)):
        _mutate_bytes(data, seeds, source)
    return bytes(data)


def _mutate_bytes(data: bytearray, seeds: Sequence[Message], source: random.Random) -> None:
    at = source.randint(0, len(data))
    match source.randrange(6):
        case 0 if data:
            data[at % len(data)] ^= 1 << source.randrange(8)
        case 1:
            del data[at : at + source.randint(1, 8)]
        case 2:
            data[at:at] = source.choice(_WIRE_PIECES)
        case 3:
            del data[at:]
        case 4:
            data[at:at] = source.randbytes(source.randint(1, 16))
        case _:
            other = source.choice(seeds).SerializeToString()
            data[at:] = other[source.randint(0, len(other)) :]


def _mutate_field(message: Message, source: random.Random) -> None:
    """Some field of the message, or of one within it: another value, none, or more of them."""
    while True:
        fields: list[Any] = list(message.DESCRIPTOR.fields)
        field: Field = source.choice(fields)
        if field.message_type is None or _is_map(field) or not source.randrange(4):
            break
        inner: Any = getattr(message, field.name)
        if field.is_repeated and not len(inner):
            inner.add()
        message = source.choice(inner) if field.is_repeated else inner
        if not message.DESCRIPTOR.fields:
            return
    if not source.randrange(4):
        message.ClearField(field.name)
    elif field.message_type is not None and _is_map(field):
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        for _ in range(source.choice((1, 2, 30, 600))):
            getattr(message, field.name)[_value(key, source)] = _value(value, source)
    elif field.is_repeated:
        _more(getattr(message, field.name), field, source)
    elif field.message_type is not None:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _value(field, source))


def _is_map(field: Field) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _more(values: Any, field: Field, source: random.Random) -> None:
    for _ in range(source.choice((1, 2, 30, 600))):
        if field.message_type is None:
            values.append(_value(field, source))
        else:
            values.add()


def _value(field: Field, source: random.Random) -> Any:
    if field.type in _WHOLE:
        low, high = {
            Field.TYPE_INT64: (-(2**63), 2**63 - 1),
            Field.TYPE_UINT64: (0, 2**64 - 1),
            Field.TYPE_UINT32: (0, 2**32 - 1),
        }.get(field.type, (-(2**31), 2**31 - 1))
        return source.choice([value for value in _INTEGERS if low <= value <= high])
    if field.type in {Field.TYPE_DOUBLE, Field.TYPE_FLOAT}:
        return source.choice(_FLOATS)
    if field.type == Field.TYPE_BYTES:
        return source.randbytes(source.choice((0, 1, 3, 8, 64, 1000)))
    return source.choice(_TEXTS) if field.type == Field.TYPE_STRING else bool(source.randrange(2))
