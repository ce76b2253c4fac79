"""Writes a Hugging Face decoder as an ONNX graph, operator by operator.

No tracer is involved, so every operator of the file is one written here. A batch row is one token tree: `new` tokens after
`past` cached ones. Keys and values are token-major, so a prefix of a cache is one contiguous slice; keys are stored after
the rotary embedding. T is float16 for precision "float16", else float32. This is the form for one batch row after the other;
a graph of ordered sums (atspeed/training/ordered_attention.py) has keys and values [past, batch, ...], and a `node_bias`
[batch, 1, new, last] for the last keys where prompts are long.

| input                        | type  | axes                            |                                                |
|------------------------------|-------|---------------------------------|------------------------------------------------|
| input_ids                    | int64 | batch, new                      | token ids                                      |
| position_ids                 | int64 | batch, new                      | depth of each token, counted from the root     |
| attn_bias                    | T     | batch, 1, new, past+new         | 0 where a token sees another, finfo.min where not |
| past_key.{i}, past_value.{i} | T     | batch, past, kv_heads, head_dim | the cached tokens of layer i; past may be 0    |
| out_index                    | int64 | rows                            | into the flattened batch x new tokens          |

| output                       | type    | axes                            |                                              |
|------------------------------|---------|---------------------------------|----------------------------------------------|
| code_logits                  | float32 | rows, C                         | of the code tokens only, in the order given  |
| log_normalizer               | float32 | rows                            | log-sum-exp over the whole vocabulary        |
| state                        | float32 | rows, hidden                    | of `TrunkGraph` only: what the head reads    |
| new_key.{i}, new_value.{i}   | T       | batch, new, kv_heads, head_dim  | the new tokens of layer i                    |

Weights are in a file beside the graph, whatever their size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import onnx
import torch
from onnx import TensorProto
from torch import Tensor
from transformers import PreTrainedModel

from atspeed.engine.model.decoder import graph_inputs, graph_outputs, kv_names
from atspeed.engine.model.graph_form import GraphForm
from atspeed.training.graph_builder import GraphBuilder, WeightFile, onnx_type

Module = Any  # torch types a submodule as Tensor | Module, which fits neither

_VECTOR = 16  # float32 numbers of the widest vector


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that a graph is written with."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab_size: int
    norm_epsilon: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> DecoderShape:
        """Read the sizes of a decoder of one of the supported families."""
        config = model.config
        heads = config.num_attention_heads
        if config.is_encoder_decoder:
            layers, epsilon = config.num_decoder_layers, config.layer_norm_epsilon
            return cls(layers, heads, heads, config.d_kv, config.d_model, config.vocab_size, epsilon)
        return cls(
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden=config.hidden_size,
            vocab_size=config.vocab_size,
            norm_epsilon=config.rms_norm_eps,
        )


class Arithmetic(Protocol):
    """The products of a graph in one precision. Implementations: `FloatArithmetic`, `int8_graph.Int8Arithmetic`.

    Attributes:
        dtype: T, the type of hidden states and of the cache.
        form: the form of the graph.
        ordered: true if its sums have one order, whatever else is in a pass.
    """

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102 - see the class
    @property
    def form(self) -> GraphForm: ...  # noqa: D102
    @property
    def ordered(self) -> bool: ...  # noqa: D102

    def embed(self, embedding: Module, tokens: str) -> str:
        """Look up the tokens' rows of the embedding, T [tokens, hidden]."""

    def product(self, hidden: str, layers: Sequence[Module]) -> str:
        """Write x W^T, T [tokens, out], for the layers' weights one below the other."""

    def weight(self, key: Hashable, value: Callable[[], Tensor]) -> str:
        """Add a weight in T that is no matrix. key: a name of it that no other weight has."""

    def attend(self, query: str, key: str, value: str) -> str:
        """Write attention itself. The result has any shape of [batch, new, heads * head_dim].

        Args:
            query: [batch, new, heads * head_dim].
            key: [batch, past+new, kv_heads, head_dim], or keys first.
            value: as `key`.
        """

    def logits(self, head: Module, normed: str) -> str:
        """Write the logits of the whole vocabulary, float32 [rows, vocab]."""


MakeArithmetic = Callable[["GraphBuilder", DecoderShape], Arithmetic]
"""Makes the arithmetic of a graph."""


