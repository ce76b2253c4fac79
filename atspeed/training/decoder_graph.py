"""A decoder as an ONNX graph, written operator by operator from a Hugging Face model: no tracer, nothing implicit.

A batch row is one token tree: `new` tokens behind `past` cached ones. Keys and values are token-major, so that a prefix of a
cache is one contiguous slice; keys are stored after rotary. T is float16 for precision "float16", else float32.

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

Weights stand in a file beside the graph, at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from transformers import PreTrainedModel

from atspeed.engine.model.decoder import TensorSpec, graph_inputs, graph_outputs, kv_names

Module = Any  # torch types a submodule as Tensor | Module, which says less than nothing

DATA_FILE = "model.onnx.data"

_OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization
_IR_VERSION = 11
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
        """Those of a Llama, Qwen2 or Qwen3."""
        config = model.config
        heads = config.num_attention_heads
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
    """Nodes, and initializers: small integers in the graph itself, weights in the data file."""

    def __init__(self, data: BinaryIO) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._data = data

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output, called `name` or numbered. Returns the output's name."""
        output = name or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attributes))
        return output

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """Parts of the last axis, of these sizes."""
        if len(sizes) == 1:
            return [value]
        name = f"Split_{len(self.nodes)}"
        parts = [f"{name}_{part}" for part in range(len(sizes))]
        self.nodes.append(helper.make_node("Split", [value, self.integers(*sizes)], parts, name=name, axis=-1))
        return parts

    def integers(self, *values: int) -> str:
        """An int64 vector."""
        name = f"integers_{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def tensor(self, tensor: Tensor) -> str:
        """A weight, appended to the data file as it is."""
        array = tensor.detach().cpu().contiguous().numpy()
        name = f"weight_{len(self.initializers)}"
        self._data.write(bytes(-self._data.tell() % _PAGE))
        place = {"location": DATA_FILE, "offset": self._data.tell(), "length": array.nbytes}
        self._data.write(array.data)
        proto = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        proto.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self.initializers.append(proto)
        return name


