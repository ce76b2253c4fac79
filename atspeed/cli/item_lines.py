"""Lines of files of items: one JSON object each; errors name line and field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from atspeed.cli.options import CommandError
from atspeed.engine.bundle.item_ids import id_problem, shown
from atspeed.engine.files.lines import line_problem, parse_json, read_lines


def _item_id(item: str) -> str:
    if problem := id_problem(item) or line_problem(item):  # a file of items to remove has one id per line
        raise ValueError(problem)
    return item


class ItemLine(BaseModel):
    """Line of a file of items."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    item_id: Annotated[str, AfterValidator(_item_id)]


_Read = TypeVar("_Read", bound=ItemLine)


def item_lines(path: Path, kind: type[_Read]) -> Iterator[tuple[int, _Read]]:
    """Yield number and content of each line. Raises CommandError at a bad line, and at an `item_id` that occurs again."""
    lines: dict[str, int] = {}
    for number, text in read_lines(path):
        line = _parsed(kind, path, number, text)
        if (first := lines.setdefault(line.item_id, number)) != number:
            raise CommandError(
                f"{path}: lines {first} and {number}: item_id {shown(line.item_id)} occurs more than once"
            )
        yield number, line


def _parsed(kind: type[_Read], path: Path, number: int, text: str) -> _Read:
    try:
        parse_json(text)  # refuses keys that occur twice, which pydantic accepts
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in {"int", "str"})  # of a code, either would do
        problem = f"{f'{where}: ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        raise CommandError(f"{path}: line {number}: {problem}") from error
    except ValueError as error:
        raise CommandError(f"{path}: line {number}: {error}") from error
