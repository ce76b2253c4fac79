"""The 8-bit arithmetic of a decoder, independent of co-batched tokens.

In a pass of other tokens sums are taken in another order, so float results differ in their last bits. Where activations are
rounded to 8 bits, such a bit sometimes moves an activation by a whole step, and a log-probability by 1e-2. So no sum of this
graph depends on an order:

- Products with weights add integers: activations are rounded to 8 bits with one scale per token, weights to 7 bits with one
  scale per output. (x86 kernels without VNNI add pairs of products in 16 bits, which 8-bit weights would overflow.)
- Attention, whose sums run over other keys in every pass, gives each sum one order (atspeed/training/ordered_attention.py).
- All other operators work on one token at a time: norms, rotary embedding, the activation, softmax's exponentials.

Rounding matters most in the table and the head, which are a small part of a pass. They have weights of 14 bits, and the head
has activations of 16 bits: in two parts, each multiplied as above. The graph is made for the CPU, since onnxruntime's other
providers lack these products.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as functional
from onnx import TensorProto
from torch import Tensor
from transformers import PreTrainedModel

from atspeed.engine.model.graph_form import GraphForm
from atspeed.training.decoder_graph import DecoderShape, Module, stacked
from atspeed.training.graph_builder import GraphBuilder
from atspeed.training.ordered_attention import OrderedAttention, attention_of

_CONTRIB = "com.microsoft"
_ACTIVATION_MAX, _ACTIVATION_ZERO = 127, 128  # activations are uint8, as the kernels take them
_WEIGHT_MAX = 63  # 7 bits; see the module


class Int8Arithmetic:
    """Products with weights in integers; hidden states and attention are float32, and its sums have one order.

    Args:
        graph: the graph.
        shape: the sizes of the decoder.
        form: the form of the graph, `ordered_form` for a decoder. `t5_graph` writes attention itself.
    """

    ordered = True

    def __init__(self, graph: GraphBuilder, shape: DecoderShape, form: GraphForm | None = None) -> None:
        self.dtype = torch.float32
        self.form = form or GraphForm()
        self._graph = graph
        self._shape = shape
        self._one = self._graph.tensor(torch.tensor(1.0))
        self._step = self._graph.tensor(torch.tensor([1 / _ACTIVATION_MAX]))
        self._zero = self._graph.tensor(torch.tensor(_ACTIVATION_ZERO, dtype=torch.uint8))
        self._of_tokens = self._zeros(
            self._graph.op("Reshape", self._graph.op("Size", "input_ids"), self._graph.integers(1))
        )
        self._coded: dict[int, tuple[str, str]] = {}

    def embed(self, embedding: Module, tokens: str) -> str:
        """Look up the tokens' rows of the table, in float32."""
        codes, scale = self._table(embedding)
        fine = self._graph.op("Add", tokens, self._graph.integers(self._shape.vocab_size))
        return self._graph.op("Add", *(self._rows(codes, scale, which) for which in (tokens, fine)))

    def logits(self, head: Module, normed: str) -> str:
        """Write the logits of the whole vocabulary, float32 [rows, vocab]."""
        codes, scale = self._table(head)
        of_rows = self._zeros(self._graph.op("Shape", "out_index"))
        parts = self._fine_product(normed, of_rows, self._graph.op("Transpose", codes, perm=[1, 0]), scale)
        return self._graph.op("Add", *self._graph.split(parts, [self._shape.vocab_size] * 2))

    def product(self, hidden: str, layers: Sequence[Module]) -> str:
        """Write x W^T, [tokens, out], for the layers' weights one below the other."""
        codes, scale = quantise_rows(stacked(layers))
        return self._integer_product(hidden, self._of_tokens, self._graph.tensor(codes.T), self._graph.tensor(scale))

    def weight(self, key: Hashable, value: Callable[[], Tensor]) -> str:
        """Add a weight in float32."""
        return self._graph.kept(key, value)

    def attend(self, query: str, key: str, value: str) -> str:
        """Write attention; key and value: [past+new, batch, kv_heads, head_dim]."""
        return self._attention.attend(query, key, value)

    @cached_property
    def _attention(self) -> OrderedAttention:
        return attention_of(self._graph, self._shape, self.form)

    @cached_property
    def _fine_step(self) -> str:
        return self._graph.tensor(torch.tensor([1 / (2 * _ACTIVATION_MAX)]))

    def _integer_product(self, hidden: str, zeros: str, codes: str, scale: str) -> str:
        """Multiply [n, in] by int8 codes [in, out] of scales [out], in 8 bits. zeros: the n zero points."""
        rounded, steps = self._rounded(hidden, zeros)
        return self._scaled_product(rounded, steps, codes, scale)

    def _fine_product(self, hidden: str, zeros: str, codes: str, scale: str) -> str:
        """Multiply in 16 bits: the remainder of the first 8 bits, in 254ths of their steps, is multiplied too."""
        rounded, steps = self._rounded(hidden, zeros)
        over = self._graph.op("Sub", hidden, self._graph.op("DequantizeLinear", rounded, steps, zeros, axis=0))
        fine_steps = self._graph.op("Mul", steps, self._fine_step)
        fine = self._graph.op("QuantizeLinear", over, fine_steps, zeros, axis=0)
        parts = (self._scaled_product(*part, codes, scale) for part in ((rounded, steps), (fine, fine_steps)))
        return self._graph.op("Add", *parts)

    def _rounded(self, hidden: str, zeros: str) -> tuple[str, str]:
        """Round to uint8 [n, in] and steps [n]. A row of zeros has step 0, which makes its products 0."""
        largest = self._graph.op("ReduceMax", self._graph.op("Abs", hidden), self._graph.integers(1), keepdims=0)
        steps = self._graph.op("Mul", largest, self._step)
        return self._graph.op("QuantizeLinear", hidden, steps, zeros, axis=0), steps

    def _scaled_product(self, rounded: str, steps: str, codes: str, scale: str) -> str:
        product = self._contrib("MatMulIntegerToFloat", rounded, codes, self._one, scale, self._zero)
        return self._graph.op("Mul", product, self._column(steps))

    def _rows(self, codes: str, scale: str, which: str) -> str:
        """Look up rows of codes and scale them, float32."""
        rows = self._graph.op("Cast", self._graph.op("Gather", codes, which), to=TensorProto.FLOAT)
        return self._graph.op("Mul", rows, self._column(self._graph.op("Gather", scale, which)))

    def _table(self, layer: Module) -> tuple[str, str]:
        """Return codes [2 vocab, hidden] and scales [2 vocab], remainders last; tied ones are written once."""
        key = layer.weight.data_ptr()
        if key not in self._coded:
            codes, scale = quantise_rows_finely(layer.weight)
            self._coded[key] = self._graph.tensor(codes), self._graph.tensor(scale)
        return self._coded[key]

    def _zeros(self, count: str) -> str:
        """Repeat the zero point `count` times."""
        return self._graph.op("Expand", self._zero, count)

    def _column(self, values: str) -> str:
        """Reshape [n] -> [n, 1]."""
        return self._graph.op("Unsqueeze", values, self._graph.integers(1))

    def _contrib(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        return self._graph.op(op_type, *inputs, domain=_CONTRIB, **attributes)


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of [out, in] symmetrically to 7 bits: int8 codes [out, in] and float32 scales [out]."""
    scale = weight.detach().abs().amax(dim=1).clamp_min(1e-12) / _WEIGHT_MAX
    return (weight.detach() / scale[:, None]).round().to(torch.int8), scale


def quantise_rows_finely(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to 14 bits: int8 codes [2 out, in] and scales [2 out], where the last `out` rows are remainders."""
    codes, scale = quantise_rows(weight)
    over = weight.detach() - codes * scale[:, None]
    fine_scale = scale / (2 * _WEIGHT_MAX)
    fine = (over / fine_scale[:, None]).round().to(torch.int8)
    return torch.cat([codes, fine]), torch.cat([scale, fine_scale])


@contextmanager
def rounded(model: PreTrainedModel) -> Iterator[None]:
    """Let the checkpoint compute with the graph's codes, one matrix at a time. The graph must then compute the same.

    Exceptions are activations that float32 rounding moves to another step in only one of the two.
    """
    with ExitStack() as stack:
        for name, part in model.named_modules():
            if name.endswith("relative_attention_bias"):  # of a T5; it is added in float32
                continue
            if isinstance(part, torch.nn.Embedding) or part is model.lm_head:
                stack.callback(part.register_forward_hook(_again_finely).remove)
            elif isinstance(part, torch.nn.Linear):
                stack.callback(part.register_forward_hook(_again_by_codes).remove)
        yield


def _again_by_codes(part: torch.nn.Linear, inputs: tuple[Tensor], _: Tensor) -> Tensor:
    codes, scale = quantise_rows(part.weight)
    return functional.linear(_in_steps(inputs[0], _ACTIVATION_MAX), codes * scale[:, None], part.bias)


def _again_finely(part: torch.nn.Linear | torch.nn.Embedding, inputs: tuple[Tensor], _: Tensor) -> Tensor:
    codes, scale = quantise_rows_finely(part.weight)
    weight = (codes * scale[:, None]).view(2, *part.weight.shape).sum(0)
    if isinstance(part, torch.nn.Embedding):
        return functional.embedding(inputs[0], weight) * getattr(part, "embed_scale", 1.0)
    return functional.linear(_in_steps(inputs[0], 2 * _ACTIVATION_MAX**2), weight, part.bias)


def _in_steps(hidden: Tensor, steps: int) -> Tensor:
    """Round to `steps` steps on either side of zero, by token."""
    step = hidden.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(hidden.dtype).tiny) / steps
    return (hidden / step).round() * step
