"""Reads which items to serve, and how popular they are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.files.lines import parse_json, read_lines, words
from atspeed.importing.errors import ImportingError
from atspeed.importing.index import Index, Numbers, read_json

Items = dict[str, dict[str, Any]]
"""The fields of each item, by id."""


def read_items(path: Path) -> Items:
    """Read an item file: a JSON object by item, JSON lines with `id` or `item_id`, or an id per line."""
    if path.suffix.lower() == ".json":
        content = read_json(path)
        if not isinstance(content, dict):
            raise ImportingError(f"{path}: not an object with an item per key")
        return {item: fields if isinstance(fields, dict) else {} for item, fields in content.items()}
    items: Items = {}
    for number, line in read_lines(path):
        fields = _json_line(path, number, line) if path.suffix.lower() == ".jsonl" else {"id": line.strip()}
        item = fields.get("id", fields.get("item_id"))
        if item is None or str(item) in items:
            problem = "no id or item_id" if item is None else f"item {shown(str(item))} occurs more than once"
            raise ImportingError(f"{path}:{number}: {problem}")
        items[str(item)] = fields
    return items


def served_rows(index: Index, items: Items, path: Path | None) -> Int64:
    """Return the rows of the items to serve: all without a file. Raises ImportingError naming an item without a path."""
    if path is None:
        return np.arange(len(index.ids))
    rows = index.rows
    if (missing := next((item for item in items if item not in rows), None)) is not None:
        raise ImportingError(f"{path}: item {shown(missing)} has no path in {index.path}")
    if not items:
        raise ImportingError(f"{path}: holds no item")
    return np.array([rows[item] for item in items], dtype=np.int64)


def item_fields(
    names: Sequence[str], titles: Mapping[str, str], items: Items, path: Path | None, needed: Iterable[str]
) -> dict[str, dict[str, str]]:
    """Return the fields of items that a prompt holds, by item id.

    Args:
        names: the fields.
        titles: those of the index, if it has any.
        items: the fields of the item file.
        path: that file, if there is one.
        needed: the items.

    Raises ImportingError naming an item that lacks a field.
    """
    if names and not items and not titles:
        raise ImportingError(f"prompt: {{{names[0]}}} is a field of items; --items gives a file that has it")
    found: dict[str, dict[str, str]] = {}
    for item in needed if names else ():
        fields = ({"title": titles[item]} if item in titles else {}) | items.get(item, {})
        for name in names:
            if not isinstance(fields.get(name), str | int) or isinstance(fields[name], bool):
                raise ImportingError(
                    f"{path or 'index'}: item {shown(item)}: no text or whole number {name}, which the prompt holds"
                )
        found[item] = {name: str(fields[name]) for name in names}
    return found


def popularity_rank(given: str, index: Index, items: Items, rows: Int64) -> Int64:
    """Return the rank of each served row in falling popularity, from 0; equally popular items share one.

    given: a file of an item and a number per line, or a column of the items or of the index. An item that the file lacks
    has popularity 0.
    """
    ids = [index.ids[row] for row in rows.tolist()]
    path = Path(given)
    if path.is_file():
        counts = _counts(path)
        popularity = np.array([counts.get(item, 0.0) for item in ids])
        if counts.keys().isdisjoint(ids):
            raise ImportingError(f"{path}: holds no item that is served")
    else:
        popularity = index.columns[given][rows] if given in index.columns else _column(given, ids, items)
    rank: Int64 = np.unique(-popularity, return_inverse=True)[1].astype(np.int64)
    return rank


def _column(name: str, ids: list[str], items: Items) -> Numbers:
    numbers = [items.get(item, {}).get(name) for item in ids]
    lacking = next((item for item, number in zip(ids, numbers, strict=True) if not _is_number(number)), None)
    if lacking is not None:
        raise ImportingError(
            f"--popularity {name}: no file and no column of the index, and item {shown(lacking)} has no such number"
        )
    try:
        return np.array(numbers, dtype=np.float64)
    except OverflowError as error:
        raise ImportingError(f"--popularity {name}: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value))


def _counts(path: Path) -> dict[str, float]:
    counts: dict[str, float] = {}
    for number, line in read_lines(path):
        parts = words(line)
        try:
            item, count = parts[0], float(parts[1])
        except (ValueError, IndexError):
            raise ImportingError(f"{path}:{number}: not an item and a number") from None
        if len(parts) != 2 or not _is_number(count):
            raise ImportingError(f"{path}:{number}: not an item and a number")
        if item in counts:
            raise ImportingError(f"{path}:{number}: item {shown(item)} occurs more than once")
        counts[item] = count
    return counts


def _json_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = parse_json(line)
    except (ValueError, json.JSONDecodeError) as error:
        raise ImportingError(f"{path}:{number}: {error}") from error
    if not isinstance(found, dict):
        raise ImportingError(f"{path}:{number}: not a JSON object")
    return found
