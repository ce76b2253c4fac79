"""Lists of items on the command line, written in one way for all commands.

Ids have commas between them, as in a line of CSV: an id that holds a comma stands in double quotes. What takes items may be given
several times, so `record alice 50 172` and `record alice 50,172` say the same.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Annotated

import typer

_COMMAS = "with commas between; an id that holds a comma stands in double quotes"


def split(values: Sequence[str] | None) -> list[str] | None:
    """The ids of all values of one option; None where the option is not given. One empty value is a list without ids."""
    if values is None:
        return None
    return [] if list(values) == [""] else [item for value in values for item in _ids(value)]


# Typer takes an empty list for an option that is not given, so its callbacks check and leave the splitting to the command.
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


def _ids(text: str) -> list[str]:
    try:
        fields = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error:
        raise typer.BadParameter(f"{text!a} is no list of ids {_COMMAS}.") from None
    ids = [field.strip() for field in fields]
    if not ids or not all(ids):
        raise typer.BadParameter(f"{text!a} holds an empty id; item ids are written {_COMMAS}.")
    return ids
