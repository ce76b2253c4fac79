"""Lines of text files and their parts."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.errors import LineError

_BLANKS = " \t"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is not blank, without its end.

    A line ends with a line feed, or with a carriage return and a line feed. Other Unicode line ends are text. A byte order
    mark at the beginning is skipped. Blank lines hold spaces and tabs only; they are counted. Raises LineError, naming file and
    line, when the file cannot be read or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                text = _decoded(content, path, number).removesuffix("\n").removesuffix("\r")
                if text.strip(_BLANKS):
                    yield number, text
    except OSError as error:
        raise LineError(f"{path}: {error.strerror}") from error


def line_problem(text: str) -> str | None:
    """Return the reason why `read_lines` cannot read this text back from a line of its own; None if it can."""
    if "\n" in text or text.endswith("\r"):
        return "holds a line end, so no line of a file can name it"
    if not text.strip(_BLANKS):
        return "is blank, so no line of a file can name it"
    if text.startswith("\ufeff"):
        return "begins with a byte order mark, which is lost on the first line of a file"
    return None


def words(line: str) -> list[str]:
    """Split a line at spaces and tabs. Other Unicode spaces may be part of an id."""
    return [word for word in line.replace("\t", " ").split(" ") if word]


def parse_json(text: str) -> Any:
    """Parse a JSON value. Raises ValueError also for a repeated key, as one of its values would be lost silently.

    Python's parser accepts NaN and Infinity, which JSON does not have: they are refused too.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("lists and objects are nested too deeply") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} occurs more than once")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value; a value that is not known is null")


def _decoded(content: bytes, path: Path, number: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise LineError(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start + 1} of the line") from error
