"""`atspeed catalogue update`: a bundle with other items on the same models, for services that run to take up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict, ValidationError

from atspeed.cli.errors import Commands
from atspeed.cli.options import CommandError
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.engine.bundle.manifest import Bundle

catalogue_commands = Commands(help="Change what a bundle recommends.")


class NewItem(BaseModel):
    """A line of the file of new items."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item_id: str
    codes: tuple[int, ...]


@catalogue_commands.command("update")
def catalogue_update(
    bundle: Annotated[Path, typer.Argument(help="The bundle to start from.", exists=True, file_okay=False)],
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder of the new bundle, not there yet, on the same disk: models are hard links.", file_okay=False
        ),
    ],
    add: Annotated[
        Path | None,
        typer.Option(
            help='New items: lines of JSON, {"item_id": "a", "codes": [3, 0, 7]}.', exists=True, dir_okay=False
        ),
    ] = None,
    remove: Annotated[
        Path | None, typer.Option(help="Items to take out: an id a line.", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Add items, with code paths of the bundle's codebooks, and take others out. An item in both files gets its new codes."""
    if out.exists():
        raise CommandError(f"{out}: is there already")
    added = {item.item_id: item.codes for item in _new_items(add)} if add else {}
    removed = [line for line in remove.read_text(encoding="utf-8").splitlines() if line] if remove else []
    try:
        made = update_catalogue(Bundle(bundle), out, added, removed)
    except OSError as error:
        raise CommandError(f"{out}: {os.strerror(error.errno or 0)}") from error
    print(f"{out}: catalogue {made.manifest.catalogue_version}, bundle {made.manifest.version}")


def _new_items(path: Path) -> Iterator[NewItem]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield NewItem.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CommandError(f"{path}: line {number}: {f'{where}: ' if where else ''}{first['msg']}") from error
