"""A small data set over a catalogue, in the layout of the AtSpeed paper's."""

from __future__ import annotations

import json
from pathlib import Path

from atspeed.engine.bundle.catalogue import Catalogue
from tests.bundles import random_history

_USERS = 20


def write_dataset(folder: Path, catalogue: Catalogue) -> Path:
    """items.jsonl with all items, and train, valid and test histories of 20 users."""
    ids = [catalogue.id_of(index) for index in range(catalogue.items)]
    (folder / "items.jsonl").write_text("".join(json.dumps({"id": item}) + "\n" for item in ids))
    for number, (name, length) in enumerate((("train", 5), ("valid", 1), ("test", 2))):
        lines = [
            f"user-{user} {' '.join(random_history(catalogue, length, seed=100 * number + user))}"
            for user in range(_USERS)
        ]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder
