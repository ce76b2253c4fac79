"""JSON files that any reader of JSON takes: written in one step, and never with NaN or an infinity, which JSON does not have."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from atspeed.engine.files.atomic_write import replace_text


def write_json(path: Path, content: object) -> None:
    """Write a file in one step, so that a kill never leaves half of it, and its folder where there is none.

    Raises ValueError naming the first value that is no number; nothing is written then.
    """
    if bad := next(_no_numbers(content, ""), None):
        raise ValueError(f"{path}: {bad}")
    replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def finite(measures: Mapping[str, float]) -> dict[str, float]:
    """The measures that are numbers; the others are left out."""
    return {name: value for name, value in measures.items() if math.isfinite(value)}


def with_nulls(content: object) -> object:
    """The same JSON value with null in place of NaN and infinities."""
    match content:
        case float():
            return content if math.isfinite(content) else None
        case Mapping():
            return {key: with_nulls(value) for key, value in content.items()}
        case list() | tuple():
            return [with_nulls(value) for value in content]
        case _:
            return content


def _no_numbers(content: object, place: str) -> Iterator[str]:
    """`place: nan` for each value that JSON cannot hold."""
    match content:
        case float() if not math.isfinite(content):
            yield f"{place}: {content} is no number"
        case Mapping():
            for key, value in content.items():
                yield from _no_numbers(value, f"{place}.{key}".lstrip("."))
        case list() | tuple():
            for index, value in enumerate(content):
                yield from _no_numbers(value, f"{place}[{index}]")
