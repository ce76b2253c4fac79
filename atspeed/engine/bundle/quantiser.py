"""The quantiser of a bundle: the codebooks that gave the items their code paths.

New items get code paths from it, without training (`atspeed catalogue encode`). The code path of an item is a beam search for the
sum of one code vector per level that is nearest to the item's embedding (residual quantisation, Babenko and Lempitsky 2014).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt

from atspeed.engine.arrays import Float32, Int32
from atspeed.engine.bundle.arrays import read_array
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.errors import BundleError, CatalogueError
from atspeed.engine.files.atomic_write import replacing

FOLDER = "quantiser"
FILE = "codebooks.npy"
_BEAM = 5  # of the search for a path, as in training
_CHUNK = 256  # items that are searched at once


class TextEncoderEntry(BaseModel):
    """The encoder of items' texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    """The version of its package."""
    digest: str
    """The SHA-256 of its weights."""
    dimensions: PositiveInt
    text_form: str = ""
    """How the text of an item was written, for people."""


class QuantiserEntry(BaseModel):
    """The quantiser in the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_weight: Annotated[float, Field(ge=0, le=1)]
    """The squared length of an embedding's text part. The rest is the part from co-occurrence, which new items lack."""
    encoder: TextEncoderEntry | None = None
    """The encoder of texts; None if texts had no part in the codes."""
    usual_distance: Annotated[FiniteFloat, Field(ge=0)]
    """The median distance of the training items, encoded as new items are."""
    far_distance: Annotated[FiniteFloat, Field(ge=0)]
    """The distance that one training item in twenty exceeds."""


