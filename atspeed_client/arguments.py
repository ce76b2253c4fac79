"""Checks of the client's arguments, before anything is sent.

Each check returns the value as the request holds it, and raises ArgumentTypeError or ArgumentValueError naming the argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from io import IOBase
from numbers import Real
from operator import index
from os import PathLike
from typing import Any, TypeVar

from atspeed_client.errors import ArgumentTypeError, ArgumentValueError

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
_Choice = TypeVar("_Choice", bound=StrEnum)
_Message = TypeVar("_Message")


def text(field: str, value: Any, *, required: bool = True) -> str:
    """Check text that a message can carry."""
    if not isinstance(value, str):
        raise ArgumentTypeError(field, f"must be text (str), got {_kind(value)}")
    if required and not value:
        raise ArgumentValueError(field, "must not be empty")
    if not _is_utf8(value):
        raise ArgumentValueError(field, f"{value!a} cannot be written as UTF-8")
    return value


def item_ids(field: str, values: Any, *, ordered: bool = True, required: bool = False) -> list[str]:
    """Check item ids of any iterable and keep their order. required: at least one."""
    found = listed(field, values, "item ids", ordered=ordered)
    if required and not found:
        raise ArgumentValueError(field, "must hold at least one item id")
    # A quick check of all ids first: building a name for each of ten thousand would cost more than the check.
    if not all(type(value) is str and value and value.isascii() for value in found):
        return [text(f"{field}[{place}]", value) for place, value in enumerate(found)]
    return found


def texts_by_name(field: str, values: Any) -> dict[str, str]:
    """Check a mapping of texts by name."""
    if not isinstance(values, Mapping):
        raise ArgumentTypeError(field, f"must be a mapping of texts by name, got {_kind(values)}")
    return {text(f"{field}[{name!a}]", name): text(f"{field}[{name!a}]", value) for name, value in values.items()}


def messages(field: str, values: Any, kind: type[_Message]) -> list[_Message]:
    """Check messages of one kind, of any iterable."""
    found = listed(field, values, f"{kind.__name__} messages", ordered=True)
    return [message(f"{field}[{place}]", value, kind) for place, value in enumerate(found)]


def message(field: str, value: Any, kind: type[_Message]) -> _Message:
    """Check a message of one kind."""
    if not isinstance(value, kind):
        raise ArgumentTypeError(field, f"must be a {kind.__name__}, got {_kind(value)}")
    return value


def path(field: str, value: Any) -> str | PathLike[str]:
    """Check the path of a file."""
    if not isinstance(value, (str, PathLike)):
        raise ArgumentTypeError(field, f"must be a path, got {_kind(value)}")
    return value


def whole(field: str, value: Any, low: int, high: int) -> int:
    """Check a whole number between low and high, of Python or numpy."""
    if _is_bool(value):
        raise ArgumentTypeError(field, "must be a whole number (int), got bool")
    try:
        number = index(value)
    except TypeError:
        raise ArgumentTypeError(field, f"must be a whole number (int), got {_kind(value)}") from None
    if not low <= number <= high:
        raise ArgumentValueError(field, f"must be between {low} and {high}, got {_shown(number)}")
    return number


def wholes(field: str, values: Any, low: int, high: int) -> list[int]:
    """Check whole numbers between low and high, of any iterable, and keep their order."""
    found = listed(field, values, "whole numbers", ordered=True)
    return [whole(f"{field}[{place}]", value, low, high) for place, value in enumerate(found)]


def number(
    field: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> float:
    """Check a finite number, of Python or numpy."""
    if _is_bool(value) or not isinstance(value, Real):
        raise ArgumentTypeError(field, f"must be a number, got {_kind(value)}")
    try:
        converted = float(value)
    except OverflowError:
        raise ArgumentValueError(field, "must be finite") from None
    if not math.isfinite(converted):
        raise ArgumentValueError(field, f"must be finite, got {converted}")
    if converted <= above or not least <= converted <= most:
        raise ArgumentValueError(field, f"must be {_range(above, least, most)}, got {converted}")
    return converted


def flag(field: str, value: Any) -> bool:
    """Check a truth value."""
    if not _is_bool(value):
        raise ArgumentTypeError(field, f"must be True or False, got {_kind(value)}")
    return bool(value)


def choice(field: str, value: Any, choices: type[_Choice]) -> _Choice:
    """Check a member of an enum, or its value as text."""
    if not isinstance(value, str):
        raise ArgumentTypeError(field, f"must be a {choices.__name__} or its name, got {_kind(value)}")
    if value not in set(choices) or value == "unknown":
        names = ", ".join(one for one in choices if one != "unknown")
        raise ArgumentValueError(field, f"must be one of {names}, got {value!a}")
    return choices(value)


def token(field: str, value: Any) -> str:
    """Check a bearer token that metadata can carry. No message quotes it."""
    if not isinstance(value, str):
        raise ArgumentTypeError(field, f"must be text (str), got {_kind(value)}")
    if not (value and value.isascii() and value.isprintable() and " " not in value):
        raise ArgumentValueError(
            field, "must be printable ASCII without spaces and not empty; does it end with a line break?"
        )
    return value


def listed(field: str, values: Any, what: str, *, ordered: bool = True) -> list[Any]:
    """Check that values are an iterable of `what`, and not one of them."""
    if isinstance(values, (str, bytes, bytearray, memoryview)):
        raise ArgumentTypeError(field, f"must be a list of {what}, got one {_kind(values)}; put it into a list")
    if isinstance(values, (Mapping, IOBase)) or (ordered and isinstance(values, (set, frozenset))):
        raise ArgumentTypeError(field, f"must be a list of {what}, got {_kind(values)}")
    try:
        iterator = iter(values)
    except TypeError:
        raise ArgumentTypeError(field, f"must be a list of {what}, got {_kind(values)}") from None
    return list(iterator)


def _is_bool(value: Any) -> bool:
    """Return whether a value is a bool, of Python or of numpy, which the client does not import."""
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in {"bool", "bool_"})


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(number: int) -> str:
    """Shorten a number for a message: Python refuses to write one of more than 4300 digits."""
    return str(number) if number.bit_length() <= 128 else f"a number of {number.bit_length()} bits"


def _range(above: float, least: float, most: float) -> str:
    bounds = [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"at least {least:g}"] if least > -math.inf else []
    bounds += [f"at most {most:g}"] if most < math.inf else []
    return " and ".join(bounds)
