"""Check that a model is plan-invariant on this machine, bit for bit.

A token tree is computed twice. First, in shared passes: random pieces of the prompt, then its rest and all nodes in one pass with
other trees. Then alone: the prompt is cut elsewhere, and each node of a path has a pass of its own. Log-probabilities, keys and
values must be equal bit for bit. The graph orders its sums for onnxruntime's kernels (atspeed/training/ordered_attention.py), so
another CPU or another onnxruntime may break the promise; then this check says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from atspeed.engine.arrays import Bools, Float32, Int64, KvArray
from atspeed.engine.model.batch_decoder import BatchDecoder, TreeInput, TreeOutput
from atspeed.engine.model.decoder import Decoder
from atspeed.engine.model.encoder_decoder import EncoderDecoder
from atspeed.engine.model.token_tree import MaskedPass

Drawn = TypeVar("Drawn")

_PATHS = 3  # paths of a tree that are computed alone
_ALONE = 0.25  # chance that a shared pass holds one tree only; otherwise their number is drawn
_BRANCHING = 0.8  # share of the nodes that hang below another node, and not below the prompt


@dataclass(frozen=True)
class TreeSizes:
    """Bounds of random trees.

    Attributes:
        prompt: the longest prompt.
        nodes: the most nodes.
        depth: the most nodes of a path.
        trees: the most trees of a pass.
    """

    prompt: int
    nodes: int
    depth: int = 4
    trees: int = 1


@dataclass
class Moved:
    """The result of a check.

    Attributes:
        trees, nodes: numbers of compared ones.
        moved: nodes with another bit in a log-probability, a key or a value.
        prompts_moved: prompts with another bit in a key or a value.
        largest: the largest difference in a log-probability.
    """

    trees: int = 0
    nodes: int = 0
    moved: int = 0
    prompts_moved: int = 0
    largest: float = 0.0

    @property
    def none(self) -> bool:
        """Return whether no bit moved."""
        return not (self.moved or self.prompts_moved)

    def record(self, expected: Float32, found: Float32, same_kv: Bools) -> None:
        """Compare the outputs and the KV of nodes, each [n, ...]."""
        self.nodes += len(expected)
        self.moved += int((~((expected == found).all(axis=1) & same_kv)).sum())
        self.largest = max(self.largest, float(np.abs(expected - found).max(initial=0)))


@dataclass(frozen=True)
class SampleTree:
    """A prompt and nodes below it.

    Attributes:
        prompt: the number of prompt tokens, P.
        encoded: P if an encoder reads the prompt, else 0.
        tokens: int64 [P + n].
        positions: int64 [P + n], as the decoder has them.
        visible: bool [P + n, P + n].
    """

    prompt: int
    encoded: int
    tokens: Int64
    positions: Int64
    visible: Bools

    @classmethod
    def draw(
        cls, rng: np.random.Generator, sizes: TreeSizes, tokens: Int64, decoder_start: int | None = None
    ) -> SampleTree:
        """Draw a tree of these tokens. decoder_start: the first node's token of a model whose prompt is encoded."""
        prompt, count = int(rng.integers(1, sizes.prompt + 1)), int(rng.integers(1, sizes.nodes + 1))
        visible = np.zeros((prompt + count, prompt + count), dtype=bool)
        visible[:prompt, :prompt] = np.tri(prompt, dtype=bool)
        visible[prompt:, :prompt] = True
        depth = np.zeros(count, dtype=np.int64)
        for node in range(count):
            open_nodes = np.flatnonzero(depth[:node] < sizes.depth - 1)
            if len(open_nodes) and (decoder_start is not None or rng.random() < _BRANCHING):
                parent = int(rng.choice(open_nodes))
                visible[prompt + node] = visible[prompt + parent]
                depth[node] = depth[parent] + 1
            visible[prompt + node, prompt + node] = True
        drawn = rng.choice(tokens, prompt + count)
        start = 0 if decoder_start is None else prompt
        if decoder_start is not None:
            drawn[prompt] = decoder_start
        positions = np.concatenate([np.arange(prompt), prompt - start + depth])
        return cls(prompt, start, drawn, positions, visible)

    def path(self, node: int) -> SampleTree:
        """Return the prompt and the path to a node, which is counted from the first one."""
        kept = np.flatnonzero(self.visible[self.prompt + node])
        return SampleTree(
            self.prompt, self.encoded, self.tokens[kept], self.positions[kept], self.visible[np.ix_(kept, kept)]
        )


