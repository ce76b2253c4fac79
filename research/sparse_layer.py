"""Time of a prefill, of its attention, and of sparse attention in its place.

Attention is timed one layer at a time. The sparse layer is a graph of standard operators. In each part of the prompt, some
queries score all keys; the keys of the largest sums are gathered for each head, and the newest ones follow as a window. It
promises no order of sums, so plain attention without that promise is timed too. Times are processor seconds of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, helper

from atspeed.benchmarks.results import Columns
from atspeed.engine.arrays import Bools, Float32
from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.model.decoder import Decoder, RuntimeOptions, TensorSpec, graph_inputs
from atspeed.engine.model.graph_form import GraphForm
from atspeed.engine.model.tree_evaluator import PROMPT_PART
from atspeed.training.decoder_graph import DecoderShape
from atspeed.training.graph_builder import GraphBuilder, WeightFile
from atspeed.training.ordered_attention import attention_of
from research.sample_attention import SAMPLED, WINDOW

_MASKED = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class PrefillRow:
    """The prefill of a cold prompt, in one pass or in parts. part: tokens of a pass. seconds: of the processor.

    Attributes:
        bits_equal: whether keys, values and scores have the bits of the prefill in parts.
    """

    model: str
    tokens: int
    part: int
    seconds: float
    bits_equal: bool


@dataclass(frozen=True)
class SparseTimeRow:
    """Attention of all layers in a prefill in parts, in processor seconds.

    Attributes:
        prefill: the whole prefill.
        ordered: attention with sums of one order, as served.
        plain: the same attention without the promise.
        columns: share of the keys that are gathered for each head, beside the window.
        sparse: sparse attention, the choice of keys included.
        choosing: the choice of keys alone.
    """

    model: str
    tokens: int
    prefill: float
    ordered: float
    plain: float
    columns: float
    sparse: float
    choosing: float

    @property
    def attention_share(self) -> float:
        """Share of the served attention in the prefill."""
        return self.ordered / self.prefill

    @property
    def speedup(self) -> float:
        """Time of the prefill over that with sparse attention."""
        return self.prefill / (self.prefill - self.ordered + self.sparse)

    @property
    def plain_speedup(self) -> float:
        """Time of the prefill over that with attention whose sums have no order."""
        return self.prefill / (self.prefill - self.ordered + self.plain)


PREFILL_COLUMNS: Columns[PrefillRow] = (
    ("model", lambda row: row.model),
    ("tokens", lambda row: f"{row.tokens:,}"),
    ("tokens of a pass", lambda row: f"{row.part:,}"),
    ("processor s", lambda row: f"{row.seconds:.2f}"),
    ("same bits", lambda row: "yes" if row.bits_equal else "no"),
)
TIME_COLUMNS: Columns[SparseTimeRow] = (
    ("model", lambda row: row.model),
    ("tokens", lambda row: f"{row.tokens:,}"),
    ("prefill s", lambda row: f"{row.prefill:.2f}"),
    ("attention s", lambda row: f"{row.ordered:.2f}"),
    ("share", lambda row: f"{row.attention_share:.0%}"),
    ("without ordered sums s", lambda row: f"{row.plain:.2f}"),
    ("prefill without them faster by", lambda row: f"{row.plain_speedup:.2f}x"),
    ("gathered keys", lambda row: f"{row.columns:.0%}"),
    ("sparse s", lambda row: f"{row.sparse:.2f}"),
    ("of it choosing", lambda row: f"{row.choosing:.2f}"),
    ("sparse prefill faster by", lambda row: f"{row.speedup:.2f}x"),
)


def run(
    models: Mapping[str, tuple[Path, ModelEntry, DecoderShape]],
    tokens: Sequence[int],
    columns: Sequence[float],
    repeats: int,
) -> tuple[list[PrefillRow], list[SparseTimeRow]]:
    """Time prefills in parts and in one pass, and the attention of their layers. columns: shares of gathered keys."""
    prefills, times = [], []
    for name, (path, entry, shape) in models.items():
        decoder = Decoder(path, RuntimeOptions())
        layers = _Layers(decoder, shape)
        for count in tokens:
            in_parts, expected = _prefill(decoder, entry, count, PROMPT_PART)
            at_once, found = _prefill(decoder, entry, count, count)
            prefills += [
                PrefillRow(name, count, PROMPT_PART, in_parts, bits_equal=True),
                PrefillRow(name, count, count, at_once, bits_equal=found == expected),
            ]
            times += [
                SparseTimeRow(name, count, in_parts, columns=share, **measured)
                for share, measured in layers.seconds(count, columns, repeats).items()
            ]
    return prefills, times


def _prefill(decoder: Decoder, entry: ModelEntry, tokens: int, part: int) -> tuple[float, list[bytes]]:
    """Return the processor seconds of a prefill, and the bytes of the last scores and of all keys and values."""
    codes = np.asarray(entry.code_tokens, dtype=np.int64)
    prompt, kv = np.resize(codes, tokens), decoder.empty_kv(tokens)
    scores: Sequence[Float32] = ()
    begun = time.process_time()
    for start in range(0, tokens, part):
        end = min(tokens, start + part)
        scores = decoder.run(
            prompt[start:end],
            np.arange(start, end),
            np.tri(end - start, end, k=start, dtype=bool),
            kv[:, :, :start],
            np.array([end - start - 1]),
            kv[:, :, start:end],
            np.zeros(end, dtype=bool),
        )
    return time.process_time() - begun, [*(score.tobytes() for score in scores), kv.tobytes()]


class _Layers:
    """One layer's attention in three ways: as served, plain, and sparse."""

    def __init__(self, decoder: Decoder, shape: DecoderShape) -> None:
        self._layers, self._form = decoder.layers, decoder.form
        self._shape = shape
        kinds = ("plain", "sparse", "choosing")
        self._sessions = {"ordered": _served(shape, decoder.form)} | {kind: _simple(shape, kind) for kind in kinds}

    def seconds(self, tokens: int, columns: Sequence[float], repeats: int) -> dict[float, dict[str, float]]:
        """Return the processor seconds of all layers, by share of gathered keys and by kind: medians of some prefills."""
        rng, shape = np.random.default_rng(1), self._shape
        query = rng.standard_normal((1, tokens, shape.heads * shape.head_dim), dtype=np.float32)
        keys = rng.standard_normal((2, tokens, 1, shape.kv_heads, shape.head_dim), dtype=np.float32)
        # Each head of queries has its own keys: the simple graphs share none.
        own = np.repeat(keys[:, :, 0], shape.heads // shape.kv_heads, axis=2)
        parts = [(start, min(tokens, start + PROMPT_PART)) for start in range(0, tokens, PROMPT_PART)]
        fed = {
            ("ordered", 1.0): [self._served_feeds(query, keys, *part) for part in parts],
            ("plain", 1.0): [self._feeds(query, own, *part, None) for part in parts],
        }
        for share in columns:
            fed["sparse", share] = [self._feeds(query, own, *part, share) for part in parts]
            fed["choosing", share] = [feeds for feeds in fed["sparse", share] if "chosen" in feeds]
        taken: dict[tuple[str, float], list[float]] = {way: [] for way in fed}
        for _ in range(repeats):
            for way, every in fed.items():
                taken[way].append(self._run(way[0], every))
        found = {way: self._layers * float(np.median(every)) for way, every in taken.items()}
        whole = {kind: found[kind, 1.0] for kind in ("ordered", "plain")}
        return {share: whole | {kind: found[kind, share] for kind in ("sparse", "choosing")} for share in columns}

    def _run(self, kind: str, parts: Sequence[dict[str, Any]]) -> float:
        """Run the parts of a prefill, and return the processor seconds."""
        begun = time.process_time()
        for feeds in parts:
            # While the window reaches the first key, sparse attention is plain attention.
            session = self._sessions["plain" if kind == "sparse" and "chosen" not in feeds else kind]
            session.run(None, feeds)
        return time.process_time() - begun

    def _served_feeds(self, query: Float32, keys: Float32, start: int, end: int) -> dict[str, Any]:
        visible = np.tri(end - start, end, k=start, dtype=bool)[None]
        biases = self._form.biases(np.array([_MASKED, 0], dtype=np.float32), visible, None)
        return {"query": query[:, start:end], "key": keys[0, :end], "value": keys[1, :end], **biases}

    def _feeds(self, query: Float32, keys: Float32, start: int, end: int, columns: float | None) -> dict[str, Any]:
        """Return the inputs of a simple graph. columns: the share of keys to gather; None for all keys."""
        count, shape = end - start, self._shape
        rows = query[0, start:end].reshape(count, shape.heads, shape.head_dim).transpose(1, 0, 2)
        feeds = {"query": np.ascontiguousarray(rows), "key": keys[0, :end], "value": keys[1, :end]}
        first = start - round(WINDOW * end)  # of the window
        if columns is None or first <= 0:
            return {**feeds, "bias": _bias(np.tri(count, end, k=start, dtype=bool))}
        return {
            **feeds,
            "bias": _bias(np.tri(count, end - first, k=start - first, dtype=bool)),
            "sampled": np.arange(count - 1, -1, -round(1 / SAMPLED)),
            "chosen": np.array([max(1, round(columns * first))]),
            "first": np.array([first]),
        }


class _SimpleGraph(GraphBuilder):
    """Attention of standard operators: query [heads, new, head_dim], key and value [keys, heads, head_dim]."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__(WeightFile(BytesIO()))
        self._heads, self._head_dim = shape.heads, shape.head_dim

    def plain(self) -> str:
        """Write attention to all keys."""
        scores = self.op("Add", self._scores("query", "key"), "bias")
        return self._by_heads(self.op("Softmax", scores, axis=-1), "value")

    def sparse(self) -> str:
        """Write attention to the chosen keys and to the window behind them."""
        flat = self.op("Add", self.op("Mul", self.choosing(), self.integers(self._heads)), self._each_head())
        rows = self.integers(-1, self._head_dim)
        chosen = [self.op("Gather", self.op("Reshape", name, rows), flat) for name in ("key", "value")]
        key, value = (
            self.op("Slice", name, "first", self.integers(2**31), self.integers(0)) for name in ("key", "value")
        )
        parts = [
            self.op("FusedMatMul", "query", chosen[0], domain="com.microsoft", alpha=self._scale, transB=1),
            self.op("Add", self._scores("query", key), "bias"),
        ]
        shares = self.op("Softmax", self.op("Concat", *parts, axis=2), axis=-1)
        gathered, near = (self.op("Slice", shares, *span, self.integers(2)) for span in self._spans())
        return self.op("Add", self.op("MatMul", gathered, chosen[1]), self._by_heads(near, value))

    def choosing(self) -> str:
        """Write the choice of keys before the window, [heads, chosen]: those with the largest sums of sampled attention."""
        key = self.op("Slice", "key", self.integers(0), "first", self.integers(0))
        scores = self._scores(self.op("Gather", "query", "sampled", axis=1), key)
        mass = self.op("ReduceSum", self.op("Softmax", scores, axis=-1), self.integers(1), keepdims=0)
        self.nodes.append(helper.make_node("TopK", [mass, "chosen"], ["mass", "places"], axis=-1, sorted=0))
        return "places"

    @property
    def _scale(self) -> float:
        return float(self._head_dim**-0.5)

    def _scores(self, query: str, key: str) -> str:
        return self.op("FusedMatMul", query, key, domain="com.microsoft", alpha=self._scale, transB=1, transBatchB=1)

    def _by_heads(self, shares: str, value: str) -> str:
        return self.op("FusedMatMul", shares, value, domain="com.microsoft", transBatchB=1)

    def _each_head(self) -> str:
        return self.constant(np.arange(self._heads)[:, None])

    def _spans(self) -> tuple[tuple[str, str], tuple[str, str]]:
        return (self.integers(0), "chosen"), ("chosen", self.integers(2**31))


def _simple(shape: DecoderShape, kind: str) -> ort.InferenceSession:
    graph = _SimpleGraph(shape)
    last = getattr(graph, kind)()
    sizes = (shape.heads, shape.head_dim)
    inputs = {
        "query": TensorSpec("float32", (shape.heads, "new", shape.head_dim)),
        "key": TensorSpec("float32", ("keys", *sizes)),
        "value": TensorSpec("float32", ("keys", *sizes)),
        "bias": TensorSpec("float32", ("new", "seen")),
    }
    if kind != "plain":
        inputs |= {name: TensorSpec("int64", ("some",)) for name in ("sampled", "chosen", "first")}
    places, mixed = TensorSpec("int64", ("heads", "places")), TensorSpec("float32", ("heads", "new", "columns"))
    return _session(graph.finished(kind, inputs, {last: places if kind == "choosing" else mixed}))


def _served(shape: DecoderShape, form: GraphForm) -> ort.InferenceSession:
    graph = GraphBuilder(WeightFile(BytesIO()))
    last = attention_of(graph, shape, form).attend("query", "key", "value")
    known = graph_inputs(1, shape.kv_heads, shape.head_dim, "float32", form)
    keys = TensorSpec("float32", ("keys", "batch", shape.kv_heads, shape.head_dim))
    inputs = {"query": TensorSpec("float32", ("batch", "new", shape.hidden)), "key": keys, "value": keys}
    inputs |= {name: spec for name, spec in known.items() if name in ("attn_bias", "node_bias")}
    return _session(graph.finished("ordered", inputs, {last: TensorSpec("float32", tuple("abcdef"))}))


def _session(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bias(visible: Bools) -> Float32:
    return np.where(visible, np.float32(0), np.float32(_MASKED))
