"""Files of users and histories, read chunk by chunk.

| file      | content                                                                        |
|-----------|--------------------------------------------------------------------------------|
| *.jsonl   | {"user_id": "alice", "history": ["50", "172"]} per line, oldest item first     |
| *.parquet | columns user_id (string) and history (list of strings); needs pyarrow          |

`history` may be missing where the service stores the users' histories. Where the bundle's prompts hold fields of users,
`user_fields` is an object of names and values; in Parquet it is a struct of strings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from atspeed.batch.errors import BatchError
from atspeed.batch.parquet import read_rows
from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.files.lines import parse_json, read_lines

_HASHED_BYTES = 1 << 20  # read at once; any size does


@dataclass(frozen=True)
class User:
    """A user of the file.

    Attributes:
        history: item ids, oldest first; None for the stored history.
        user_fields: values of the user's fields that the bundle's prompts hold, by name.
    """

    user_id: str
    history: tuple[str, ...] | None
    user_fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """Consecutive users of the file. number: counted from 0 over the whole file."""

    number: int
    users: tuple[User, ...]


def read_chunks(path: Path, size: int) -> Iterator[Chunk]:
    """Yield the users in chunks of `size`, as the file orders them. Raises BatchError or LineError naming file and line."""
    users, number = _users(path), 0
    while chunk := tuple(islice(users, size)):
        yield Chunk(number, chunk)
        number += 1


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file. Raises BatchError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while content := file.read(_HASHED_BYTES):
                digest.update(content)
    except OSError as error:
        raise BatchError(f"{path}: {error.strerror}") from None
    return digest.hexdigest()


def _users(path: Path) -> Iterator[User]:
    rows: Iterable[tuple[int, Any]]
    match path.suffix.lower():
        case ".jsonl":
            place, rows = "line", _json_rows(path)
        case ".parquet":
            place, rows = (
                "row",
                enumerate(read_rows(path, required=("user_id",), optional=("history", "user_fields")), start=1),
            )
        case _:
            raise BatchError(f"{path}: is neither .jsonl nor .parquet")
    for number, row in rows:
        yield parse_user(f"{path}: {place} {number}", row)


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in read_lines(path):
        try:
            yield number, parse_json(line)
        except ValueError as error:
            raise BatchError(f"{path}: line {number}: {error}") from None


def parse_user(place: str, row: Any) -> User:
    """Read a row of users. place: where it stands, for messages. Raises BatchError."""
    if not isinstance(row, dict):
        raise BatchError(f"{place}: is not an object with user_id and history")
    user_id, history = row.get("user_id"), row.get("history")
    if not isinstance(user_id, str) or not user_id:
        raise BatchError(f"{place}: user_id: {shown(str(user_id))} is no id (text)")
    values = _user_fields(place, row.get("user_fields"))
    if history is None:
        return User(user_id, None, values)
    if not isinstance(history, list) or not all(isinstance(item, str) and item for item in history):
        raise BatchError(f"{place}: history: is not a list of item ids (text)")
    return User(user_id, tuple(history), values)


def _user_fields(place: str, given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise BatchError(f"{place}: user_fields: is not an object of names and values (text)")
    values = {name: value for name, value in given.items() if value is not None}  # a struct has every name in every row
    if wrong := next((name for name, value in values.items() if not (name and isinstance(value, str) and value)), None):
        raise BatchError(f"{place}: user_fields.{wrong}: is no text, or empty")
    return values
