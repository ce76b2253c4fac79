"""Function-preserving inflation: a trained Llama in a larger one that computes the same, at the larger one's cost.

For benchmarks: how often a draft foresees the target's beams stays that of the trained pair, what a pass costs is what a model
of the size costs. What the larger model adds is random weights that are multiplied like any others and change nothing:

- Hidden dimensions h .. H-1 are 0 in the residual stream: embeddings, `o_proj` and `down_proj` write 0 there. The mean square of
  RMSNorm is then h/H of what it was, so its weights are scaled by sqrt(h/H) and its epsilon by h/H.
- Heads and intermediate units that are new are not read: their columns of `o_proj` and `down_proj` are 0. So are all columns of
  layers that are new, which add 0 to the stream.
- A head of m times the dimensions rotates every m-th pair as the trained one rotates its pairs; queries are scaled by sqrt(m),
  which the larger head's softmax divides by.
- Tokens that are new must take no share of the softmax over the vocabulary, and the head has no bias. So one new hidden dimension
  holds a constant, which counts in the mean square as a part of epsilon did, and which only the final norm lets through: times a
  large negative weight it is a logit that no sum notices.

Everything is exact but for rounding; see the test. Queries and keys are as wide as the shape says, so is the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from atspeed.engine.files.json_file import write_json
from atspeed.training.errors import TrainingError
from atspeed.training.sequences import Spelling

_STD = 0.02  # of random weights; what LLaMA's are initialised with
_PUSH = 256.0  # weight of a new token's logit on the constant dimension
_CONSTANT_LOGIT = 2.0**15  # minus a new token's logit, times the root mean square of the stream


class InflationError(TrainingError):
    """A model that cannot be inflated, or not to that shape. The text names the size."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama. vocab_size: None for that of the model that is inflated."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int | None = None

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The sizes of a checkpoint."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
        )


# Qwen3's are without its norms of queries and keys, whose cost is nothing; that of 1.7B is without its tied embedding, too.
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


def write_inflated(
    model: PreTrainedModel, spelling: Spelling, shape: ModelShape, folder: Path, *, dtype: torch.dtype, seed: int
) -> None:
    """Write the inflated checkpoint with its spelling, a layer at a time: it never is in memory whole.

    Raises InflationError, naming the size or the config field, when the model does not fit into the shape.
    """
    inflation = _Inflation(model, shape, seed)
    folder.mkdir(parents=True, exist_ok=True)
    shards = inflation.layers + 1
    places, size = {}, 0
    for number, tensors in enumerate(inflation.shards(), start=1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        stored = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
        save_file(stored, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(stored, name))
        size += sum(tensor.nbytes for tensor in stored.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})
    inflation.config(dtype).save_pretrained(folder)
    spelling.model_copy(update={"vocab_size": inflation.vocab_size}).save(folder)


class _Inflation:
    """The weights of the larger model, from those of the smaller: h of H hidden dimensions, and so on."""

    def __init__(self, model: PreTrainedModel, shape: ModelShape, seed: int) -> None:
        if model.config.model_type != "llama":
            raise InflationError(f"config.model_type: {model.config.model_type!r}, only llama can be inflated")
        self._model: Any = model
        self._small = small = ModelShape.of(model.config)
        self._large = replace(shape, vocab_size=shape.vocab_size or small.vocab_size)
        self._random = torch.Generator().manual_seed(seed)
        self.vocab_size = self._large.vocab_size or 0
        self.layers = self._large.layers
        self._grows = self.vocab_size > (small.vocab_size or 0)
        _check_fits(model.config, small, self._large, needs_constant=self._grows)
        epsilon = small.hidden * model.config.rms_norm_eps  # what is added to the sum of squares
        # A power of two is exact in every number format. Half of epsilon at most is held by it.
        self._constant = 2.0 ** math.floor(math.log2(epsilon / 2) / 2) if self._grows else 0.0
        self._epsilon = (epsilon - self._constant**2) / self._large.hidden
        self._heads = _HeadPlaces(small, self._large)

    def config(self, dtype: torch.dtype) -> LlamaConfig:
        """The larger model's."""
        small, large = self._model.config, self._large
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=large.hidden,
            intermediate_size=large.intermediate,
            num_hidden_layers=large.layers,
            num_attention_heads=large.heads,
            num_key_value_heads=large.kv_heads,
            head_dim=large.head_dim,
            max_position_embeddings=small.max_position_embeddings,
            rms_norm_eps=self._epsilon,
            rope_parameters=small.rope_parameters,
            tie_word_embeddings=False,  # the constant is in the embedding of every token, and in no old row of the head
            pad_token_id=small.pad_token_id,
            bos_token_id=small.bos_token_id,
            eos_token_id=small.eos_token_id,
            dtype=dtype,
        )
        config.architectures = ["LlamaForCausalLM"]
        return config

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """A layer's weights by name, layer after layer, then the others."""
        trained = self._model.model.layers
        for index in range(self.layers):
            weights = self._layer(trained[index]) if index < len(trained) else self._identity()
            yield {f"model.layers.{index}.{name}.weight": weight for name, weight in weights.items()}
        yield {
            "model.embed_tokens.weight": self._embedding(),
            "model.norm.weight": self._final_norm(),
            "lm_head.weight": self._head(),
        }

    def _layer(self, layer: Any) -> dict[str, Tensor]:
        attention, mlp, small = layer.self_attn, layer.mlp, self._small
        weights, hidden, heads = self._identity(), slice(small.hidden), self._heads
        for name, rows in (("q", heads.query), ("k", heads.key), ("v", heads.value)):
            weights[f"self_attn.{name}_proj"][rows, hidden] = getattr(attention, f"{name}_proj").weight[
                heads.source[name]
            ]
        query = weights["self_attn.q_proj"]
        query[heads.query] *= math.sqrt(self._large.head_dim / small.head_dim)
        query[heads.unused_of_query] = 0  # else they would meet the random ones of the key
        weights["self_attn.o_proj"][hidden, heads.output] = attention.o_proj.weight
        for name in ("gate", "up"):
            weights[f"mlp.{name}_proj"][: small.intermediate, hidden] = getattr(mlp, f"{name}_proj").weight
        weights["mlp.down_proj"][hidden, : small.intermediate] = mlp.down_proj.weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[name] = self._norm(getattr(layer, name).weight)
        return weights

    def _identity(self) -> dict[str, Tensor]:
        """A layer that adds 0."""
        large = self._large
        query, key, norm = large.heads * large.head_dim, large.kv_heads * large.head_dim, torch.ones(self._small.hidden)
        return {
            "self_attn.q_proj": self._noise(query, large.hidden),
            "self_attn.k_proj": self._noise(key, large.hidden),
            "self_attn.v_proj": self._noise(key, large.hidden),
            "self_attn.o_proj": torch.zeros(large.hidden, query),
            "mlp.gate_proj": self._noise(large.intermediate, large.hidden),
            "mlp.up_proj": self._noise(large.intermediate, large.hidden),
            "mlp.down_proj": torch.zeros(large.hidden, large.intermediate),
            "input_layernorm": self._norm(norm),
            "post_attention_layernorm": self._norm(norm),
        }

    def _norm(self, weight: Tensor) -> Tensor:
        """0 for the new dimensions: the constant goes no further, and the others hold nothing."""
        wide = torch.zeros(self._large.hidden)
        wide[: self._small.hidden] = weight * math.sqrt(self._small.hidden / self._large.hidden)
        return wide

    def _final_norm(self) -> Tensor:
        wide = self._norm(self._model.model.norm.weight)
        if self._grows:
            wide[self._small.hidden] = _CONSTANT_LOGIT / (_PUSH * self._constant)
        return wide

    def _embedding(self) -> Tensor:
        wide = torch.zeros(self.vocab_size, self._large.hidden)
        small = self._model.model.embed_tokens.weight
        wide[: len(small), : self._small.hidden] = small
        if self._grows:
            wide[:, self._small.hidden] = self._constant
        return wide

    def _head(self) -> Tensor:
        wide, small = self._noise(self.vocab_size, self._large.hidden), self._model.lm_head.weight
        wide[: len(small), : self._small.hidden] = small
        if self._grows:
            wide[:, self._small.hidden] = 0
            wide[len(small) :, self._small.hidden] = -_PUSH
        return wide

    def _noise(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._random) * _STD


