"""Writes a T5 as two ONNX graphs: an encoder, and a decoder of token trees.

The encoder maps the tokens of one prompt to the keys and values of every cross-attention of the decoder:

| tensor                         | type    | axes                       |
|--------------------------------|---------|----------------------------|
| input_ids                      | int64   | tokens                     |
| cross_key.{i}, cross_value.{i} | T       | tokens, kv_heads, head_dim |

The decoder has the inputs and outputs of every decoder (atspeed/training/decoder_graph.py). The first cached tokens of a tree
are its encoder rows. All tokens of the tree see all of them, and position 0 is that of the decoder's first token. So the
number of encoder rows follows from the mask: a token at position d sees them and d + 1 tokens of its path. Ancestors come
before their descendants, so the mask also tells the distance between a token and each of its ancestors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor
from transformers import PreTrainedModel

from atspeed.engine.model.decoder import kv_names
from atspeed.engine.model.encoder_decoder import ENCODER_FILE, ENCODER_INPUTS, encoder_outputs
from atspeed.training.decoder_graph import DecoderGraph, FloatArithmetic, MakeArithmetic, Module
from atspeed.training.graph_builder import WeightFile
from atspeed.training.ordered_attention import OrderedAttention

ENCODER_DATA_FILE = f"{ENCODER_FILE}.data"

# Operators by name of the activation, with their attributes.
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
}

_END = np.iinfo(np.int64).max  # of a slice without an end


class OrderedProducts(FloatArithmetic):
    """Products in float32 beside attention whose sums have one order, which `_T5Blocks` writes."""

    ordered = True


class _T5Blocks(DecoderGraph):
    """Blocks that encoder and decoder share."""

    def __init__(self, model: PreTrainedModel, weights: WeightFile, arithmetic: MakeArithmetic) -> None:
        super().__init__(model, weights, arithmetic)
        self._attention: dict[str, OrderedAttention] = {}

    def cast_weight(self, weight: Tensor) -> str:
        """Add a weight in T."""
        return self.tensor(weight.detach().to(self.dtype))

    def attend(self, query: str, key: str, value: str, bias: str) -> str:
        """Write attention without a scale, T [tokens, heads * head_dim].

        Args:
            query: [batch, new, heads * head_dim].
            key: [batch, rows, heads, head_dim].
            value: as `key`.
            bias: [batch, 1 or heads, new, rows].
        """
        heads, columns = self.shape.heads, self.integers(-1, self.shape.heads * self.shape.head_dim)
        if not self.arithmetic.ordered:
            merged = (
                self.op("Reshape", part, self.integers(0, 0, heads * self.shape.head_dim)) for part in (key, value)
            )
            mixed = self.op("Attention", query, *merged, bias, q_num_heads=heads, kv_num_heads=heads, scale=1.0)
            return self.op("Reshape", mixed, columns)
        if bias not in self._attention:
            self._attention[bias] = OrderedAttention(self, self.shape, bias, None, scale=1.0)
        keys_first = (self.op("Transpose", part, perm=[1, 0, 2, 3]) for part in (key, value))
        return self.op("Reshape", self._attention[bias].attend(query, *keys_first), columns)

    def feed_forward(self, layer: Module, hidden: str) -> str:
        """Write wo(f(wi(x))), or wo(f(wi_0(x)) * wi_1(x)) with a gate."""
        block, (operator, attributes) = layer.DenseReluDense, ACTIVATIONS[self.model.config.dense_act_fn]
        gated = self.model.config.is_gated_act
        inner, *gates = self.project(
            self.norm(layer.layer_norm, hidden), *((block.wi_0, block.wi_1) if gated else (block.wi,))
        )
        inner = self.op(operator, inner, **attributes)
        return self.project(self.op("Mul", inner, gates[0]) if gated else inner, block.wo)[0]

    def bias_of(self, distance: str, stack: Module, *, back: int, ahead: int) -> str:
        """Look up the position bias: int64 distances [batch, new, all] -> T [batch, heads, new, all].

        A distance counts tokens from a query to a key; it is cut to -back .. ahead.
        """
        bias = stack.block[0].layer[0].SelfAttention.compute_bias(1, back + ahead + 1, past_seen_tokens=back)
        limits = (self.tensor(torch.tensor(limit)) for limit in (-back, ahead))
        index = self.op("Add", self.op("Clip", distance, *limits), self.integers(back))
        looked_up = self.op("Gather", self.cast_weight(bias[0, :, 0].T), index)
        return self.op("Transpose", looked_up, perm=[0, 3, 1, 2])


class T5EncoderGraph(_T5Blocks):
    """The encoder over one prompt, and the projections of its result to the decoder's cross-attention."""

    def write_encoder(self) -> onnx.ModelProto:
        """Write the forward pass, and return the model."""
        model: Any = self.model
        hidden = self.arithmetic.embed(model.encoder.embed_tokens, "input_ids")
        bias = self.position_bias(model.encoder)
        for block in model.encoder.block:
            attention, feed_forward = block.layer
            hidden = self.op("Add", hidden, self.self_attention(attention, hidden, bias))
            hidden = self.op("Add", hidden, self.feed_forward(feed_forward, hidden))
        hidden = self.norm(model.encoder.final_layer_norm, hidden)
        crossing = [block.layer[1].EncDecAttention for block in model.decoder.block]
        rows = self.project(hidden, *(layer for cross in crossing for layer in (cross.k, cross.v)))
        shape = self.shape
        outputs = encoder_outputs(shape.layers, shape.kv_heads, shape.head_dim, str(self.dtype).removeprefix("torch."))
        for part, name in zip(rows, outputs, strict=True):
            self.op("Reshape", part, self.integers(-1, shape.kv_heads, shape.head_dim), name=name)
        return self.finished("encoder", ENCODER_INPUTS, outputs)

    def position_bias(self, encoder: Module) -> str:
        """Write the position bias of all pairs of tokens, T [1, heads, tokens, tokens]."""
        count = self.op("Squeeze", self.op("Shape", "input_ids"))
        zero, one = (self.tensor(torch.tensor(number)) for number in (0, 1))
        place = self.op("Range", zero, count, one)
        distance = self.op("Sub", *(self.op("Unsqueeze", place, self.integers(*axes)) for axes in ((0, 1), (0, 2))))
        reach = self.model.config.relative_attention_max_distance
        return self.bias_of(distance, encoder, back=reach, ahead=reach)

    def self_attention(self, layer: Module, hidden: str, bias: str) -> str:
        """Write attention between all tokens of the prompt."""
        block = layer.SelfAttention
        parts = self.project(self.norm(layer.layer_norm, hidden), block.q, block.k, block.v)
        query, *rows = (self.op("Unsqueeze", part, self.integers(0)) for part in parts)
        key, value = (
            self.op("Reshape", part, self.integers(0, 0, self.shape.heads, self.shape.head_dim)) for part in rows
        )
        return self.project(self.attend(query, key, value, bias), block.o)[0]


