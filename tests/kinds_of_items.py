"""A small shop: items with texts, of four kinds, and users who buy one kind; and a recipe that quantises the texts."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.recipes import short_recipe

KINDS = {"soap": "Bath > Soap", "comb": "Hair > Comb", "lipstick": "Makeup > Lips", "candle": "Home > Candles"}
COLOURS = ("red", "green", "blue", "white", "black", "golden", "pink", "plain")


def write_data(folder: Path) -> Path:
    """Thirty-two items of four kinds; every user buys one kind."""
    folder.mkdir()
    items = [(kind, colour) for kind in KINDS for colour in COLOURS]
    lines = [
        json.dumps({"id": place, "title": f"{colour} {kind}", "category": KINDS[kind]})
        for place, (kind, colour) in enumerate(items)
    ]
    (folder / "items.jsonl").write_text("\n".join(lines))
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for user in range(40):
        bought = [str(user % 4 * 8 + (user + step * (1 + user % 3)) % 8) for step in range(7)]
        for name, part in (("train", bought[:5]), ("valid", bought[5:6]), ("test", bought[6:])):
            splits[name].append(" ".join([str(user), *part]))
    for name, rows in splits.items():
        (folder / f"{name}.txt").write_text("\n".join(rows))
    return folder


def recipe() -> str:
    """The text of a recipe, with 64 code paths of three levels."""
    text = re.sub(r"\[data\][^\[]*", '[data]\nsource = "atspeed"\n\n', short_recipe())
    return re.sub(
        r"\[codes\][^\[]*",
        '[codes]\nkind = "quantised"\nlevels = 3\ncodebook_bits = 2\nfactors = 8\ntext_weight = 0.7\n\n',
        text,
    )
