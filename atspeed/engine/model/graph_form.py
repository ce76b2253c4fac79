"""Forms of a decoder's graph: the order of keys and values, biases of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Bools, KvArray

BLOCK_KEYS = 1024
"""Keys that a graph of ordered sums adds in one go (atspeed/training/ordered_attention.py)."""
ORDERED = "ordered_sums"
"""The metadata of a graph whose sums have one order; its value is "true"."""


@dataclass(frozen=True)
class GraphForm:
    """The two things in which graphs differ.

    Attributes:
        keys_first: true if the keys and values of a layer are [tokens, batch, ...] instead of [batch, tokens, ...].
        node_bias: true if the keys of nodes have a bias of their own.
    """

    keys_first: bool = False
    node_bias: bool = False

    def outer(self, batch: Any, tokens: Any) -> tuple[Any, Any]:
        """Return these two, sizes or names of axes, in the order of the graph."""
        return (tokens, batch) if self.keys_first else (batch, tokens)

    def with_batch(self, kv: KvArray) -> KvArray:
        """Return KV [layers, 2, tokens, ...] as that of a batch of one tree, without a copy."""
        return kv[:, :, :, None] if self.keys_first else kv[:, :, None]

    def of_tree(self, kv: KvArray, row: int) -> KvArray:
        """Return one tree's part of the KV of a batch, [layers, 2, tokens, ...], without a copy."""
        return kv[:, :, :, row] if self.keys_first else kv[:, :, row]

    def biases(self, values: npt.NDArray[Any], visible: Bools, nodes: Bools | None) -> dict[str, npt.NDArray[Any]]:
        """Return what is added to scores: one bias for all keys, or one for the prompt's and one for those of nodes.

        Args:
            values: the bias of a masked key and that of a visible one, [2].
            visible: bool [B, S, P + S].
            nodes: bool [B, P + S]; None if no key is a node's.
        """
        if not self.node_bias:
            return {"attn_bias": _bias(values, visible)}
        if nodes is None:
            nodes = np.zeros((len(visible), visible.shape[2]), dtype=bool)
        # The last keys, from the first node on; without a node the last key, masked.
        found = np.flatnonzero(nodes.any(axis=0))
        first = int(found[0]) if len(found) else nodes.shape[1] - 1
        return {
            "attn_bias": _bias(values, visible & ~nodes[:, None]),
            "node_bias": _bias(values, (visible & nodes[:, None])[:, :, first:]),
        }


def _bias(values: npt.NDArray[Any], visible: Bools) -> npt.NDArray[Any]:
    return values.take(np.ascontiguousarray(visible).view(np.uint8))[:, None]
