"""A decoder that multiplies in 8 bits, and whose results do not depend, to the bit, on what else is in a pass.

In a pass of other tokens sums are taken in another order, so that float results differ in their last bits. Where activations
are rounded to 8 bits, such a bit now and then tips a whole step, and a log-probability moves by 1e-2. So nothing here that
adds up depends on an order:

- Products with weights add integers: activations are rounded to 8 bits by a scale of their token's own, weights to 7 bits by
  one of each output. (x86 kernels without VNNI add pairs of products in 16 bits, which 8-bit weights would overflow.)
- Attention, whose sums run over other keys in every pass, multiplies in float64 and rounds to float32: what differs in the
  53rd bit reaches the 24th once in 10^8 numbers, and then an 8-bit step has still to be that near.
- All else is of one token at a time: norms, rotary embedding, the activation, softmax's exponentials.

Table and head are 8 bits wide too. Made for the CPU: onnxruntime's other providers have no such products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

import torch
import torch.nn.functional as functional
from onnx import TensorProto
from torch import Tensor
from transformers import PreTrainedModel

from training.decoder_graph import DecoderGraph, Module

_CONTRIB = "com.microsoft"
_ACTIVATION_MAX, _ACTIVATION_ZERO = 127, 128  # activations are uint8, as the kernels take them
_WEIGHT_MAX = 63


class Int8DecoderGraph(DecoderGraph):
    """The same blocks; products with weights in integers, those of attention in float64."""

    def __init__(self, model: PreTrainedModel, data: BinaryIO) -> None:
        super().__init__(model, data)
        self._one = self.tensor(torch.tensor(1.0))
        self._step = self.tensor(torch.tensor([1 / _ACTIVATION_MAX], dtype=torch.float32))
        self._zero = self.tensor(torch.tensor(_ACTIVATION_ZERO, dtype=torch.uint8))
        self._of_tokens = self._zeros(self.op("Reshape", self.op("Size", "input_ids"), self.integers(1)))
        self._of_rows = self._zeros(self.op("Shape", "out_index"))
        self._bias = self.op("Unsqueeze", "attn_bias", self.integers(1))
        self._coded: dict[int, tuple[str, str]] = {}

    def embed(self, embedding: Module, tokens: str) -> str:
        """The tokens' rows of the table, widened."""
        codes, scale = self._table(embedding)
        rows = self.op("Cast", self.op("Gather", codes, tokens), to=TensorProto.FLOAT)
        return self.op("Mul", rows, self._column(self.op("Gather", scale, tokens)))

    def logits(self, normed: str) -> str:
        """Of the whole vocabulary, float32 [rows, vocab]."""
        codes, scale = self._table(self.model.lm_head)
        return self._integer_product(normed, self._of_rows, self.op("Transpose", codes, perm=[1, 0]), scale)

    def product(self, hidden: str, weight: Tensor) -> str:
        """x W^T, [tokens, out]. weight: [out, in]."""
        codes, scale = quantise_rows(weight)
        return self._integer_product(hidden, self._of_tokens, self.tensor(codes.T), self.tensor(scale))

    def attend(self, query: str, key: str, value: str) -> str:
        """Softmax with what is summed in float64."""
        shape = self.shape
        groups = shape.heads // shape.kv_heads
        wide_query, wide_key, wide_value = (
            self.op("Cast", self._heads_first(part, heads), to=TensorProto.DOUBLE)
            for part, heads in ((query, groups), (key, 1), (value, 1))
        )
        scores = self._contrib("FusedMatMul", wide_query, wide_key, alpha=shape.head_dim**-0.5, transB=1)
        scores = self.op("Add", self.op("Cast", scores, to=TensorProto.FLOAT), self._bias)
        above = self.op("Sub", scores, self.op("ReduceMax", scores, self.integers(-1), keepdims=1))
        shares = self.op("Cast", self.op("Exp", above), to=TensorProto.DOUBLE)
        total = self.op("ReduceSum", shares, self.integers(-1), keepdims=1)
        mixed = self.op("Div", self.op("MatMul", shares, wide_value), total)
        return self.op("Transpose", self.op("Cast", mixed, to=TensorProto.FLOAT), perm=[0, 3, 1, 2, 4])

    def _heads_first(self, tokens: str, group: int) -> str:
        """[batch, tokens, ...] -> [batch, kv_heads, group, tokens, head_dim]: of a query all that share a key, of a key one."""
        split = self.op("Reshape", tokens, self.integers(0, 0, self.shape.kv_heads, group, self.shape.head_dim))
        return self.op("Transpose", split, perm=[0, 2, 3, 1, 4])

    def _integer_product(self, hidden: str, zeros: str, codes: str, scale: str) -> str:
        """[n, in] times int8 codes [in, out] of scales [out], by way of 8 bits. zeros: the n zero points.

        A token of nothing but zeros has scale 0; whatever its codes are then, they are multiplied by that.
        """
        largest = self.op("ReduceMax", self.op("Abs", hidden), self.integers(1), keepdims=0)
        steps = self.op("Mul", largest, self._step)
        rounded = self.op("QuantizeLinear", hidden, steps, zeros, axis=0)
        product = self._contrib("MatMulIntegerToFloat", rounded, codes, self._one, scale, self._zero)
        return self.op("Mul", product, self._column(steps))

    def _table(self, layer: Module) -> tuple[str, str]:
        """Codes [vocab, hidden] and scales [vocab]; a tied table and head are written once."""
        key = layer.weight.data_ptr()
        if key not in self._coded:
            codes, scale = quantise_rows(layer.weight)
            self._coded[key] = self.tensor(codes), self.tensor(scale)
        return self._coded[key]

    def _zeros(self, count: str) -> str:
        """That many zero points."""
        return self.op("Expand", self._zero, count)

    def _column(self, values: str) -> str:
        """[n] -> [n, 1]."""
        return self.op("Unsqueeze", values, self.integers(1))

    def _contrib(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        return self.op(op_type, *inputs, domain=_CONTRIB, **attributes)


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 7-bit quantisation of each row of [out, in]: int8 codes [out, in] and float32 scales [out]."""
    scale = weight.detach().abs().amax(dim=1).clamp_min(1e-12) / _WEIGHT_MAX
    return (weight.detach() / scale[:, None]).round().to(torch.int8), scale


@contextmanager
def rounded(model: PreTrainedModel) -> Iterator[None]:
    """Let the checkpoint compute with the graph's codes, one matrix at a time: what it says then is what the graph has to say.

    But for steps that float32's last bits tip in the one and not in the other.
    """
    with ExitStack() as stack:
        for part in model.modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
                stack.callback(part.register_forward_hook(_again_by_codes).remove)
        yield


def _again_by_codes(part: torch.nn.Linear | torch.nn.Embedding, inputs: tuple[Tensor], _: Tensor) -> Tensor:
    (given,), weight = inputs, _widened(part.weight)
    if isinstance(part, torch.nn.Embedding):
        return functional.embedding(given, weight)
    step = given.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(given.dtype).tiny) / _ACTIVATION_MAX
    return functional.linear((given / step).round() * step, weight, part.bias)


def _widened(weight: Tensor) -> Tensor:
    codes, scale = quantise_rows(weight)
    return codes * scale[:, None]