class _HeadPlaces:
    """Where the trained heads are among those of the larger model, as rows of its projections.

    A larger group of query heads per key holds a trained group; a smaller one holds a part, and the key stands there several
    times. query, key, value: rows; source: the trained rows that belong there, by projection. output: columns of o_proj.
    """

    def __init__(self, small: ModelShape, large: ModelShape) -> None:
        group, wide = small.heads // small.kv_heads, large.heads // large.kv_heads
        copies = -(-group // wide)
        if small.kv_heads * copies > large.kv_heads:
            raise InflationError(
                f"kv_heads: {large.kv_heads}, but {small.kv_heads} of {group} heads each need {small.kv_heads * copies} "
                f"of {wide} heads each"
            )
        heads = torch.arange(small.heads)
        of_key, member = heads // group, heads % group
        query_heads = (of_key * copies + member // wide) * wide + member % wide
        key_heads = torch.arange(small.kv_heads * copies)
        rotated, plain = _rotated_dimensions(small, large), torch.arange(small.head_dim)
        every = torch.arange(large.head_dim)
        unused = every[~torch.isin(every, rotated)]
        self.query = _rows(query_heads, rotated, large)
        self.unused_of_query = _rows(query_heads, unused, large)
        self.key = _rows(key_heads, rotated, large)
        self.value = _rows(key_heads, plain, large)
        self.output = _rows(query_heads, plain, large)
        keys = _rows(key_heads // copies, plain, small)
        self.source = {"q": slice(None), "k": keys, "v": keys}


def _rows(heads: Tensor, dimensions: Tensor, shape: ModelShape) -> Tensor:
    """Rows of a projection, head by head."""
    return (heads[:, None] * shape.head_dim + dimensions).flatten()


def _rotated_dimensions(small: ModelShape, large: ModelShape) -> Tensor:
    """Where a head's dimensions go: dimension i is rotated together with i + d/2, by base^(-2i/d) per position.

    In a head of m times the dimensions, m*i and m*i + D/2 are rotated by just that.
    """
    pairs = torch.arange(small.head_dim // 2) * (large.head_dim // small.head_dim)
    return torch.cat([pairs, pairs + large.head_dim // 2])


def _check_fits(config: Any, small: ModelShape, large: ModelShape, *, needs_constant: bool) -> None:
    if config.rope_parameters["rope_type"] != "default":
        raise InflationError(
            f"config.rope_parameters.rope_type: {config.rope_parameters['rope_type']!r}, not 'default'"
        )
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field):
            raise InflationError(f"config.{field}: a model with biases cannot be inflated")
    needed = replace(small, hidden=small.hidden + needs_constant)
    for field, least in vars(needed).items():
        if getattr(large, field) < least:
            raise InflationError(f"{field}: {getattr(large, field)}, the model needs {least}")
    if large.head_dim % small.head_dim:
        raise InflationError(f"head_dim: {large.head_dim}, must be a multiple of the model's {small.head_dim}")
    if large.heads % large.kv_heads:
        raise InflationError(f"heads: {large.heads}, must be a multiple of kv_heads, {large.kv_heads}")
