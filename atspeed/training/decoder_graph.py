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
| new_key.{i}, new_value.{i}   | T       | batch, new, kv_heads, head_dim  | the new tokens of layer i                    |

Weights are in a file beside the graph, whatever their size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from transformers import PreTrainedModel

from atspeed.engine.model.decoder import TensorSpec, graph_inputs, graph_outputs, kv_names
from atspeed.engine.model.graph_form import ORDERED, GraphForm

Module = Any  # torch types a submodule as Tensor | Module, which fits neither

DATA_FILE = "model.onnx.data"

_OPSET = 23  # the first opset with Attention, RotaryEmbedding and RMSNormalization
_IR_VERSION = 11  # the IR version that onnx released together with opset 23
_VECTOR = 16  # float32 numbers of the widest vector
_PAGE = 4096  # tensors start on pages: onnxruntime maps the file where it cannot take a tensor from memory


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


class GraphBuilder:
    """Collects nodes and initializers: small numbers in the graph itself, weights in the data file."""

    def __init__(self, data: BinaryIO, data_file: str = DATA_FILE) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._data = data
        self._data_file = data_file

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output, called `name` or numbered. Returns the output's name."""
        output = name or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attributes))
        return output

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """Split the last axis into parts of these sizes."""
        if len(sizes) == 1:
            return [value]
        name = f"Split_{len(self.nodes)}"
        parts = [f"{name}_{part}" for part in range(len(sizes))]
        self.nodes.append(helper.make_node("Split", [value, self.integers(*sizes)], parts, name=name, axis=-1))
        return parts

    def integers(self, *values: int) -> str:
        """Add an int64 vector."""
        name = f"integers_{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def floats(self, *values: float) -> str:
        """Add a float32 vector."""
        name = f"floats_{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.FLOAT, [len(values)], values))
        return name

    def tensor(self, tensor: Tensor) -> str:
        """Append a weight to the data file, in its own dtype."""
        array = tensor.detach().cpu().contiguous().numpy()
        name = f"weight_{len(self.initializers)}"
        self._data.write(bytes(-self._data.tell() % _PAGE))
        place = {"location": self._data_file, "offset": self._data.tell(), "length": array.nbytes}
        self._data.write(array.data)
        proto = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        proto.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self.initializers.append(proto)
        return name

    def finished(
        self, name: str, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec], *, ordered: bool = False
    ) -> onnx.ModelProto:
        """Return the graph as a model with these inputs and outputs. ordered: whether its sums have one order."""
        fed, fetched = ([_value_info(*one) for one in specs.items()] for specs in (inputs, outputs))
        graph = helper.make_graph(self.nodes, name, fed, fetched, self.initializers)
        domains = sorted({"", *(node.domain for node in self.nodes)})
        opsets = [helper.make_opsetid(domain, 1 if domain else _OPSET) for domain in domains]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="atspeed-serving")
        if ordered:
            helper.set_model_props(model, {ORDERED: "true"})
        return model


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

    def product(self, hidden: str, weight: Tensor) -> str:
        """Write x W^T, T [tokens, out]. weight: [out, in]."""

    def attend(self, query: str, key: str, value: str) -> str:
        """Write attention itself. The result has any shape of [batch, new, heads * head_dim].

        Args:
            query: [batch, new, heads * head_dim].
            key: [batch, past+new, kv_heads, head_dim], or keys first.
            value: as `key`.
        """

    def logits(self, head: Module, normed: str) -> str:
        """Write the logits of the whole vocabulary, float32 [rows, vocab]."""


