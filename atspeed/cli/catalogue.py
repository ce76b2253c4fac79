"""`atspeed catalogue update` and `encode`: other items on the same models.

Running services can load it (hot reload).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from atspeed.cli.commands import Commands
from atspeed.cli.encode_items import embeddings_of, summary, write_encoded
from atspeed.cli.item_lines import ItemLine, item_lines
from atspeed.cli.options import AsJson, CommandError, print_result
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue_update import codes_by_name, update_catalogue
from atspeed.engine.bundle.item_ids import shown
from atspeed.engine.bundle.quantiser import encode_items
from atspeed.engine.files.lines import read_lines

catalogue_commands = Commands(help="Change the items of a bundle.")


class NewItem(ItemLine):
    """A line of the file of new items."""

    codes: tuple[int | str, ...]
    distance: float | None = None
    """Written by `encode`, for people; so is the next one."""
    shares_path_with: tuple[str, ...] = ()

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


class ItemTitle(ItemLine):
    """A line of the file of titles."""

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
    as_json: AsJson = False,
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
    versions = {"bundle": made.manifest.version, "catalogue": made.manifest.catalogue_version}
    text = f"{out}: catalogue {versions['catalogue']}, bundle {versions['bundle']}"
    print_result(text, {"folder": out, **versions}, as_json=as_json)


@catalogue_commands.command("encode")
def catalogue_encode(
    bundle: Annotated[Path, typer.Argument(help="The bundle whose quantiser is used.", exists=True, file_okay=False)],
    items: Annotated[
        Path,
        typer.Argument(
            help='File of new items: one JSON object per line, {"item_id": "a", "text": "title | category"}, with the text '
            'written as for training, or with its "embedding", a list of numbers.',
            exists=True,
            dir_okay=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="File for `catalogue update --add`.", dir_okay=False)],
    as_json: AsJson = False,
) -> None:
    """Give new items code paths of the bundle's quantiser, without training."""
    source = Bundle(bundle)
    catalogue = source.catalogue()
    quantiser = source.quantiser(catalogue)
    encoded = encode_items(quantiser, catalogue, embeddings_of(quantiser, items))
    write_encoded(out, encoded)
    fields = {
        "file": out,
        "items": len(encoded),
        "on_shared_paths": sum(bool(item.shares_path_with) for item in encoded.values()),
        "far": sum(item.distance > quantiser.entry.far_distance for item in encoded.values()),
    }
    print_result(f"{out}: {summary(encoded, quantiser)}", fields, as_json=as_json)


def _new_items(path: Path, by_name: list[dict[str, int]]) -> dict[str, tuple[int, ...]]:
    """Read code paths by id."""
    items: dict[str, tuple[int, ...]] = {}
    for number, item in item_lines(path, NewItem):
        try:
            items[item.item_id] = item.path(by_name)
        except ValueError as error:
            raise CommandError(f"{path}: line {number}: {error}") from error
    return items


def _titles(path: Path) -> dict[str, str]:
    """Read titles by id."""
    return {item.item_id: item.title for _, item in item_lines(path, ItemTitle)}
