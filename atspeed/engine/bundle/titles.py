"""Titles of a catalogue's items, for people. No score depends on them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.arrays import read_array
from atspeed.engine.errors import CatalogueError
from atspeed.engine.files.atomic_write import replacing

MAX_TITLE_BYTES = 512
TITLE_FILES = ("titles.npy", "title_start.npy")


@dataclass(frozen=True)
class Titles:
    """Titles of all items, as flat arrays.

    Attributes:
        text: UTF-8 bytes of all titles, one behind the other, uint8 [bytes].
        start: int64 [items + 1]; the title of item i is text[start[i] : start[i + 1]], empty if it has none.
    """

    text: npt.NDArray[np.uint8]
    start: Int64

    @classmethod
    def of(cls, titles: Iterable[str]) -> Titles:
        """Return the titles of items in their order. Raises CatalogueError for one that is too long or not UTF-8."""
        encoded = [title.encode("utf-8", "surrogatepass") for title in titles]
        made = cls(
            np.frombuffer(b"".join(encoded), dtype=np.uint8),
            np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        )
        made.check(len(encoded), "titles")
        return made

    def __getitem__(self, item: int) -> str:
        return bytes(self.text[self.start[item] : self.start[item + 1]]).decode()

    def check(self, items: int, name: str) -> None:
        """Raise CatalogueError, beginning with `name`, unless these are titles of so many items."""
        start, text = self.start, self.text
        if text.ndim != 1 or text.dtype != np.uint8 or start.shape != (items + 1,) or start.dtype != np.int64:
            raise CatalogueError(f"{name}: not titles of {items} items")
        lengths = np.diff(start)
        if start[0] != 0 or start[-1] != len(text) or (lengths < 0).any():
            raise CatalogueError(f"{name}: not one title behind the other")
        if lengths.max(initial=0) > MAX_TITLE_BYTES:
            raise CatalogueError(f"{name}: a title has {lengths.max()} bytes, at most {MAX_TITLE_BYTES} are allowed")
        try:
            text.tobytes().decode()
        except UnicodeDecodeError:
            raise CatalogueError(f"{name}: not UTF-8") from None
        inside = start[start < len(text)]
        if ((text[inside] & 0xC0) == 0x80).any():
            raise CatalogueError(f"{name}: a title begins within a character")

    def save(self, folder: Path) -> None:
        """Write titles.npy and title_start.npy, each in one step."""
        for name, array in ((TITLE_FILES[0], self.text), (TITLE_FILES[1], self.start)):
            with replacing(folder / name) as file:
                np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, items: int) -> Titles | None:
        """Read the titles that `save` wrote; None if there are none. Raises CatalogueError naming the file."""
        text, start = (folder / name for name in TITLE_FILES)
        if not os.path.lexists(text):
            return None
        titles = cls(read_array(text), read_array(start))
        titles.check(items, str(text))
        return titles
