"""Attention in float32 whose sums have one order, whatever else is in a pass.

Float sums depend on their order, so every sum of this attention has one that only the path of a token decides. onnxruntime's
CPU kernel adds the products of one output element key by key, from 0, in blocks of keys. A masked key adds exactly 0, wherever
it stands. So two things could move a bit, and both are avoided:

- The block's length depends on the width of the output, and on the threads that share it. With at most `_COLUMNS` columns it is
  always `BLOCK_KEYS`. So values are multiplied `_COLUMNS` columns at a time, and exponentials are summed as one more column.
- A block may end between two keys of a path. The keys of nodes stand elsewhere in every pass, so they are summed apart from
  those of the prompt, whose places are fixed. A model whose prompts and nodes fit into one block needs no second sum.

Products of a scale of 1 take another kernel for one row, so none has that scale. Scores are negated, and the two parts of the
quotient have a factor of 2, which loses no bit. A score is a sum over a head's columns, at most `_SCORE_COLUMNS` at a time,
which is within a block.

The constants are onnxruntime's (onnxruntime/core/mlas/lib/sgemm.cpp); `atspeed.engine.model.invariance` checks the result.
"""

from __future__ import annotations

from typing import Any

from atspeed.engine.model.graph_form import BLOCK_KEYS, GraphForm
from atspeed.training.decoder_graph import DecoderShape, FloatArithmetic
from atspeed.training.graph_builder import GraphBuilder

_COLUMNS = 16  # of a product of values: the narrowest panel of the kernel
_SCORE_COLUMNS = 128  # of a product of queries and keys: the shortest block of the kernel
_FACTOR = 2.0  # any power of two but 1; see the module


class OrderedAttention:
    """Writes the attention of one graph. Tensors that all layers share are written once.

    Args:
        graph: the graph.
        shape: the sizes of the model.
        bias: what is added to the scores of all keys, [batch, 1 or heads, new, keys].
        node_bias: what is added to the scores of the last keys, which may be nodes, [batch, 1, new, nodes]; None if all keys
            share a sum. A key that one bias lets a token see is masked by the other.
        scale: the factor of the scores.
    """

    def __init__(
        self, graph: GraphBuilder, shape: DecoderShape, bias: str, node_bias: str | None, scale: float
    ) -> None:
        self._graph = graph
        self._heads, self._head_dim = shape.kv_heads, shape.head_dim
        self._groups = shape.heads // shape.kv_heads
        self._scale = scale
        self._width = max(width for width in range(1, _COLUMNS + 1) if shape.head_dim % width == 0)
        self._all = _Keys(graph, bias, self._groups)
        self._nodes = node_bias and _Keys(graph, node_bias, self._groups)
        if self._nodes:
            self._end = self._all.count
            self._start = graph.op("Sub", self._all.count, self._nodes.count)

    def attend(self, query: str, key: str, value: str) -> str:
        """Write attention. The result is [batch, new, kv_heads, groups, head_dim / n, n].

        Args:
            query: [batch, new, heads * head_dim].
            key: [keys, batch, kv_heads, head_dim].
            value: [keys, batch, kv_heads, head_dim].
        """
        graph, heads, columns = self._graph, self._heads, self._head_dim // self._width
        parts = [self._all.masked(scores := self._scores(query, key))]
        values = [graph.op("Reshape", value, graph.integers(0, 0, heads, columns, self._width))]
        if self._nodes:
            parts.append(self._nodes.masked(self._last(scores, axis=3)))
            values.append(self._last(values[0], axis=0))
        tops = [graph.op("ReduceMax", part, graph.integers(-1), keepdims=1) for part in parts]
        top = graph.op("Max", *tops) if self._nodes else tops[0]
        shares = [
            keys.rows(graph.op("Exp", graph.op("Sub", part, top)))
            for keys, part in zip((self._all, self._nodes), parts, strict=False)
            if keys
        ]
        mixed = self._sum([self._product(*pair, transBatchB=1) for pair in zip(shares, values, strict=True)])
        ones = [keys.ones for keys in (self._all, self._nodes) if keys]
        total = self._sum([self._product(*pair) for pair in zip(shares, ones, strict=True)])
        quotient = graph.op("Div", mixed, total)  # [batch, kv_heads, columns, groups * new, width]
        split = graph.op("Reshape", quotient, graph.integers(0, 0, 0, self._groups, -1, self._width))
        return graph.op("Transpose", split, perm=[0, 4, 1, 3, 2, 5])

    def _scores(self, query: str, key: str) -> str:
        """Write scaled products of queries and keys, negated, [batch, kv_heads, groups * new, keys]."""
        graph = self._graph
        split = graph.op("Reshape", query, graph.integers(0, 0, self._heads, self._groups, self._head_dim))
        rows = graph.op("Transpose", split, perm=[0, 2, 3, 1, 4])
        rows = graph.op("Reshape", rows, graph.integers(0, 0, -1, self._head_dim))
        sizes = [min(_SCORE_COLUMNS, self._head_dim - at) for at in range(0, self._head_dim, _SCORE_COLUMNS)]
        pairs = zip(graph.split(rows, sizes), graph.split(key, sizes), strict=True)
        return self._sum([self._product(*pair, alpha=-self._scale, transB=1, transBatchB=1) for pair in pairs])

    def _last(self, keys: str, axis: int) -> str:
        """Slice the keys that may be nodes."""
        return self._graph.op("Slice", keys, self._start, self._end, self._graph.integers(axis))

    def _sum(self, parts: list[str]) -> str:
        return parts[0] if len(parts) == 1 else self._graph.op("Add", parts[0], self._sum(parts[1:]))

    def _product(self, left: str, right: str, *, alpha: float = _FACTOR, **transposed: Any) -> str:
        """Multiply. transBatchB: the right side has its rows first, [keys, batch, ...]."""
        return self._graph.op("FusedMatMul", left, right, domain="com.microsoft", alpha=alpha, **transposed)


