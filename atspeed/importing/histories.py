"""Reads histories in the formats that projects publish.

| file    | content                                                                  | project                        |
|---------|--------------------------------------------------------------------------|--------------------------------|
| *.csv   | a column history_item_id with lists                                      | MiniOneRec                     |
| *.jsonl | {"user": ..., "items": [...]} or {"history": [...], ...} per line        |                                |
| *.json  | {"user": [items], ...}                                                   | LC-Rec, inter.json             |
| other   | a user and items per line                                                | this project                   |
"""

from __future__ import annotations

import ast
import csv
import io
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.files.lines import parse_json, read_lines, words
from atspeed.importing.errors import ImportingError
from atspeed.importing.index import Index, read_json

History = tuple[str, ...]
_COLUMN, _TARGET_COLUMN = "history_item_id", "item_id"
csv.field_size_limit(1 << 24)  # titles of long histories exceed the default of 128 KiB


def read_histories(path: Path, index: Index) -> dict[str, History]:
    """Read the histories of items of an index; see `histories_of`."""
    return histories_of(path, index.rows, index.path)


def histories_of(path: Path, known: Container[str], source: Path, *, with_targets: bool = False) -> dict[str, History]:
    """Read the histories, by user or line, oldest item first. Empty ones are left out.

    Args:
        path: the file.
        known: the ids of all items.
        source: what holds these items, for messages.
        with_targets: whether the item that follows a history, in a field of its own, is its newest item. Training wants it.

    Raises ImportingError naming the line, or the user, and an unknown item.
    """
    found: dict[str, History] = {}
    for place, items in _rows(path, with_targets):
        history = tuple(_item(path, place, item) for item in items)
        unknown = next((item for item in history if item not in known), None)
        if unknown is not None:
            raise ImportingError(f"{path}: {place}: item {shown(unknown)} is not in {source}")
        if history:
            found[place] = history
    if not found:
        raise ImportingError(f"{path}: holds no history with an item")
    return found


def _rows(path: Path, with_targets: bool) -> Iterator[tuple[str, list[Any]]]:
    match path.suffix.lower():
        case ".csv":
            yield from _csv_rows(path, with_targets)
        case ".json":
            yield from _users(path, read_json(path))
        case ".jsonl":
            for number, line in read_lines(path):
                yield f"line {number}", _items_of(path, number, line, with_targets)
        case _:
            for number, line in read_lines(path):
                yield f"line {number}", list(words(line)[1:])


def _csv_rows(path: Path, with_targets: bool) -> Iterator[tuple[str, list[Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ImportingError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        if _COLUMN not in (rows.fieldnames or ()):
            raise ImportingError(f"{path}: no column {_COLUMN}")
        yield from _lists(path, rows, with_targets)
    except csv.Error as error:
        raise ImportingError(f"{path}: {error}") from error


def _lists(path: Path, rows: Iterable[dict[str, Any]], with_targets: bool) -> Iterator[tuple[str, list[Any]]]:
    for number, row in enumerate(rows, start=1):
        try:
            items = ast.literal_eval(row[_COLUMN])
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two: nested too deeply
            items = None
        if not isinstance(items, list):
            raise ImportingError(f"{path}: row {number}: {_COLUMN} is not a list")
        yield f"row {number}", [*items, row[_TARGET_COLUMN]] if with_targets and row.get(_TARGET_COLUMN) else items


def _users(path: Path, content: Any) -> Iterator[tuple[str, list[Any]]]:
    if not isinstance(content, dict):
        raise ImportingError(f"{path}: not an object with a user's items per key")
    for user, items in content.items():
        if not isinstance(items, list):
            raise ImportingError(f"{path}: user {shown(user)}: not a list of items")
        yield f"user {user}", items


def _items_of(path: Path, number: int, line: str, with_targets: bool) -> list[Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ImportingError(f"{path}: line {number}: {error}") from error
    items = row.get("items", row.get("history")) if isinstance(row, dict) else None
    if not isinstance(items, list):
        raise ImportingError(f"{path}: line {number}: no list under items or history")
    return [*items, row["target"]] if with_targets and row.get("target") is not None else items


def _item(path: Path, place: str, item: Any) -> str:
    if isinstance(item, str) or (isinstance(item, int) and not isinstance(item, bool)):
        return str(item)
    raise ImportingError(f"{path}: {place}: {item!r} is not an item")