class DecoderGraph(GraphBuilder):
    """The decoder's blocks, each a method from tensor names to tensor names.

    Hidden states are T [tokens, hidden], the trees' tokens one behind the other; only attention sees batch and tree apart.
    """

    def __init__(self, model: PreTrainedModel, data: BinaryIO, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(data)
        self.model = model
        self.shape = DecoderShape.of(model)
        self.dtype = dtype
        self.onnx_dtype = TensorProto.FLOAT16 if dtype == torch.float16 else TensorProto.FLOAT
        self._tables: dict[int, str] = {}
        self._axes: dict[tuple[int, ...], str] = {}

    def write(self, code_tokens: Sequence[int]) -> None:
        """The whole forward pass."""
        decoder = self.model.model
        hidden = self.embed(decoder.embed_tokens, self.op("Reshape", "input_ids", self.integers(-1)))
        rotation = self.rotation(decoder.rotary_emb)
        past, new = kv_names("past", self.shape.layers), kv_names("new", self.shape.layers)
        for layer, past_kv, new_kv in zip(decoder.layers, past, new, strict=True):
            hidden = self.op("Add", hidden, self.attention(layer, hidden, rotation, past_kv, new_kv))
            hidden = self.op("Add", hidden, self.mlp(layer, hidden))
        self.head(hidden, code_tokens)

    def embed(self, embedding: Module, tokens: str) -> str:
        """The tokens' rows of the table."""
        return self.op("Gather", self.table(embedding), tokens)

    def rotation(self, rotary: Module) -> tuple[str, str]:
        """Cosine and sine of every new token's position, T [batch, new, head_dim / 2]; the angles are float32."""
        position = self.op("Cast", self.op("Unsqueeze", "position_ids", self.integers(2)), to=TensorProto.FLOAT)
        angle = self.op("Mul", position, self.tensor(rotary.inv_freq))
        scale = self.tensor(torch.tensor([rotary.attention_scaling], dtype=torch.float32))
        cos, sin = (self.op("Mul", self.op(function, angle), scale) for function in ("Cos", "Sin"))
        return self.cast(cos), self.cast(sin)

    def attention(
        self, layer: Module, hidden: str, rotation: tuple[str, str], past_kv: tuple[str, str], new_kv: tuple[str, str]
    ) -> str:
        """Grouped-query attention of the new tokens to the cached and the new ones."""
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
            self.op("Concat", past, self.of_trees(part, shape.kv_heads, shape.head_dim, name=new), axis=1)
            for past, part, new in zip(past_kv, (key, value), new_kv, strict=True)
        )
        mixed = self.attend(query, key, value)
        return self.project(self.op("Reshape", mixed, self.integers(-1, shape.heads * shape.head_dim)), block.o_proj)[0]

    def attend(self, query: str, key: str, value: str) -> str:
        """What the new tokens find, in any shape of [batch, new, heads * head_dim].

        query: [batch, new, heads * head_dim]. key, value: [batch, past+new, kv_heads, head_dim].
        """
        shape = self.shape
        key, value = (self.merge_heads(part, shape.kv_heads) for part in (key, value))
        return self.op(
            "Attention", query, key, value, "attn_bias", q_num_heads=shape.heads, kv_num_heads=shape.kv_heads
        )

    def mlp(self, layer: Module, hidden: str) -> str:
        """down(silu(gate(x)) * up(x))."""
        normed = self.norm(layer.post_attention_layernorm, hidden)
        gate, up = self.project(normed, layer.mlp.gate_proj, layer.mlp.up_proj)
        activated = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self.project(self.op("Mul", activated, up), layer.mlp.down_proj)[0]

    def head(self, hidden: str, code_tokens: Sequence[int]) -> None:
        """The wanted rows' code logits and log-normalizer, float32."""
        logits = self.logits(self.norm(self.model.model.norm, self.op("Gather", hidden, "out_index")))
        self.op("ReduceLogSumExp", logits, self.integers(1), name="log_normalizer", keepdims=0)
        first, last = code_tokens[0], code_tokens[-1]
        if list(code_tokens) == list(range(first, last + 1)):
            span = (self.integers(first), self.integers(last + 1), self.integers(1))
            self.op("Slice", logits, *span, name="code_logits")
        else:
            self.op("Gather", logits, self.integers(*code_tokens), name="code_logits", axis=1)

    def logits(self, normed: str) -> str:
        """Of the whole vocabulary, float32 [rows, vocab]."""
        logits = self.op("Gemm", normed, self.table(self.model.lm_head), transB=1)
        return self.op("Cast", logits, to=TensorProto.FLOAT)

    def norm(self, norm: Module, hidden: str) -> str:
        """RMS norm over the last axis, computed in float32."""
        return self.op("RMSNormalization", hidden, self.cast_weight(norm.weight), epsilon=self.shape.norm_epsilon)

    def head_norm(self, block: Module, name: str, projected: str, heads: int) -> str:
        """RMS norm of every head by itself, where the model has one (Qwen3)."""
        if not hasattr(block, name):
            return projected
        return self.norm(
            getattr(block, name), self.op("Reshape", projected, self.integers(-1, heads, self.shape.head_dim))
        )

    def project(self, hidden: str, *layers: Module) -> list[str]:
        """x W^T + b of each layer, [tokens, out]: one product for all of them, which a pass of few tokens is quicker with."""
        result = self.product(hidden, torch.cat([layer.weight.detach() for layer in layers]))
        if layers[0].bias is not None:
            result = self.op("Add", result, self.cast_weight(torch.cat([layer.bias.detach() for layer in layers])))
        return self.split(result, [len(layer.weight) for layer in layers])

    def product(self, hidden: str, weight: Tensor) -> str:
        """x W^T, [tokens, out]. weight: [out, in]."""
        return self.op("MatMul", hidden, self.cast_weight(weight.T))

    def of_trees(self, flat: str, *sizes: int, name: str = "") -> str:
        """[tokens, ...] -> [batch, new, *sizes]."""
        if sizes not in self._axes:
            self._axes[sizes] = self.op("Concat", self.op("Shape", "input_ids"), self.integers(*sizes), axis=0)
        return self.op("Reshape", flat, self._axes[sizes], name=name)

    def merge_heads(self, split: str, heads: int) -> str:
        """[batch, tokens, heads, head_dim] -> [batch, tokens, heads * head_dim]."""
        return self.op("Reshape", split, self.integers(0, 0, heads * self.shape.head_dim))

    def table(self, layer: Module) -> str:
        """A [vocab, hidden] weight in T; tied embedding and head are written once."""
        key = layer.weight.data_ptr()
        if key not in self._tables:
            self._tables[key] = self.cast_weight(layer.weight)
        return self._tables[key]

    def cast_weight(self, weight: Tensor) -> str:
        """A weight in T."""
        return self.tensor(weight.detach().to(self.dtype))

    def cast(self, value: str) -> str:
        """A float32 value in T."""
        return value if self.dtype == torch.float32 else self.op("Cast", value, to=self.onnx_dtype)

    def to_model(self, columns: int) -> onnx.ModelProto:
        """The finished model with the contract's inputs and outputs."""
        sizes = (self.shape.layers, self.shape.kv_heads, self.shape.head_dim, str(self.dtype).removeprefix("torch."))
        inputs = [_value_info(name, spec) for name, spec in graph_inputs(*sizes).items()]
        outputs = [_value_info(name, spec) for name, spec in graph_outputs(*sizes, columns).items()]
        graph = helper.make_graph(self.nodes, "token_tree_decoder", inputs, outputs, self.initializers)
        domains = sorted({"", *(node.domain for node in self.nodes)})
        opsets = [helper.make_opsetid(domain, 1 if domain else _OPSET) for domain in domains]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="atspeed-serving")


def _value_info(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(name, dtype, list(spec.axes))