@dataclass(frozen=True)
class Quantiser:
    """Codebooks and what the manifest says of them.

    Attributes:
        codebooks: float32 [L, codes, d].
        entry: the entry in the manifest.
    """

    codebooks: Float32
    entry: QuantiserEntry

    @property
    def text_dimensions(self) -> int:
        """Return how many of the first dimensions come from the text."""
        return self.entry.encoder.dimensions if self.entry.encoder else 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of codes of each level."""
        return (self.codebooks.shape[1],) * len(self.codebooks)

    @property
    def dimensions(self) -> int:
        """Return the dimensions of a whole embedding."""
        return int(self.codebooks.shape[2])

    def of_texts(self, embeddings: Float32) -> Float32:
        """Return embeddings [items, text dimensions] at the length that they have in the codebooks."""
        lengths = np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
        scaled: Float32 = (embeddings / lengths * np.sqrt(self.entry.text_weight)).astype(np.float32)
        return scaled

    def encode(self, embeddings: Float32) -> tuple[Int32, Float32]:
        """Return code paths and distances of items.

        The distance is that of the embedding to the sum of the path's code vectors, divided by the embedding's length.

        Args:
            embeddings: [items, d]; d is `dimensions`, or less if only the first ones of an item are known. The others are then
                not compared.

        Returns: int32 [items, L] and float32 [items].
        """
        codebooks = np.ascontiguousarray(self.codebooks[:, :, : embeddings.shape[1]])
        chunks = [
            _nearest(codebooks, embeddings[start : start + _CHUNK]) for start in range(0, len(embeddings), _CHUNK)
        ]
        if not chunks:
            return np.zeros((0, len(codebooks)), dtype=np.int32), np.zeros(0, dtype=np.float32)
        paths, distances = zip(*chunks, strict=True)
        lengths = np.maximum(np.linalg.norm(embeddings, axis=1), 1e-9)
        return np.concatenate(paths), (np.concatenate(distances) / lengths).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write the codebooks in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILE) as file:
            np.save(SimpleNamespace(write=file.write), self.codebooks, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, entry: QuantiserEntry) -> Quantiser:
        """Read the codebooks that `save` wrote. Raises BundleError naming the file."""
        try:
            codebooks = read_array(folder / FILE)
        except CatalogueError as error:
            raise BundleError(str(error)) from error
        if codebooks.dtype != np.float32 or codebooks.ndim != 3 or not codebooks.size:
            raise BundleError(f"{folder / FILE}: not float32 [levels, codes, dimensions]")
        if not np.isfinite(codebooks).all():
            raise BundleError(f"{folder / FILE}: holds values that are no numbers")
        quantiser = cls(codebooks, entry)
        if quantiser.text_dimensions > quantiser.dimensions:
            raise BundleError(
                f"{folder / FILE}: {quantiser.dimensions} dimensions, but texts have {quantiser.text_dimensions}"
            )
        return quantiser


@dataclass(frozen=True)
class EncodedItem:
    """Code path of a new item.

    Attributes:
        codes: the code path.
        distance: its distance (`Quantiser.encode`).
        known_levels: how many of its first codes a path of the catalogue begins with.
        shares_path_with: ids of the items with the same path: of the catalogue first, then new ones.
    """

    codes: tuple[int, ...]
    distance: float
    known_levels: int
    shares_path_with: tuple[str, ...]


def encode_items(
    quantiser: Quantiser, catalogue: Catalogue, embeddings: Mapping[str, Float32]
) -> dict[str, EncodedItem]:
    """Give new items their code paths. Items of one path share it, as in training.

    Args:
        quantiser: the bundle's quantiser.
        catalogue: the bundle's catalogue. Its own items among the new ones are no collision with themselves.
        embeddings: each item's embedding [d], whole or of its text part (`Quantiser.of_texts`).
    """
    found: dict[str, tuple[tuple[int, ...], float]] = {}
    for size in sorted({len(embedding) for embedding in embeddings.values()}):
        items = [item for item, embedding in embeddings.items() if len(embedding) == size]
        paths, distances = quantiser.encode(np.stack([embeddings[item] for item in items]).astype(np.float32))
        found |= zip(items, zip(map(tuple, paths.tolist()), distances.tolist(), strict=True), strict=True)
    owners: dict[tuple[int, ...], list[str]] = {}
    for item in embeddings:
        owners.setdefault(found[item][0], []).append(item)
    return {
        item: EncodedItem(path, distance, *_collisions(catalogue, path, item, owners[path]))
        for item, (path, distance) in ((item, found[item]) for item in embeddings)
    }


def _collisions(
    catalogue: Catalogue, path: tuple[int, ...], item: str, owners: list[str]
) -> tuple[int, tuple[str, ...]]:
    """Return the known levels of a path and the other items with it."""
    first, last = 0, catalogue.items  # items stand in the order of their paths, so a prefix is a range
    for level, code in enumerate(path):
        column = catalogue.codes[first:last, level]
        low, high = np.searchsorted(column, code, side="left"), np.searchsorted(column, code, side="right")
        if low == high:
            return level, tuple(other for other in owners if other != item)
        first, last = first + int(low), first + int(high)
    stored = [catalogue.id_of(place) for place in range(first, last)]
    others = [other for other in owners if other not in set(stored)]
    return len(path), tuple(other for other in stored + others if other != item)


def _nearest(codebooks: Float32, embeddings: Float32) -> tuple[Int32, Float32]:
    """Return the best path of each item, int32 [items, L], and what is left of its embedding, as a length [items]."""
    items = len(embeddings)
    remainders = embeddings[:, None, :]  # [items, beams, d]
    paths = np.zeros((items, 1, 0), dtype=np.int32)
    left = np.zeros((items, 1), dtype=np.float32)
    for codebook in codebooks:
        squares = (remainders**2).sum(axis=2)[:, :, None] + (codebook**2).sum(axis=1)
        distances = (squares - 2 * remainders @ codebook.T).reshape(items, -1)  # [items, beams * codes]
        best = np.argsort(distances, axis=1, kind="stable")[:, :_BEAM]
        beam, code = np.divmod(best, len(codebook))
        rows = np.arange(items)[:, None]
        remainders = remainders[rows, beam] - codebook[code]
        paths = np.concatenate([paths[rows, beam], code[:, :, None].astype(np.int32)], axis=2)
        left = np.take_along_axis(distances, best, axis=1)
    return paths[:, 0], np.sqrt(np.maximum(left[:, 0], 0))
