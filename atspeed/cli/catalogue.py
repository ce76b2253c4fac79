"""`atspeed catalogue update`: a bundle with other items on the same models.

Running services can load it (hot reload).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from atspeed.cli.errors import Commands
from atspeed.cli.options import CommandError
from atspeed.engine.bundle.catalogue_update import codes_by_name, update_catalogue
from atspeed.engine.bundle.item_ids import id_problem, shown
from atspeed.engine.bundle.manifest import Bundle
from atspeed.engine.files.lines import line_problem, parse_json, read_lines

_Line = TypeVar("_Line", bound=BaseModel)

catalogue_commands = Commands(help="Change the items of a bundle.")


def _item_id(item: str) -> str:
    if problem := id_problem(item) or line_problem(item):  # a file of items to remove has one id per line
        raise ValueError(problem)
    return item


class NewItem(BaseModel):
    """A line of the file of new items."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    item_id: Annotated[str, AfterValidator(_item_id)]
    codes: tuple[int | str, ...]

    def path(self, by_name: list[dict[str, int]]) -> tuple[int, ...]:
        """Return the codes, looked up if they are names. Raises ValueError naming a code that has no token."""
        path: list[int] = []
        for level, code in enumerate(self.codes):
            if isinstance(code, str):
                known = by_name[level] if level < len(by_name) else {}
                if code not in known:
                    raise ValueError(f"codes.{level}: {shown(code)} is no code of the bundle, which reads no other")
                code = known[code]
            path.append(code)
        return tuple(path)


class ItemTitle(BaseModel):
    """A line of the file of titles."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    item_id: Annotated[str, AfterValidator(_item_id)]
    title: str


@catalogue_commands.command("update")
def catalogue_update(
    bundle: Annotated[Path, typer.Argument(help="The bundle to start from.", exists=True, file_okay=False)],
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder of the new bundle. It must not exist, and be on the same disk, since models are hard links.",
            file_okay=False,
        ),
    ],
    add: Annotated[
        Path | None,
        typer.Option(
            help='File of new items: one JSON object per line, {"item_id": "a", "codes": [3, 0, 7]}. '
            "An imported bundle also takes the names of codes.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    remove: Annotated[
        Path | None, typer.Option(help="File of items to remove: one id per line.", exists=True, dir_okay=False)
    ] = None,
    titles: Annotated[
        Path | None,
        typer.Option(
            help='File of titles for people: one JSON object per line, {"item_id": "a", "title": "Heat (1995)"}. '
            "Other items keep the title that they have.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Add items with code paths of the bundle's codebooks, and remove others. An item in both files gets its new codes."""
    if os.path.lexists(out):
        raise CommandError(f"{out}: exists already")
    added = _new_items(add, codes_by_name(Bundle(bundle))) if add else {}
    removed = [item for _, item in read_lines(remove)] if remove else []
    try:
        made = update_catalogue(Bundle(bundle), out, added, removed, _titles(titles) if titles else None)
    except OSError as error:
        raise CommandError(f"{out}: not written: {error.strerror or error}") from error
    print(f"{out}: catalogue {made.manifest.catalogue_version}, bundle {made.manifest.version}")


def _new_items(path: Path, by_name: list[dict[str, int]]) -> dict[str, tuple[int, ...]]:
    """Read code paths by id."""
    items: dict[str, tuple[int, ...]] = {}
    lines: dict[str, int] = {}
    for number, line in read_lines(path):
        item = _read(NewItem, path, number, line)
        if item.item_id in lines:
            first = lines[item.item_id]
            raise CommandError(
                f"{path}: lines {first} and {number}: item_id {shown(item.item_id)} occurs more than once"
            )
        try:
            items[item.item_id], lines[item.item_id] = item.path(by_name), number
        except ValueError as error:
            raise CommandError(f"{path}: line {number}: {error}") from error
    return items


def _titles(path: Path) -> dict[str, str]:
    """Read titles by id."""
    titles: dict[str, str] = {}
    for number, line in read_lines(path):
        item = _read(ItemTitle, path, number, line)
        if item.item_id in titles:
            raise CommandError(f"{path}: line {number}: item_id {shown(item.item_id)} occurs more than once")
        titles[item.item_id] = item.title
    return titles


def _read(kind: type[_Line], path: Path, number: int, line: str) -> _Line:
    try:
        parse_json(line)  # refuses keys that occur twice, which pydantic accepts
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in {"int", "str"})  # of a code, either would do
        problem = f"{f'{where}: ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        raise CommandError(f"{path}: line {number}: {problem}") from error
    except ValueError as error:
        raise CommandError(f"{path}: line {number}: {error}") from error
