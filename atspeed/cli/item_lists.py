"""Lists of items on the command line, in one form for all commands.

Ids are separated by commas, as in a line of CSV: an id that contains a comma stands in double quotes. Options and arguments
with items may be repeated, so `record alice 50 172` and `record alice 50,172` are the same.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Annotated

import typer

_COMMAS = "with commas between; an id that holds a comma stands in double quotes"


def split(values: Sequence[str] | None) -> list[str] | None:
    """Split all values of one option into ids; None if it is not given. One empty value is a list without ids."""
    if values is None:
        return None
    return [] if list(values) == [""] else [item for value in values for item in _ids(value)]


# Typer treats an empty list as an option that is not given. So the callbacks only check, and the command splits.
def _any(values: list[str] | None) -> list[str] | None:
    split(values)
    return values


def _some(values: list[str] | None) -> list[str] | None:
    if split(values) == []:
        raise typer.BadParameter("needs at least one item id.")
    return values


Recorded = Annotated[
    list[str],
    typer.Argument(help=f"Item ids, oldest first, {_COMMAS}.", callback=_some),
]
History = Annotated[
    list[str] | None,
    typer.Option(metavar="ID,ID", help=f"Item ids, oldest first, {_COMMAS}. Nothing is stored.", callback=_any),
]
Excluded = Annotated[
    list[str] | None,
    typer.Option(metavar="ID,ID", help=f"Item ids never to recommend, {_COMMAS}.", callback=_any),
]
Allowed = Annotated[
    list[str] | None,
    typer.Option(metavar="ID,ID", help=f"Item ids to choose from, {_COMMAS}.", callback=_some),
]
WhyNot = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID,ID",
        help=f"Item ids: say why each is not in the list, {_COMMAS}. Needs the scope explain.",
        callback=_some,
    ),
]


def _ids(text: str) -> list[str]:
    try:
        fields = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error:
        raise typer.BadParameter(f"{text!a} is not a list of ids {_COMMAS}.") from None
    ids = [field.strip() for field in fields]
    if not ids or not all(ids):
        raise typer.BadParameter(f"{text!a} holds an empty id; item ids are written {_COMMAS}.")
    return ids
