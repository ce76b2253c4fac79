"""Inflates a Llama: a larger model that computes the same at a larger cost.

The inflation preserves the function, for benchmarks of cost: the draft's acceptance stays that of the trained pair, while a
pass costs as much as a pass of a model of the size. The added weights are random, are multiplied like any others, and change
nothing:

- Hidden dimensions h .. H-1 are 0 in the residual stream: embeddings, `o_proj` and `down_proj` write 0 there. The mean square
  of RMSNorm is then h/H of the original, so its weights are scaled by sqrt(h/H) and its epsilon by h/H.
- New heads and intermediate units are not read: their columns of `o_proj` and `down_proj` are 0. The same holds for all
  columns of new layers, which add 0 to the stream.
- A head of m times the dimensions rotates every m-th pair as the trained one rotates its pairs. Queries are scaled by
  sqrt(m), by which the larger head's softmax divides.
- New tokens must take no share of the softmax over the vocabulary, and the head has no bias. So one new hidden dimension
  holds a constant. It counts in the mean square in place of a part of epsilon, and only the final norm lets it through.
  There a large negative weight turns it into a logit that is negligible in every sum.

The computation is exact except for rounding. Queries, keys and the cache have the sizes of the larger shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from atspeed.engine.arrays import Float32, Int64
from atspeed.training.errors import TrainingError

_STD = 0.02  # standard deviation of random weights, that of LLaMA's initialisation
_PUSH = 256.0  # weight of a new token's logit on the constant dimension; a power of two, exact in every number format
_CONSTANT_LOGIT = 2.0**15  # minus a new token's logit, times the root mean square of the stream

Weights = Mapping[str, Float32]
"""Weights by the names of Hugging Face's Llama, matrices as [out, in]."""


