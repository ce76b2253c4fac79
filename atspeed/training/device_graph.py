"""Writes the graph of a decoder for devices: KV in a paged pool, few kernels.

The contract is in atspeed/engine/model/device_graph.py. The weights are those that the host's graph has written. What differs
from the host's graph, and why:

- Keys and values are scattered into the pools in place, and gathered by slot. Where heads share keys the gather repeats
  them, since CUDA's attention would do that in two more kernels.
- The attention bias is made once per pass, from prefix lengths and ancestors: a full mask would be most of what a pass copies.
- The norms of a layer's queries and keys are one operator, and so is their rotary embedding (Qwen3).
- Residual and norm are one operator, silu is one, and so is the normalisation over the vocabulary. ReduceLogSumExp is seven
  kernels on CUDA, and its only user of cuDNN.
- The head multiplies the code rows alone where the scoring rule needs no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from transformers import PreTrainedModel

from atspeed.engine.bundle.manifest import Head
from atspeed.engine.model.device_graph import SCORES, device_inputs, device_outputs, pool_names
from atspeed.training.decoder_graph import DecoderGraph, DecoderShape, FloatArithmetic, Module
from atspeed.training.graph_builder import WeightFile

_CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class _Places:
    """Tensors that the attention of every layer reads, by name.

    Attributes:
        slots: int64 [batch, new, 1], the slots of the new tokens.
        rows: int32, the rows of the pools that hold the keys of each place: [batch, capacity] slots where every head has
            keys of its own, else [batch, capacity, heads] heads of slots.
        bias: T [batch, 1, new, capacity], 0 where a token sees a place, the lowest number where not.
    """

    slots: str
    rows: str
    bias: str


class DeviceGraph(DecoderGraph):
    """The decoder's blocks over paged pools.

    Args:
        model: the checkpoint.
        weights: the weight file that the host's graph was written to.
        dtype: the format of weights and products.
        head: the tokens whose logits are computed.
    """

    arithmetic: FloatArithmetic

    def __init__(self, model: PreTrainedModel, weights: WeightFile, dtype: torch.dtype, head: Head) -> None:
        super().__init__(model, weights, partial(FloatArithmetic, dtype=dtype))
        self._head = head

    def write(self, code_tokens: Sequence[int]) -> None:
        """Write the whole forward pass."""
        decoder = self.model.model
        residual, branch = self.embedded(decoder.embed_tokens), ""
        rotation, places = self.rotation(decoder.rotary_emb), self.places()
        for index, layer in enumerate(decoder.layers):
            normed, residual = self.joined(layer.input_layernorm, residual, branch)
            branch = self.paged_attention(layer.self_attn, normed, rotation, places, index)
            normed, residual = self.joined(layer.post_attention_layernorm, residual, branch)
            branch = self.mlp(layer, normed)
        normed, _ = self.joined(decoder.norm, residual, branch)
        self.scores(self.op("Gather", normed, "out_index"), code_tokens)

    def joined(self, norm: Module, residual: str, branch: str) -> tuple[str, str]:
        """Add a block's result to the residual; return the norm of the sum and the sum, T [tokens, hidden]."""
        if not branch:
            return self.norm(norm, residual), residual
        name = f"Joined_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [residual, branch, self.norm_weight(norm)],
                [name, "", "", f"{name}_sum"],
                name=name,
                domain=_CONTRIB,
                epsilon=self.shape.norm_epsilon,
            )
        )
        return name, f"{name}_sum"

    def places(self) -> _Places:
        """Write what all layers share."""
        return _Places(self.op("Unsqueeze", "write_slots", self.integers(2)), self.rows(), self.bias())

    def rows(self) -> str:
        """Write the rows of the pools that are gathered; see `_Places`."""
        shape = self.shape
        if shape.heads == shape.kv_heads:
            return "slot_table"
        # Head h reads the keys of head h / group: row slot * kv_heads + h / group of the pool, as [slots * kv_heads, head_dim].
        first = self.op(
            "Mul",
            self.op("Unsqueeze", "slot_table", self.integers(2)),
            self.constant(np.asarray([shape.kv_heads], dtype=np.int32)),
        )
        read = np.arange(shape.heads, dtype=np.int32) // (shape.heads // shape.kv_heads)
        return self.op("Add", first, self.constant(read))

    def bias(self) -> str:
        """Write the attention bias from the prefix lengths and the ancestors; see `_Places`."""
        lowest, zero = (
            self.tensor(torch.tensor(value, dtype=self.dtype)) for value in (torch.finfo(self.dtype).min, 0)
        )
        first, step = (self.constant(np.asarray(value)) for value in (0, 1))
        capacity = self.op("Squeeze", self.op("Shape", "slot_table", start=1, end=2))
        place = self.op("Range", first, capacity, step)
        in_prefix = self.op("Less", place, self.op("Unsqueeze", "prefix_lengths", self.integers(2)))
        zeros = self.op("Expand", zero, self.op("Shape", "ancestors"))
        prefix = self.op("Where", in_prefix, zero, lowest)
        return self.op("Unsqueeze", self.op("ScatterElements", prefix, "ancestors", zeros, axis=2), self.integers(1))

    def paged_attention(
        self, block: Module, normed: str, rotation: tuple[str, str], places: _Places, layer: int
    ) -> str:
        """Write attention of the new tokens to the places of their trees; the pools take their keys and values first."""
        shape = self.shape
        query, key, value = self.rotated(block, normed, rotation)
        written = (key, self.of_trees(value, shape.kv_heads * shape.head_dim))
        names = zip(pool_names(shape.layers)[layer], pool_names(shape.layers, out=True)[layer], written, strict=True)
        key, value = (
            self.gathered(self.op("ScatterND", pool, places.slots, new, name=out), places) for pool, out, new in names
        )
        mixed = self.attended(query, key, value, places.bias)
        return self.project(self.op("Reshape", mixed, self.integers(-1, shape.heads * shape.head_dim)), block.o_proj)[0]

    def rotated(self, block: Module, normed: str, rotation: tuple[str, str]) -> tuple[str, str, str]:
        """Write query, key and value; where heads have norms (Qwen3), those of queries and keys are one kernel."""
        if not hasattr(block, "q_norm"):
            return super().rotated(block, normed, rotation)
        shape = self.shape
        heads, of_keys = shape.heads + shape.kv_heads, shape.kv_heads * shape.head_dim
        projected = self.product(normed, block.q_proj, block.k_proj, block.v_proj)
        both, value = self.split(projected, [heads * shape.head_dim, of_keys])
        weight = self.arithmetic.weight(("head norms", id(block)), partial(_head_weights, block, shape))
        by_head = self.op("Reshape", both, self.integers(-1, heads, shape.head_dim))
        both = self.of_trees(
            self.op("RMSNormalization", by_head, weight, epsilon=shape.norm_epsilon), heads * shape.head_dim
        )
        rotated = self.op("RotaryEmbedding", both, *rotation, num_heads=heads)
        query, key = self.split(rotated, [shape.heads * shape.head_dim, of_keys])
        return query, key, value

    def attended(self, query: str, key: str, value: str, bias: str) -> str:
        """Write attention itself, T [batch, new, heads * head_dim].

        ONNX's operator has a kernel more on CUDA, for rows that see nothing, of which there is none here. The other one is not
        fused in float32, for few tokens.
        """
        heads = self.shape.heads
        if self.dtype == torch.float32:
            return self.op("Attention", query, key, value, bias, q_num_heads=heads, kv_num_heads=heads)
        return self.op("MultiHeadAttention", query, key, value, "", "", bias, domain=_CONTRIB, num_heads=heads)

    def gathered(self, pool: str, places: _Places) -> str:
        """Gather the keys or values of every place, for every head: T [batch, capacity, heads * head_dim]."""
        shape = self.shape
        if shape.heads == shape.kv_heads:
            return self.op("Gather", pool, places.rows)
        by_head = self.op("Gather", self.op("Reshape", pool, self.integers(-1, shape.head_dim)), places.rows)
        return self.op("Reshape", by_head, self.integers(0, 0, shape.heads * shape.head_dim))

    def activation(self, gate: str) -> str:
        """Write silu as one operator; Gemma's is one already."""
        if self.model.config.hidden_act != "silu":
            return super().activation(gate)
        return self.op("QuickGelu", gate, domain=_CONTRIB, alpha=1.0)

    def scores(self, normed: str, code_tokens: Sequence[int]) -> None:
        """Write the scores of the code tokens, float32 [rows, C]."""
        name = SCORES[self._head]
        if self._head == "vocab":
            logits = self.arithmetic.logits(self.model.lm_head, normed)
            self.code_columns(self.op("LogSoftmax", logits, axis=1), code_tokens, name=name)
        else:
            logits = self.arithmetic.logits_of(self.model.lm_head, normed, code_tokens)
            self.op("Cast", logits, name=name, to=TensorProto.FLOAT)

    def to_model(self, columns: int) -> onnx.ModelProto:
        """Return the finished model with the contract's inputs and outputs."""
        sizes = (self.shape.layers, self.shape.kv_heads, self.shape.head_dim, str(self.dtype).removeprefix("torch."))
        return self.finished("device_decoder", device_inputs(*sizes), device_outputs(*sizes, columns, self._head))


def _head_weights(block: Module, shape: DecoderShape) -> Tensor:
    """Return the weights of the norms of all heads, queries before keys, [1, heads + kv_heads, head_dim]."""
    norms = ((block.q_norm, shape.heads), (block.k_norm, shape.kv_heads))
    return torch.cat([norm.weight.detach().expand(heads, -1) for norm, heads in norms])[None]