class FloatArithmetic:
    """Products in float32 or float16."""

    form = GraphForm()
    ordered = False

    def __init__(self, graph: GraphBuilder, shape: DecoderShape, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._graph = graph
        self._shape = shape
        self._tables: dict[int, str] = {}

    def embed(self, embedding: Module, tokens: str) -> str:
        """Look up the tokens' rows of the table."""
        return self._graph.op("Gather", self._table(embedding), tokens)

    def product(self, hidden: str, weight: Tensor) -> str:
        """Write x W^T, [tokens, out]. weight: [out, in]."""
        return self._graph.op("MatMul", hidden, self._weight(weight.T))

    def attend(self, query: str, key: str, value: str) -> str:
        """Write attention by the operator of that name."""
        heads, kv_heads = self._shape.heads, self._shape.kv_heads
        key, value = (self._merge_heads(part) for part in (key, value))
        return self._graph.op("Attention", query, key, value, "attn_bias", q_num_heads=heads, kv_num_heads=kv_heads)

    def logits(self, head: Module, normed: str) -> str:
        """Write the logits of the whole vocabulary, float32 [rows, vocab]."""
        logits = self._graph.op("Gemm", normed, self._table(head), transB=1)
        return self._graph.op("Cast", logits, to=TensorProto.FLOAT)

    def _merge_heads(self, split: str) -> str:
        """Reshape [batch, tokens, kv_heads, head_dim] -> [batch, tokens, kv_heads * head_dim]."""
        merged = self._graph.integers(0, 0, self._shape.kv_heads * self._shape.head_dim)
        return self._graph.op("Reshape", split, merged)

    def _table(self, layer: Module) -> str:
        """Add a [vocab, hidden] weight; tied embedding and head are written once."""
        key = layer.weight.data_ptr()
        if key not in self._tables:
            self._tables[key] = self._weight(layer.weight)
        return self._tables[key]

    def _weight(self, weight: Tensor) -> str:
        return self._graph.tensor(weight.detach().to(self.dtype))


class DecoderGraph(GraphBuilder):
    """The decoder's blocks, each a method from tensor names to tensor names.

    A model family changes the blocks. A precision changes the `arithmetic`, which multiplies. Hidden states are
    T [tokens, hidden], with the trees' tokens one after the other; only attention separates the trees.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: BinaryIO,
        arithmetic: Callable[[GraphBuilder, DecoderShape], Arithmetic],
        data_file: str = DATA_FILE,
    ) -> None:
        super().__init__(data, data_file)
        self.model = model
        self.shape = DecoderShape.of(model)
        self.arithmetic = arithmetic(self, self.shape)
        self.dtype = self.arithmetic.dtype
        self.onnx_dtype = TensorProto.FLOAT16 if self.dtype == torch.float16 else TensorProto.FLOAT
        self._axes: dict[tuple[int, ...], str] = {}

    def write(self, code_tokens: Sequence[int]) -> None:
        """Write the whole forward pass."""
        decoder = self.model.model
        hidden = self.arithmetic.embed(decoder.embed_tokens, self.op("Reshape", "input_ids", self.integers(-1)))
        if (scale := getattr(decoder.embed_tokens, "embed_scale", None)) is not None:  # Gemma
            hidden = self.op("Mul", hidden, self.cast_weight(scale))
        rotation = self.rotation(decoder.rotary_emb)
        past, new = kv_names("past", self.shape.layers), kv_names("new", self.shape.layers)
        for layer, past_kv, new_kv in zip(decoder.layers, past, new, strict=True):
            hidden = self.op("Add", hidden, self.attention(layer, hidden, rotation, past_kv, new_kv))
            hidden = self.op("Add", hidden, self.mlp(layer, hidden))
        self.head(hidden, code_tokens)

    def rotation(self, rotary: Module) -> tuple[str, str]:
        """Compute cosine and sine of every new token's position, T [batch, new, head_dim / 2]; angles are float32."""
        position = self.op("Cast", self.op("Unsqueeze", "position_ids", self.integers(2)), to=TensorProto.FLOAT)
        # Cos and Sin round the last numbers of a tensor otherwise, if they do not fill a vector. So every token fills some.
        frequencies = rotary.inv_freq
        padded = torch.nn.functional.pad(frequencies, (0, -len(frequencies) % _VECTOR))
        angle = self.op("Mul", position, self.tensor(padded))
        scale = self.tensor(torch.tensor([rotary.attention_scaling], dtype=torch.float32))
        cos, sin = (self.op("Mul", self.op(function, angle), scale) for function in ("Cos", "Sin"))
        if len(padded) > len(frequencies):
            span = (self.integers(0), self.integers(len(frequencies)), self.integers(2))
            cos, sin = (self.op("Slice", part, *span) for part in (cos, sin))
        return self.cast(cos), self.cast(sin)

    def attention(
        self, layer: Module, hidden: str, rotation: tuple[str, str], past_kv: tuple[str, str], new_kv: tuple[str, str]
    ) -> str:
        """Write grouped-query attention of the new tokens to the cached and the new ones."""
        block, shape = layer.self_attn, self.shape
        normed = self.norm(layer.input_layernorm, hidden)
        query, key, value = self.project(normed, block.q_proj, block.k_proj, block.v_proj)
        query, key = (
            self.op("RotaryEmbedding", self.of_trees(part, heads * shape.head_dim), *rotation, num_heads=heads)
            for part, heads in (
                (self.head_norm(block, "q_norm", query, shape.heads), shape.heads),
                (self.head_norm(block, "k_norm", key, shape.kv_heads), shape.kv_heads),
            )
        )
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

    def mlp(self, layer: Module, hidden: str) -> str:
        """Write down(act(gate(x)) * up(x)); act is silu, or the tanh form of gelu (Gemma)."""
        normed = self.norm(layer.post_attention_layernorm, hidden)
        gate, up = self.project(normed, layer.mlp.gate_proj, layer.mlp.up_proj)
        if self.model.config.hidden_act == "silu":
            activated = self.op("Mul", gate, self.op("Sigmoid", gate))
        else:
            activated = self.op("Gelu", gate, approximate="tanh")
        return self.project(self.op("Mul", activated, up), layer.mlp.down_proj)[0]

    def head(self, hidden: str, code_tokens: Sequence[int]) -> None:
        """Write code logits and log-normalizer of the requested rows, float32."""
        logits = self.arithmetic.logits(self.model.lm_head, self.final(self.op("Gather", hidden, "out_index")))
        self.op("ReduceLogSumExp", logits, self.integers(1), name="log_normalizer", keepdims=0)
        first, last = code_tokens[0], code_tokens[-1]
        if list(code_tokens) == list(range(first, last + 1)):
            span = (self.integers(first), self.integers(last + 1), self.integers(1))
            self.op("Slice", logits, *span, name="code_logits")
        else:
            self.op("Gather", logits, self.integers(*code_tokens), name="code_logits", axis=1)

    def final(self, hidden: str) -> str:
        """Write what follows the last layer, before the head."""
        return self.norm(self.model.model.norm, hidden)

    def norm(self, norm: Module, hidden: str) -> str:
        """Write RMS norm over the last axis, computed in float32."""
        weight = (
            norm.weight + 1.0 if self.model.config.model_type == "gemma" else norm.weight
        )  # Gemma stores it around 0
        return self.op("RMSNormalization", hidden, self.cast_weight(weight), epsilon=self.shape.norm_epsilon)

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
        result = self.arithmetic.product(hidden, torch.cat([layer.weight.detach() for layer in layers]))
        if layers[0].bias is not None:
            result = self.op("Add", result, self.cast_weight(torch.cat([layer.bias.detach() for layer in layers])))
        return self.split(result, [len(layer.weight) for layer in layers])

    def of_trees(self, flat: str, *sizes: int, name: str = "") -> str:
        """Reshape [tokens, ...] -> [batch, new, *sizes]."""
        if sizes not in self._axes:
            self._axes[sizes] = self.op("Concat", self.op("Shape", "input_ids"), self.integers(*sizes), axis=0)
        return self.op("Reshape", flat, self._axes[sizes], name=name)

    def cast_weight(self, weight: Tensor) -> str:
        """Add a weight in T."""
        return self.tensor(weight.detach().to(self.dtype))

    def cast(self, value: str) -> str:
        """Cast a float32 value to T."""
        return value if self.dtype == torch.float32 else self.op("Cast", value, to=self.onnx_dtype)

    def to_model(self, columns: int) -> onnx.ModelProto:
        """Return the finished model with the contract's inputs and outputs."""
        sizes = (self.shape.layers, *self.kv_shape, str(self.dtype).removeprefix("torch."))
        form, ordered = self.arithmetic.form, self.arithmetic.ordered
        inputs, outputs = graph_inputs(*sizes, form), graph_outputs(*sizes, columns, form)
        return self.finished("token_tree_decoder", inputs, outputs, ordered=ordered)


def _value_info(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(name, dtype, list(spec.axes))
