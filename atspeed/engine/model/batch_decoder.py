"""Passes over several token trees as one: gathered into padded arrays, run, and scattered back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atspeed.engine.arrays import Bools, Float32, Int64, KvArray
from atspeed.engine.model.decoder import Decoder
from atspeed.engine.model.token_tree import TreePass


@dataclass(frozen=True)
class TreeInput:
    """One tree's part of a pass. past: [layers, 2, P, kv_heads, head_dim]; new_kv: the same for S tokens, is overwritten."""

    step: TreePass
    past: KvArray
    new_kv: KvArray


@dataclass(frozen=True)
class TreeOutput:
    """What the model says of the M rows that were asked for. code_logits: float32 [M, C]; log_normalizer: float32 [M]."""

    code_logits: Float32
    log_normalizer: Float32


class BatchDecoder:
    """Runs a decoder on one tree's memory, or on a padded copy of several trees'. For one thread.

    The copy's memory stays for the next batch, as large as the largest was: at most `BatchLimits.gathered_tokens`.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._memory = decoder.empty_kv(0).reshape(-1)

    def run(self, trees: Sequence[TreeInput]) -> list[TreeOutput]:
        """One pass over some trees, one or more. What it says of a tree does not depend on the others, but for rounding."""
        if len(trees) == 1:
            [tree], step = trees, trees[0].step
            decoder = self._decoder
            return [
                TreeOutput(*decoder.run(step.tokens, step.positions, step.visible, tree.past, step.rows, tree.new_kv))
            ]
        steps = [tree.step for tree in trees]
        count, cached = max(len(step.tokens) for step in steps), max(tree.past.shape[2] for tree in trees)
        past, new_kv = self._buffers(len(trees), cached, count)
        _gather(trees, past)
        logits, log_normalizer = self._decoder.run_batch(
            _padded([step.tokens for step in steps], count),
            _padded([step.positions for step in steps], count),
            _visible(steps, cached, count),
            past,
            np.concatenate([step.rows + row * count for row, step in enumerate(steps)]),
            new_kv,
        )
        for row, tree in enumerate(trees):
            tree.new_kv[:] = new_kv[:, :, row, : len(tree.step.tokens)]
        ends = np.cumsum([len(step.rows) for step in steps])[:-1]
        return [
            TreeOutput(*parts) for parts in zip(np.split(logits, ends), np.split(log_normalizer, ends), strict=True)
        ]

    def _buffers(self, batch: int, cached: int, count: int) -> tuple[KvArray, KvArray]:
        """Room for `past` and `new_kv` of a batch, in the memory that is there as far as it goes."""
        decoder = self._decoder
        shapes = [(decoder.layers, 2, batch, n, decoder.kv_heads, decoder.head_dim) for n in (cached, count)]
        sizes = [int(np.prod(shape)) for shape in shapes]
        if sum(sizes) > len(self._memory):
            self._memory = np.empty(sum(sizes), dtype=decoder.dtype)
        past, new_kv = self._memory[: sizes[0]], self._memory[sizes[0] : sum(sizes)]
        return past.reshape(shapes[0]), new_kv.reshape(shapes[1])


def _gather(trees: Sequence[TreeInput], past: KvArray) -> None:
    """Copy the trees' cached tokens side by side. Padding is 0: what is masked counts 0 times its value, so it must be finite."""
    for row, tree in enumerate(trees):
        length = tree.past.shape[2]
        past[:, :, row, :length] = tree.past
        past[:, :, row, length:] = 0


def _padded(rows: Sequence[Int64], count: int) -> Int64:
    """Rows of different lengths as one array [B, count], each padded with its first value.

    Any other token might be one whose keys and values are not finite, and what is masked counts 0 times those.
    """
    array = np.empty((len(rows), count), dtype=np.int64)
    for row, values in enumerate(rows):
        array[row, : len(values)] = values
        array[row, len(values) :] = values[0]
    return array


def _visible(steps: Sequence[TreePass], cached: int, count: int) -> Bools:
    """bool [B, count, cached + count]: a tree's cached tokens, padding, its new tokens, padding.

    Padding sees itself alone: a token that saw nothing might become NaN, and then so would all that weigh it by 0.
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
