"""Prompts with trie nodes below them, one row of tokens each: one pass gives a model's logits after every node.

The target's log-probabilities are written and the draft is aligned through the same rows (method: one pass over a token
tree), so both models answer at the same prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from atspeed.engine.arrays import Bools, Int64
from atspeed.engine.search.trie import ROOT, Trie
from atspeed.training.sequences import Spelling


@dataclass(frozen=True)
class PromptTrees:
    """b prompts, padded on the left to s tokens, each with up to m nodes below; the first node is the root.

    The root is the prompt's last token, so a row has t = s + m - 1 tokens and its last m give the logits after the nodes.
    tokens, positions: int64 [b, t]. sees: bool [b, t, t], which token sees which. nodes: m.
    """

    tokens: Tensor
    positions: Tensor
    sees: Tensor
    nodes: int

    @classmethod
    def of(cls, prompts: Sequence[Int64], nodes: Int64, trie: Trie, spelling: Spelling) -> Self:
        """prompts: token ids. nodes: [b, m], ascending, each with its parent, then -1. Raises ValueError when one has none."""
        longest = max(map(len, prompts))
        tokens = np.full((len(prompts), longest), spelling.pad_token, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = prompt
        lengths = np.array([len(prompt) for prompt in prompts])[:, None]
        positions = np.maximum(np.arange(longest) - (longest - lengths), 0)
        below = np.maximum(nodes[:, 1:], 1)  # any node where there is none: nothing sees it
        node_tokens = np.asarray(spelling.code_tokens, dtype=np.int64)[trie.column(below)]
        tokens = np.concatenate([tokens, node_tokens], axis=1)
        positions = np.concatenate([positions, lengths - 1 + trie.depth(below)], axis=1)
        sees = _sees(np.arange(longest) >= longest - lengths, parent_rows(nodes, trie), trie.levels)
        return cls(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(sees), nodes.shape[1])

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "positions", "sees")}
        return replace(self, **moved)

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of a Hugging Face model whose weights are of `dtype`; its logits are then [b, m, V]."""
        bias = torch.zeros(self.sees.shape, dtype=dtype, device=self.sees.device)
        bias = bias.masked_fill(~self.sees, torch.finfo(dtype).min)
        return {
            "input_ids": self.tokens,
            "position_ids": self.positions,
            "attention_mask": bias.unsqueeze(1),
            "logits_to_keep": self.nodes,
        }


def parent_rows(nodes: Int64, trie: Trie) -> Int64:
    """Index among `nodes` [b, m] of each one's parent, [b, m]; of the root and where there is no node, its own index."""
    own = np.broadcast_to(np.arange(nodes.shape[1]), nodes.shape)
    rows = row_of(nodes, np.where(nodes > ROOT, trie.parent[np.maximum(nodes, ROOT)], ROOT))
    return np.where(nodes > ROOT, rows, own)


def row_of(nodes: Int64, wanted: Int64) -> Int64:
    """Index among `nodes` [b, m] of each of `wanted` [b, w], [b, w]. Raises ValueError when one is not there."""
    same = nodes[:, None, :] == wanted[:, :, None]
    if not same.any(axis=2).all():
        raise ValueError("nodes: one is asked for that is not among them")
    rows: Int64 = same.argmax(axis=2)
    return rows


def _sees(real: Bools, parents: Int64, levels: int) -> Bools:
    """Causal within a prompt, without its padding; each node sees the prompt, its ancestors and itself. [b, t, t]"""
    count, prompt = real.shape
    rows, own = np.arange(count)[:, None], np.arange(parents.shape[1])[None, :]
    tree = np.zeros((*parents.shape, parents.shape[1]), dtype=bool)
    ancestor = np.broadcast_to(own, parents.shape)
    for _ in range(levels):
        tree[rows, own, ancestor] = True
        ancestor = parents[rows, ancestor]
    sees = np.zeros((count, prompt + parents.shape[1] - 1, prompt + parents.shape[1] - 1), dtype=bool)
    sees[:, :, :prompt] = real[:, None, :]
    sees[:, :prompt, :prompt] &= np.tri(prompt, dtype=bool)
    sees[:, :prompt, :prompt] |= np.eye(prompt, dtype=bool)  # padding sees itself: a softmax over nothing is NaN
    sees[:, prompt:, prompt:] = tree[:, 1:, 1:]
    return sees