class InflationError(TrainingError):
    """A model that cannot be inflated, or not to that shape. The text names the size."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama.

    Attributes:
        layers: the number of layers.
        hidden: the size of the residual stream.
        intermediate: the size of the MLP.
        heads: heads of queries.
        kv_heads: heads of keys and values.
        head_dim: the size of a head.
        vocab_size: the size of the vocabulary; None for that of the model that is inflated.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int | None = None


# Shapes after Qwen3 lack its norms of queries and keys, whose cost is negligible. The one of 1.7B has no tied embedding.
SHAPES: Mapping[str, ModelShape] = {
    "8m": ModelShape(layers=4, hidden=384, intermediate=1024, heads=6, kv_heads=6, head_dim=64),
    "68m": ModelShape(
        2, 768, 3072, heads=12, kv_heads=12, head_dim=64, vocab_size=32_000
    ),  # LLaMA-68M, AtSpeed's draft
    "85m": ModelShape(12, 768, 2048, heads=12, kv_heads=12, head_dim=64),
    "0.5b": ModelShape(28, 1024, 3072, heads=16, kv_heads=8, head_dim=128),  # Qwen3-0.6B without its vocabulary
    "1.7b": ModelShape(28, 2048, 6144, heads=16, kv_heads=8, head_dim=128, vocab_size=151_936),  # Qwen3-1.7B
    "7b": ModelShape(
        32, 4096, 11_008, heads=32, kv_heads=32, head_dim=128, vocab_size=32_000
    ),  # LLaMA-7B, AtSpeed's target
}


class InflatedWeights:
    """Computes the weights of the larger model from those of the smaller: h of H hidden dimensions, and so on.

    Args:
        weights: those of the smaller model.
        small: its sizes.
        shape: the sizes of the larger one.
        epsilon: the smaller model's term in the root of its norms.
        seed: of the random weights.

    Attributes:
        shape: the sizes of the larger model, with its vocabulary.
        epsilon: the larger model's term in the root of its norms.

    Raises InflationError, naming the size, when the model does not fit into the shape.
    """

    def __init__(self, weights: Weights, small: ModelShape, shape: ModelShape, *, epsilon: float, seed: int) -> None:
        self._weights, self._small = weights, small
        self.shape = large = replace(shape, vocab_size=shape.vocab_size or small.vocab_size)
        self._vocab_size, self._trained_vocab = large.vocab_size or 0, small.vocab_size or 0
        self._random = np.random.default_rng(seed)
        self._grows = self._vocab_size > self._trained_vocab
        _check_fits(small, large, needs_constant=self._grows)
        summed = small.hidden * epsilon  # the term that RMSNorm adds to the sum of squares
        # A power of two is exact in every number format. It takes at most half of epsilon.
        self._constant = 2.0 ** math.floor(math.log2(summed / 2) / 2) if self._grows else 0.0
        self.epsilon = (summed - self._constant**2) / large.hidden
        self._heads = _HeadPlaces(small, large)

    def shards(self) -> Iterator[dict[str, Float32]]:
        """Yield the weights by name, layer after layer, then all others."""
        for index in range(self.shape.layers):
            weights = self._layer(index) if index < self._small.layers else self._identity()
            yield {f"model.layers.{index}.{name}.weight": weight for name, weight in weights.items()}
        yield {
            "model.embed_tokens.weight": self._embedding(),
            "model.norm.weight": self._final_norm(),
            "lm_head.weight": self._head(),
        }

    def _layer(self, index: int) -> dict[str, Float32]:
        weights, hidden, heads, small = self._identity(), slice(self._small.hidden), self._heads, self._small

        def trained(name: str) -> Float32:
            return self._weights[f"model.layers.{index}.{name}.weight"]

        for name, rows in (("q", heads.query), ("k", heads.key), ("v", heads.value)):
            weights[f"self_attn.{name}_proj"][rows, hidden] = trained(f"self_attn.{name}_proj")[heads.source[name]]
        query = weights["self_attn.q_proj"]
        query[heads.query] *= math.sqrt(self.shape.head_dim / small.head_dim)
        query[heads.unused_of_query] = 0  # else they would be multiplied by the key's random rows
        weights["self_attn.o_proj"][hidden, heads.output] = trained("self_attn.o_proj")
        for name in ("gate", "up"):
            weights[f"mlp.{name}_proj"][: small.intermediate, hidden] = trained(f"mlp.{name}_proj")
        weights["mlp.down_proj"][hidden, : small.intermediate] = trained("mlp.down_proj")
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[name] = self._norm(trained(name))
        return weights

    def _identity(self) -> dict[str, Float32]:
        """Return the weights of a layer that adds 0."""
        large = self.shape
        query, key = large.heads * large.head_dim, large.kv_heads * large.head_dim
        norm = np.ones(self._small.hidden, dtype=np.float32)
        return {
            "self_attn.q_proj": self._noise(query, large.hidden),
            "self_attn.k_proj": self._noise(key, large.hidden),
            "self_attn.v_proj": self._noise(key, large.hidden),
            "self_attn.o_proj": np.zeros((large.hidden, query), dtype=np.float32),
            "mlp.gate_proj": self._noise(large.intermediate, large.hidden),
            "mlp.up_proj": self._noise(large.intermediate, large.hidden),
            "mlp.down_proj": np.zeros((large.hidden, large.intermediate), dtype=np.float32),
            "input_layernorm": self._norm(norm),
            "post_attention_layernorm": self._norm(norm),
        }

    def _norm(self, weight: Float32) -> Float32:
        """Widen a norm. New dimensions have weight 0, so that the constant goes no further."""
        wide = np.zeros(self.shape.hidden, dtype=np.float32)
        wide[: self._small.hidden] = weight * math.sqrt(self._small.hidden / self.shape.hidden)
        return wide

    def _final_norm(self) -> Float32:
        wide = self._norm(self._weights["model.norm.weight"])
        if self._grows:
            wide[self._small.hidden] = _CONSTANT_LOGIT / (_PUSH * self._constant)
        return wide

    def _embedding(self) -> Float32:
        wide = np.zeros((self._vocab_size, self.shape.hidden), dtype=np.float32)
        wide[: self._trained_vocab, : self._small.hidden] = self._weights["model.embed_tokens.weight"]
        if self._grows:
            wide[:, self._small.hidden] = self._constant
        return wide

    def _head(self) -> Float32:
        wide = self._noise(self._vocab_size, self.shape.hidden)
        wide[: self._trained_vocab, : self._small.hidden] = self._weights["lm_head.weight"]
        if self._grows:
            wide[:, self._small.hidden] = 0
            wide[self._trained_vocab :, self._small.hidden] = -_PUSH
        return wide

    def _noise(self, *size: int) -> Float32:
        noise = self._random.standard_normal(size, dtype=np.float32)
        noise *= np.float32(_STD)
        return noise


class _HeadPlaces:
    """The places of the trained heads in the larger model, as rows of its projections.

    A larger group of query heads per key holds a trained group. A smaller one holds a part of it, and the key is repeated.

    Attributes:
        query: rows of q_proj that hold trained heads.
        unused_of_query: other rows of the same heads.
        key: rows of k_proj.
        value: rows of v_proj.
        output: columns of o_proj.
        source: the trained rows that belong there, by projection.
    """

    def __init__(self, small: ModelShape, large: ModelShape) -> None:
        group, wide = small.heads // small.kv_heads, large.heads // large.kv_heads
        copies = -(-group // wide)  # key heads that each trained key head needs
        if small.kv_heads * copies > large.kv_heads:
            raise InflationError(
                f"kv_heads: {large.kv_heads}, but {small.kv_heads} of {group} heads each need {small.kv_heads * copies} "
                f"of {wide} heads each"
            )
        # Query head q of key k goes to the same place within k's copies, which follow each other.
        heads = np.arange(small.heads)
        of_key, member = heads // group, heads % group
        query_heads = (of_key * copies + member // wide) * wide + member % wide
        key_heads = np.arange(small.kv_heads * copies)
        # Queries and keys are spread over the pairs of the rotation; values keep the first dimensions.
        rotated, plain = _rotated_dimensions(small, large), np.arange(small.head_dim)
        every = np.arange(large.head_dim)
        unused = np.setdiff1d(every, rotated)
        self.query = _rows(query_heads, rotated, large)
        self.unused_of_query = _rows(query_heads, unused, large)
        self.key = _rows(key_heads, rotated, large)
        self.value = _rows(key_heads, plain, large)
        self.output = _rows(query_heads, plain, large)
        keys = _rows(key_heads // copies, plain, small)
        self.source = {"q": np.arange(small.heads * small.head_dim), "k": keys, "v": keys}


def _rows(heads: Int64, dimensions: Int64, shape: ModelShape) -> Int64:
    """Return rows of a projection, head by head."""
    return (heads[:, None] * shape.head_dim + dimensions).flatten()


def _rotated_dimensions(small: ModelShape, large: ModelShape) -> Int64:
    """Return the places of a head's dimensions. Dimension i is rotated together with i + d/2, by base^(-2i/d) per position.

    In a head of m times the dimensions, the pair m*i and m*i + D/2 has the same rotation.
    """
    pairs = np.arange(small.head_dim // 2) * (large.head_dim // small.head_dim)
    return np.concatenate([pairs, pairs + large.head_dim // 2])


def _check_fits(small: ModelShape, large: ModelShape, *, needs_constant: bool) -> None:
    needed = replace(small, hidden=small.hidden + needs_constant)
    for field, least in vars(needed).items():
        if getattr(large, field) < least:
            raise InflationError(f"{field}: {getattr(large, field)}, the model needs {least}")
    if large.head_dim % small.head_dim:
        raise InflationError(f"head_dim: {large.head_dim}, must be a multiple of the model's {small.head_dim}")
    if large.heads % large.kv_heads:
        raise InflationError(f"heads: {large.heads}, must be a multiple of kv_heads, {large.kv_heads}")