@dataclass(frozen=True)
class _Rows:
    """The rows of a pass, by tensor names.

    Attributes:
        least: int64 [1], encoder rows of the tree that has the fewest.
        most: int64 [1], encoder rows of the tree that has the most.
        self_bias: T [batch, heads, new, past+new - least].
        cross_bias: T [batch, 1, new, most].
    """

    least: str
    most: str
    self_bias: str
    cross_bias: str


class T5DecoderGraph(_T5Blocks):
    """The decoder over token trees."""

    def write(self, code_tokens: Sequence[int]) -> None:
        """Write the whole forward pass."""
        decoder: Any = self.model.decoder
        hidden = self.arithmetic.embed(decoder.embed_tokens, self.op("Reshape", "input_ids", self.integers(-1)))
        rows = self.rows(decoder)
        past, new = kv_names("past", self.shape.layers), kv_names("new", self.shape.layers)
        for block, past_kv, new_kv in zip(decoder.block, past, new, strict=True):
            own, cross, feed_forward = block.layer
            hidden = self.op("Add", hidden, self.self_attention(own, hidden, rows, past_kv, new_kv))
            hidden = self.op("Add", hidden, self.cross_attention(cross, hidden, rows, past_kv))
            hidden = self.op("Add", hidden, self.feed_forward(feed_forward, hidden))
        self.head(hidden, code_tokens)

    def rows(self, decoder: Module) -> _Rows:
        """Tell encoder rows from the decoder's own, and write both biases; see the module."""
        zero, lowest = (self.cast_weight(torch.tensor(number)) for number in (0.0, torch.finfo(self.dtype).min))
        one = self.tensor(torch.tensor(1.0))
        visible = self.op("Cast", self.op("Equal", "attn_bias", zero), to=TensorProto.FLOAT)
        # A row's place among the rows that a token sees, from 1; float32 counts exactly.
        place = self.op("CumSum", visible, self.tensor(torch.tensor(3)))
        seen = self.op("ReduceSum", visible, self.integers(3))
        path = self.op("Add", self.op("Cast", "position_ids", to=TensorProto.FLOAT), one)
        encoded = self.op("Sub", seen, self.op("Unsqueeze", path, self.integers(1, 3)))
        # Of each tree. A padding token sees only itself, so its number is 0 or less.
        by_tree = self.op("ReduceMax", encoded, self.integers(1, 2, 3), keepdims=0)
        least, most = (
            self.op("Cast", self.op(pick, by_tree, keepdims=1), to=TensorProto.INT64)
            for pick in ("ReduceMin", "ReduceMax")
        )
        is_encoded = self.op("LessOrEqual", place, encoded)
        cross_bias = self.before(self.op("Where", is_encoded, "attn_bias", lowest), most, axis=3)
        distance = self.op("Cast", self.behind(self.op("Sub", place, seen), least, axis=3), to=TensorProto.INT64)
        position = self.bias_of(
            self.op("Squeeze", distance, self.integers(1)),
            decoder,
            back=self.model.config.relative_attention_max_distance,
            ahead=0,
        )
        own = self.behind(self.op("Where", is_encoded, lowest, "attn_bias"), least, axis=3)
        return _Rows(least, most, self.op("Add", own, position), cross_bias)

    def self_attention(
        self, layer: Module, hidden: str, rows: _Rows, past_kv: tuple[str, str], new_kv: tuple[str, str]
    ) -> str:
        """Write attention of the new tokens to those of their paths."""
        block = layer.SelfAttention
        query, *parts = self.project(self.norm(layer.layer_norm, hidden), block.q, block.k, block.v)
        key, value = (
            self.op(
                "Concat", self.behind(past, rows.least, axis=1), self.of_trees(part, *self.kv_shape, name=new), axis=1
            )
            for past, part, new in zip(past_kv, parts, new_kv, strict=True)
        )
        return self.project(self.attend(self.queries(query), key, value, rows.self_bias), block.o)[0]

    def cross_attention(self, layer: Module, hidden: str, rows: _Rows, past_kv: tuple[str, str]) -> str:
        """Write attention of the new tokens to the encoder rows."""
        block = layer.EncDecAttention
        query = self.project(self.norm(layer.layer_norm, hidden), block.q)[0]
        key, value = (self.before(past, rows.most, axis=1) for past in past_kv)
        return self.project(self.attend(self.queries(query), key, value, rows.cross_bias), block.o)[0]

    def final(self, hidden: str) -> str:
        """Write the last norm, scaled where the config says so."""
        model: Any = self.model
        normed = self.norm(model.decoder.final_layer_norm, hidden)
        if not model.config.scale_decoder_outputs:
            return normed
        return self.op("Mul", normed, self.cast_weight(torch.tensor(self.shape.hidden**-0.5)))

    def queries(self, query: str) -> str:
        """Reshape [tokens, heads * head_dim] -> [batch, new, heads * head_dim]."""
        return self.of_trees(query, self.shape.heads * self.shape.head_dim)

    def before(self, value: str, end: str, *, axis: int) -> str:
        """Slice an axis up to `end`."""
        return self.op("Slice", value, self.integers(0), end, self.integers(axis))

    def behind(self, value: str, start: str, *, axis: int) -> str:
        """Slice an axis from `start` on."""
        return self.op("Slice", value, start, self.integers(_END), self.integers(axis))