@dataclass
class _Growing:
    """A tree whose tokens are computed pass by pass.

    Attributes:
        tree: the tree.
        kv: [layers, 2, P + n, kv_heads, head_dim].
        outputs: code logits and log-normalizer of each node, [n, C + 1].
        length: the number of computed tokens.
    """

    tree: SampleTree
    kv: KvArray
    outputs: Float32
    length: int = 0
    _rows: Int64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @classmethod
    def begin(cls, decoder: Decoder, tree: SampleTree) -> _Growing:
        count = len(tree.tokens)
        kv, outputs = decoder.empty_kv(count), np.empty((count - tree.prompt, decoder.columns + 1), np.float32)
        if isinstance(decoder, EncoderDecoder):
            decoder.encode(tree.tokens[: tree.encoded], kv[:, :, : tree.encoded])
        return cls(tree, kv, outputs, tree.encoded)

    def path(self, node: int) -> _Growing:
        """Return the tree of one path below the prompt, which is computed."""
        tree = self.tree.path(node)
        kv = np.empty_like(self.kv[:, :, : len(tree.tokens)], order="C")
        kv[:, :, : tree.prompt] = self.kv[:, :, : tree.prompt]
        outputs = np.empty((len(tree.tokens) - tree.prompt, self.outputs.shape[1]), np.float32)
        return _Growing(tree, kv, outputs, tree.prompt)

    def step(self, end: int) -> TreeInput:
        """Return the input of the pass up to token `end`."""
        tree, span = self.tree, slice(self.length, end)
        self._rows = np.arange(max(self.length, tree.prompt), end)
        step = MaskedPass(
            tree.tokens[span],
            tree.positions[span],
            self._rows - self.length if len(self._rows) else np.zeros(1, dtype=np.int64),
            tree.visible[span, :end],
            np.arange(end) >= tree.prompt,
        )
        return TreeInput(step, self.kv[:, :, : self.length], self.kv[:, :, span])

    def commit(self, end: int, output: TreeOutput) -> None:
        if len(self._rows):
            self.outputs[self._rows - self.tree.prompt] = np.column_stack([output.code_logits, output.log_normalizer])
        self.length = end


def check_invariance(
    decoders: Sequence[Decoder],
    sizes: TreeSizes,
    tokens: Int64,
    *,
    trees: int,
    decoder_start: int | None = None,
    seed: int = 0,
) -> Moved:
    """Compare at least this many random trees, in shared passes and alone, on decoders that are drawn for every pass.

    Args:
        decoders: the model, with one number of threads or several.
        sizes: bounds of the trees.
        tokens: the tokens to draw from, int64.
        trees: the number of trees.
        decoder_start: the token that the decoder of an encoder-decoder model begins with.
        seed: of the trees.
    """
    passes, moved = _Passes(np.random.default_rng(seed), decoders), Moved()
    while moved.trees < trees:
        for grown in passes.in_shared_passes(sizes, tokens, decoder_start):
            passes.compare_alone(grown, moved)
    return moved


class _Passes:
    """Passes on decoders that are drawn at random."""

    def __init__(self, rng: np.random.Generator, decoders: Sequence[Decoder]) -> None:
        self._rng = rng
        self._decoders = decoders
        self._runners = [BatchDecoder(decoder) for decoder in decoders]

    def in_shared_passes(self, sizes: TreeSizes, tokens: Int64, decoder_start: int | None) -> list[_Growing]:
        """Draw trees and compute them, with the rest of their prompts and all nodes in one pass."""
        rng, decoder = self._rng, self._drawn(self._decoders)
        # Only a tree alone in a pass has a long prompt.
        count = 1 if rng.random() < _ALONE else int(rng.integers(1, sizes.trees + 1))
        if count > 1:  # a quarter each for prompts and nodes: cached tokens and new ones are padded apart
            quarter = decoder.shared_keys // 4
            sizes = replace(sizes, prompt=min(sizes.prompt, quarter), nodes=min(sizes.nodes, quarter))
        trees = [SampleTree.draw(rng, sizes, tokens, decoder_start) for _ in range(count)]
        together = [_Growing.begin(decoder, tree) for tree in trees]
        for grown in together:
            self._read(grown, rng.integers(0, grown.tree.prompt + 1, 2).tolist())
        self._run(together, [len(grown.tree.tokens) for grown in together])
        return together

    def compare_alone(self, together: _Growing, moved: Moved) -> None:
        """Compute the prompt with other cuts, and the nodes of a few paths one by one; compare."""
        rng, tree = self._rng, together.tree
        alone = _Growing.begin(self._drawn(self._decoders), tree)
        self._read(alone, [*rng.integers(0, tree.prompt + 1, 2).tolist(), tree.prompt])
        moved.trees += 1
        moved.prompts_moved += int((alone.kv[:, :, : tree.prompt] != together.kv[:, :, : tree.prompt]).any())
        count = len(tree.tokens) - tree.prompt
        for node in rng.choice(count, min(_PATHS, count), replace=False).tolist():
            path = alone.path(node)
            for end in range(tree.prompt, len(path.tree.tokens)):
                self._run([path], [end + 1])
            kept = np.flatnonzero(tree.visible[tree.prompt + node, tree.prompt :])
            same = path.kv[:, :, tree.prompt :] == together.kv[:, :, tree.prompt + kept]
            moved.record(path.outputs, together.outputs[kept], same.all(axis=(0, 1, 3, 4)))

    def _read(self, grown: _Growing, ends: Sequence[int]) -> None:
        """Compute prompt tokens up to each of these ends."""
        for end in sorted(ends):
            if end > grown.length:
                self._run([grown], [end])

    def _run(self, trees: Sequence[_Growing], ends: Sequence[int]) -> None:
        outputs = self._drawn(self._runners).run([tree.step(end) for tree, end in zip(trees, ends, strict=True)])
        for tree, end, output in zip(trees, ends, outputs, strict=True):
            tree.commit(end, output)

    def _drawn(self, choices: Sequence[Drawn]) -> Drawn:
        return choices[int(self._rng.integers(len(choices)))]
