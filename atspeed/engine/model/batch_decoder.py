"""One pass over several token trees: gathered into padded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atspeed.engine.arrays import Bools, Float32, Int64, KvArray
from atspeed.engine.model.decoder import Decoder
from atspeed.engine.model.token_tree import MaskedPass


@dataclass(frozen=True)
class TreeInput:
    """One tree's part of a pass.

    Attributes:
        step: the tokens that the model reads.
        past: KV of the cached tokens, [layers, 2, P, kv_heads, head_dim].
        new_kv: KV of the new tokens, [layers, 2, S, kv_heads, head_dim]; it is overwritten.
    """

    step: MaskedPass
    past: KvArray
    new_kv: KvArray


@dataclass(frozen=True)
class TreeOutput:
    """The model's output for the M requested rows of one tree.

    Attributes:
        code_logits: float32 [M, C].
        log_normalizer: float32 [M].
        state: float32 [M, state_size]; None if the graph gives none.
    """

    code_logits: Float32
    log_normalizer: Float32
    state: Float32 | None = None


class BatchDecoder:
    """Runs a decoder on the memory of one tree, or on a padded copy of several. For one thread.

    The memory of the copy is reused. It is as large as the largest batch: at most `BatchLimits.gathered_tokens`.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._memory = decoder.empty_kv(0).reshape(-1)

    def run(self, trees: Sequence[TreeInput]) -> list[TreeOutput]:
        """Make one pass over one tree or more. A tree's output depends on the others by rounding, if the graph is not ordered."""
        if len(trees) == 1:
            [tree], step = trees, trees[0].step
            decoder = self._decoder
            return [
                TreeOutput(
                    *decoder.run(
                        step.tokens, step.positions, step.visible, tree.past, step.rows, tree.new_kv, step.nodes
                    )
                )
            ]
        steps = [tree.step for tree in trees]
        count, cached = max(len(step.tokens) for step in steps), max(tree.past.shape[2] for tree in trees)
        past, new_kv = self._buffers(len(trees), cached, count)
        for row, tree in enumerate(trees):
            _fill(self._decoder.form.of_tree(past, row), tree.past)
        outputs = self._decoder.run_batch(
            _padded([step.tokens for step in steps], count),
            _padded([step.positions for step in steps], count),
            _visible(steps, cached, count),
            past,
            # Rows of the flattened [B * count] tokens.
            np.concatenate([step.rows + row * count for row, step in enumerate(steps)]),
            new_kv,
            _nodes(steps, cached, count),
        )
        for row, tree in enumerate(trees):
            tree.new_kv[:] = self._decoder.form.of_tree(new_kv, row)[:, :, : len(tree.step.tokens)]
        ends = np.cumsum([len(step.rows) for step in steps])[:-1]  # of each tree's rows in the output
        return [TreeOutput(*parts) for parts in zip(*(np.split(output, ends) for output in outputs), strict=True)]

    def _buffers(self, batch: int, cached: int, count: int) -> tuple[KvArray, KvArray]:
        """Return uninitialised arrays for `past` and `new_kv` of a batch. They reuse the memory of earlier batches."""
        decoder = self._decoder
        shapes = [decoder.batch_shape(batch, tokens) for tokens in (cached, count)]
        sizes = [int(np.prod(shape)) for shape in shapes]
        if sum(sizes) > len(self._memory):
            self._memory = np.empty(sum(sizes), dtype=decoder.dtype)
        past, new_kv = self._memory[: sizes[0]], self._memory[sizes[0] : sum(sizes)]
        return past.reshape(shapes[0]), new_kv.reshape(shapes[1])


def _fill(padded: KvArray, past: KvArray) -> None:
    """Copy a tree's cached tokens. Padding is 0: masked values are multiplied by 0 and must be finite."""
    length = past.shape[2]
    padded[:, :, :length] = past
    padded[:, :, length:] = 0


def _padded(rows: Sequence[Int64], count: int) -> Int64:
    """Return rows of different lengths as one array [B, count], each padded with its first value.

    The keys and values of another token might not be finite, and attention multiplies masked ones by 0.
    """
    array = np.empty((len(rows), count), dtype=np.int64)
    for row, values in enumerate(rows):
        array[row, : len(values)] = values
        array[row, len(values) :] = values[0]
    return array


def _visible(steps: Sequence[MaskedPass], cached: int, count: int) -> Bools:
    """Return the attention mask of a batch, bool [B, count, cached + count].

    The last axis holds a tree's cached tokens, padding, its new tokens, padding. A padding token attends to itself alone:
    without any token its output might be NaN, and 0 * NaN is NaN for the others.
    """
    visible = np.zeros((len(steps), count, cached + count), dtype=bool)
    for row, step in enumerate(steps):
        new = len(step.tokens)
        past = step.visible.shape[1] - new
        visible[row, :new, :past] = step.visible[:, :past]
        visible[row, :new, cached : cached + new] = step.visible[:, past:]
        padding = np.arange(new, count)
        visible[row, padding, cached + padding] = True
    return visible


def _nodes(steps: Sequence[MaskedPass], cached: int, count: int) -> Bools:
    """Return which tokens are nodes, bool [B, cached + count], placed as in `_visible`. Padding is: nothing is added to it."""
    nodes = np.ones((len(steps), cached + count), dtype=bool)
    for row, step in enumerate(steps):
        past = len(step.nodes) - len(step.tokens)
        nodes[row, :past] = step.nodes[:past]
        nodes[row, past:cached] = False
        nodes[row, cached : cached + len(step.tokens)] = step.nodes[past:]
    return nodes