class FloatArithmetic:
    """Products in one floating-point format.

    Weights of another format than that of the products are cast when the graph is loaded.

    Args:
        graph: the graph.
        shape: the sizes of the decoder.
        dtype: the format of the products.
        stored: the format of the weights; None for that of the products.
    """

    form = GraphForm()
    ordered = False

    def __init__(
        self,
        graph: GraphBuilder,
        shape: DecoderShape,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        self._stored = stored or dtype
        self._graph = graph
        self._shape = shape
        self._cast: dict[str, str] = {}

    def embed(self, embedding: Module, tokens: str) -> str:
        """Look up the tokens' rows of the table."""
        return self._in_dtype(self._graph.op("Gather", self._graph.kept(*self._table(embedding)), tokens))

    def product(self, hidden: str, layers: Sequence[Module]) -> str:
        """Write x W^T, [tokens, out], for the layers' weights one below the other."""
        weight = self.weight(("product", *map(id, layers)), lambda: stacked(layers).T)
        return self._graph.op("MatMul", hidden, weight)

    def weight(self, key: Hashable, value: Callable[[], Tensor]) -> str:
        """Add a weight, in the format of the products."""
        name = self._graph.kept(key, lambda: value().detach().to(self._stored))
        if name not in self._cast:
            self._cast[name] = self._in_dtype(name)
        return self._cast[name]

    def attend(self, query: str, key: str, value: str) -> str:
        """Write attention by the operator of that name."""
        heads, kv_heads = self._shape.heads, self._shape.kv_heads
        key, value = (self._merge_heads(part) for part in (key, value))
        return self._graph.op("Attention", query, key, value, "attn_bias", q_num_heads=heads, kv_num_heads=kv_heads)

    def logits(self, head: Module, normed: str) -> str:
        """Write the logits of the whole vocabulary, float32 [rows, vocab]."""
        logits = self._graph.op("Gemm", normed, self.weight(*self._table(head)), transB=1)
        return self._graph.op("Cast", logits, to=TensorProto.FLOAT)

    def logits_of(self, head: Module, normed: str, tokens: Sequence[int]) -> str:
        """Write the logits of some tokens, T [rows, tokens], by their rows of the head."""
        first, end = tokens[0], tokens[-1] + 1
        if list(tokens) == list(range(first, end)):
            rows = self._in_dtype(self._graph.kept_rows(*self._table(head), first, end))
        else:  # of a constant: onnxruntime looks them up once, when it loads the graph
            rows = self._graph.op("Gather", self.weight(*self._table(head)), self._graph.integers(*tokens))
        return self._graph.op("Gemm", normed, rows, transB=1)

    def _merge_heads(self, split: str) -> str:
        """Reshape [batch, tokens, kv_heads, head_dim] -> [batch, tokens, kv_heads * head_dim]."""
        merged = self._graph.integers(0, 0, self._shape.kv_heads * self._shape.head_dim)
        return self._graph.op("Reshape", split, merged)

    def _table(self, layer: Module) -> tuple[Hashable, Callable[[], Tensor]]:
        """Return key and value of a [vocab, hidden] weight; tied embedding and head have one key."""
        return ("table", layer.weight.data_ptr()), lambda: layer.weight.detach().to(self._stored)

    def _in_dtype(self, stored: str) -> str:
        return stored if self._stored == self.dtype else self._graph.op("Cast", stored, to=onnx_type(self.dtype))


def stacked(layers: Sequence[Module]) -> Tensor:
    """Return the layers' weights one below the other, [out, in]."""
    return torch.cat([layer.weight.detach() for layer in layers])


class DecoderGraph(GraphBuilder):
    """The decoder's blocks, each a method from tensor names to tensor names.

    A model family changes the blocks. A precision changes the `arithmetic`, which multiplies. Hidden states are
    T [tokens, hidden], with the trees' tokens one after the other; only attention separates the trees.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: WeightFile,
        arithmetic: MakeArithmetic,
    ) -> None:
        super().__init__(weights)
        self.model = model
        self.shape = DecoderShape.of(model)
        self.arithmetic = arithmetic(self, self.shape)
        self.dtype = self.arithmetic.dtype
        self._axes: dict[tuple[int, ...], str] = {}

    def write(self, code_tokens: Sequence[int]) -> None:
        """Write the whole forward pass."""
        decoder = self.model.model
        hidden = self.embedded(decoder.embed_tokens)
        rotation = self.rotation(decoder.rotary_emb)
        past, new = kv_names("past", self.shape.layers), kv_names("new", self.shape.layers)
        for layer, past_kv, new_kv in zip(decoder.layers, past, new, strict=True):
            hidden = self.op("Add", hidden, self.attention(layer, hidden, rotation, past_kv, new_kv))
            hidden = self.op("Add", hidden, self.mlp(layer, self.norm(layer.post_attention_layernorm, hidden)))
        self.head(hidden, code_tokens)

    def embedded(self, embedding: Module) -> str:
        """Look up the new tokens, T [tokens, hidden]."""
        hidden = self.arithmetic.embed(embedding, self.op("Reshape", "input_ids", self.integers(-1)))
        if (scale := getattr(embedding, "embed_scale", None)) is None:
            return hidden
        return self.op("Mul", hidden, self.arithmetic.weight(("scale", id(embedding)), lambda: scale))  # Gemma

    def rotation(self, rotary: Module) -> tuple[str, str]:
        """Compute cosine and sine of every new token's position, T [batch, new, head_dim / 2]; angles are float32."""
        position = self.op("Cast", self.op("Unsqueeze", "position_ids", self.integers(2)), to=TensorProto.FLOAT)
        # Cos and Sin round the last numbers of a tensor otherwise, if they do not fill a vector. So every token fills some.
        frequencies = rotary.inv_freq
        padded = torch.nn.functional.pad(frequencies, (0, -len(frequencies) % _VECTOR))
        angle = self.op("Mul", position, self.kept(("inv_freq", id(rotary)), lambda: padded))
        cos, sin = (self.op(function, angle) for function in ("Cos", "Sin"))
        if rotary.attention_scaling != 1:  # yarn
            scaling = torch.tensor([rotary.attention_scaling], dtype=torch.float32)
            scale = self.kept(("attention_scaling", id(rotary)), lambda: scaling)
            cos, sin = (self.op("Mul", part, scale) for part in (cos, sin))
        if len(padded) > len(frequencies):
            span = (self.integers(0), self.integers(len(frequencies)), self.integers(2))
            cos, sin = (self.op("Slice", part, *span) for part in (cos, sin))
        return self.cast(cos), self.cast(sin)

    def attention(
        self, layer: Module, hidden: str, rotation: tuple[str, str], past_kv: tuple[str, str], new_kv: tuple[str, str]
    ) -> str:
        """Write grouped-query attention of the new tokens to the cached and the new ones."""
        block, shape = layer.self_attn, self.shape
        query, key, value = self.rotated(block, self.norm(layer.input_layernorm, hidden), rotation)
        key, value = (
            self.with_past(past, part, new) for past, part, new in zip(past_kv, (key, value), new_kv, strict=True)
        )
        mixed = self.arithmetic.attend(query, key, value)
        return self.project(self.op("Reshape", mixed, self.integers(-1, shape.heads * shape.head_dim)), block.o_proj)[0]

    def with_past(self, past: str, new: str, name: str) -> str:
        """Append the keys or values of the new tokens, which are called `name`, to the cached ones."""
        if not self.arithmetic.form.keys_first:
            return self.op("Concat", past, self.of_trees(new, *self.kv_shape, name=name), axis=1)
        tokens = self.op("Transpose", self.of_trees(new, *self.kv_shape), name=name, perm=[1, 0, 2, 3])
        return self.op("Concat", past, tokens, axis=0)

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Return the sizes of one token's keys in a layer."""
        return self.shape.kv_heads, self.shape.head_dim

    def rotated(self, block: Module, normed: str, rotation: tuple[str, str]) -> tuple[str, str, str]:
        """Write query and key after the rotary embedding, T [batch, new, heads * head_dim], and value, T [tokens, ...]."""
        shape = self.shape
        query, key, value = self.projections(
            normed, block, "qkv_proj", ("q_proj", "k_proj", "v_proj"), (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        query, key = (
            self.op("RotaryEmbedding", self.of_trees(part, heads * shape.head_dim), *rotation, num_heads=heads)
            for part, heads in (
                (self.head_norm(block, "q_norm", query, shape.heads), shape.heads),
                (self.head_norm(block, "k_norm", key, shape.kv_heads), shape.kv_heads),
            )
        )
        return query, key, value

    def mlp(self, layer: Module, normed: str) -> str:
        """Write down(act(gate(x)) * up(x))."""
        gate, up = self.projections(normed, layer.mlp, "gate_up_proj", ("gate_proj", "up_proj"), (1, 1))
        return self.project(self.op("Mul", self.activation(gate), up), layer.mlp.down_proj)[0]

    def activation(self, gate: str) -> str:
        """Write silu, or the tanh form of gelu (Gemma)."""
        if self.model.config.hidden_act == "silu":
            return self.op("Mul", gate, self.op("Sigmoid", gate))
        return self.op("Gelu", gate, approximate="tanh")

    def head(self, hidden: str, code_tokens: Sequence[int]) -> None:
        """Write code logits and log-normalizer of the requested rows, float32."""
        logits = self.arithmetic.logits(self.model.lm_head, self.final(self.op("Gather", hidden, "out_index")))
        self.op("ReduceLogSumExp", logits, self.integers(1), name="log_normalizer", keepdims=0)
        self.code_columns(logits, code_tokens, name="code_logits")

    def code_columns(self, values: str, code_tokens: Sequence[int], *, name: str) -> str:
        """Take the columns of the code tokens: [rows, vocab] -> [rows, C]."""
        first, last = code_tokens[0], code_tokens[-1]
        if list(code_tokens) == list(range(first, last + 1)):
            span = (self.integers(first), self.integers(last + 1), self.integers(1))
            return self.op("Slice", values, *span, name=name)
        return self.op("Gather", values, self.integers(*code_tokens), name=name, axis=1)

    @property
    def state_size(self) -> int:
        """Return the size of the state that the graph gives; 0 for none."""
        return 0

    def final(self, hidden: str) -> str:
        """Write what follows the last layer, before the head."""
        return self.norm(self.model.model.norm, hidden)

    def norm(self, norm: Module, hidden: str) -> str:
        """Write RMS norm over the last axis, computed in float32."""
        return self.op("RMSNormalization", hidden, self.norm_weight(norm), epsilon=self.shape.norm_epsilon)

    def norm_weight(self, norm: Module) -> str:
        """Add the weight of a norm; Gemma stores it around 0."""
        offset = 1.0 if self.model.config.model_type == "gemma" else 0.0
        return self.arithmetic.weight(("norm", id(norm)), lambda: norm.weight + offset)

    def head_norm(self, block: Module, name: str, projected: str, heads: int) -> str:
        """Write RMS norm of each head separately, if the model has one (Qwen3)."""
        if not hasattr(block, name):
            return projected
        return self.norm(
            getattr(block, name), self.op("Reshape", projected, self.integers(-1, heads, self.shape.head_dim))
        )

    def project(self, hidden: str, *layers: Module) -> list[str]:
        """Write x W^T + b of each layer, [tokens, out].

        All layers share one product, which is faster for passes of few tokens.
        """
        return self.split(self.product(hidden, *layers), [len(layer.weight) for layer in layers])

    def product(self, hidden: str, *layers: Module) -> str:
        """Write x W^T + b of the layers side by side, [tokens, out]."""
        result = self.arithmetic.product(hidden, layers)
        if layers[0].bias is None:
            return result
        key = ("bias", *map(id, layers))
        bias = self.arithmetic.weight(key, lambda: torch.cat([layer.bias.detach() for layer in layers]))
        return self.op("Add", result, bias)

    def projections(
        self, hidden: str, block: Module, whole: str, parts: Sequence[str], shares: Sequence[int]
    ) -> list[str]:
        """Write the projections `parts` of a block. Phi stores them as one, `whole`, with these shares of its outputs."""
        if not hasattr(block, whole):
            return self.project(hidden, *(getattr(block, part) for part in parts))
        layer = getattr(block, whole)
        share = len(layer.weight) // sum(shares)
        return self.split(self.project(hidden, layer)[0], [count * share for count in shares])

    def of_trees(self, flat: str, *sizes: int, name: str = "") -> str:
        """Reshape [tokens, ...] -> [batch, new, *sizes]."""
        if sizes not in self._axes:
            self._axes[sizes] = self.op("Concat", self.op("Shape", "input_ids"), self.integers(*sizes), axis=0)
        return self.op("Reshape", flat, self._axes[sizes], name=name)

    def cast(self, value: str) -> str:
        """Cast a float32 value to T."""
        return value if self.dtype == torch.float32 else self.op("Cast", value, to=onnx_type(self.dtype))

    def to_model(self, columns: int) -> onnx.ModelProto:
        """Return the finished model with the contract's inputs and outputs."""
        sizes = (self.shape.layers, *self.kv_shape, str(self.dtype).removeprefix("torch."))
        form, ordered = self.arithmetic.form, self.arithmetic.ordered
        inputs, outputs = graph_inputs(*sizes, form), graph_outputs(*sizes, columns, form, self.state_size)
        return self.finished("token_tree_decoder", inputs, outputs, ordered=ordered)


class TrunkGraph(DecoderGraph):
    """The decoder of a draft with heads: it also gives the state of each requested row, which the heads read."""

    @property
    def state_size(self) -> int:
        """Return the size of the state."""
        return self.shape.hidden

    def final(self, hidden: str) -> str:
        """Write the norm of the last layer as an output of its own."""
        return self.op("Identity", super().final(hidden), name="state")