class _Keys:
    """The keys that one bias is for."""

    def __init__(self, graph: GraphBuilder, bias: str, groups: int) -> None:
        self._graph = graph
        self.count = graph.op("Slice", graph.op("Shape", bias), graph.integers(3), graph.integers(4))
        column = graph.op("Concat", self.count, graph.integers(1), axis=0)
        self.ones = graph.op("Expand", graph.floats(1.0), column)
        self._bias = graph.op("Unsqueeze", bias, graph.integers(2))
        self._by_group, self._by_row = (
            graph.op("Concat", graph.integers(0, 0, *middle), self.count, axis=0) for middle in ((groups, -1), (1, -1))
        )

    def masked(self, scores: str) -> str:
        """Add the bias to negated scores, [batch, kv_heads, groups, new, keys]."""
        return self._graph.op("Sub", self._bias, self._graph.op("Reshape", scores, self._by_group))

    def rows(self, shares: str) -> str:
        """Reshape [batch, kv_heads, groups, new, keys] -> [batch, kv_heads, 1, groups * new, keys]."""
        return self._graph.op("Reshape", shares, self._by_row)


def ordered_form(max_positions: int) -> GraphForm:
    """Return the form of a decoder's graph with this attention: at least half a block is for nodes."""
    return GraphForm(keys_first=True, node_bias=2 * max_positions > BLOCK_KEYS)


def attention_of(graph: GraphBuilder, shape: DecoderShape, form: GraphForm) -> OrderedAttention:
    """Return the attention of a decoder's graph of that form."""
    node_bias = "node_bias" if form.node_bias else None
    return OrderedAttention(graph, shape, "attn_bias", node_bias, shape.head_dim**-0.5)


class OrderedArithmetic(FloatArithmetic):
    """Products in float32 on a CPU, each row of which has the same bits whatever the other rows are.

    A product with constant weights has them without more ado: onnxruntime packs such weights once.
    """

    ordered = True

    def __init__(self, graph: GraphBuilder, shape: DecoderShape, form: GraphForm) -> None:
        super().__init__(graph, shape)
        self.form = form
        self._attention = attention_of(graph, shape, self.form)

    def attend(self, query: str, key: str, value: str) -> str:
        """Write attention; key and value: [past+new, batch, kv_heads, head_dim]."""
        return self._attention.attend(query, key, value)
