"""Token trees: prompt tokens are a chain, trie nodes hang below it, one pass reads any new part (method, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.errors import CapacityError
from atspeed.engine.search.trie import ROOT, Trie


@dataclass(frozen=True)
class TreePass:
    """What the model reads in one pass, flattened into one row.

    tokens, positions: int64 [S]. visible: bool [S, P + S], whether a new token attends to a cached or new one.
    rows: int64 [M], the new tokens whose logits are wanted, in the order of the nodes asked for.
    """

    tokens: Int64
    positions: Int64
    visible: npt.NDArray[np.bool_]
    rows: Int64


@dataclass
class TokenTree:
    """One request's prompt and evaluated nodes, and the keys and values of all of them in the order they were computed.

    prompt: int64 [prompt]. kv: [layers, 2, capacity, kv_heads, head_dim], of which the first `length` tokens are filled;
    capacity is that of the buffer which it was last moved to, 0 at first.
    slots: the place in `kv` of every evaluated node but the root, whose logits are the last prompt token's.
    """

    prompt: Int64
    kv: KvArray
    length: int = 0
    slots: dict[int, int] = field(default_factory=dict)

    def move_to(self, kv: KvArray) -> KvArray:
        """Go on in a larger buffer. Returns the old one, which the tree does not use any more."""
        old, self.kv = self.kv, kv
        kv[:, :, : self.length] = old[:, :, : self.length]
        return old

    def fill_prefix(self, blocks: Sequence[KvArray]) -> None:
        """Start from cached blocks [layers, 2, block, kv_heads, head_dim] of the prompt's beginning."""
        for block in blocks:
            end = self.length + block.shape[2]
            self.kv[:, :, self.length : end] = block
            self.length = end

    def plan_pass(self, trie: Trie, nodes: Int64, code_tokens: Int64) -> TreePass:
        """The pass that evaluates `nodes` [n], ascending, and whatever of the prompt is not computed yet.

        Raises CapacityError (a caller's mistake) when a node's parent is neither evaluated nor among them.
        """
        cached, prompt = self.length, len(self.prompt)
        new_prompt = max(0, prompt - cached)
        inner = nodes[nodes != ROOT]
        total = new_prompt + len(inner)
        depth = trie.depth(inner)
        tokens = np.concatenate([self.prompt[prompt - new_prompt :], code_tokens[trie.column(inner)]])
        positions = np.concatenate([np.arange(prompt - new_prompt, prompt), prompt + depth - 1])

        visible = np.zeros((total, cached + total), dtype=bool)
        visible[:new_prompt, :prompt] = np.tri(new_prompt, prompt, k=prompt - new_prompt, dtype=bool)
        visible[new_prompt:, :prompt] = True
        slots = dict(zip(inner.tolist(), range(cached + new_prompt, cached + total), strict=True))
        known = self.slots | slots
        row, node = np.arange(new_prompt, total), inner
        while len(node):
            try:
                visible[row, [known[n] for n in node.tolist()]] = True
            except KeyError as missing:
                raise CapacityError(f"nodes: node {missing} is an ancestor that was not evaluated") from None
            node = trie.parent[node].astype(np.int64)
            row, node = row[node != ROOT], node[node != ROOT]
        rows = np.arange(new_prompt, total)
        if len(nodes) and nodes[0] == ROOT:
            rows = np.concatenate([[new_prompt - 1], rows])
        return TreePass(tokens, positions, visible, rows)

    def commit(self, trie_pass: TreePass, nodes: Int64) -> None:
        """Take the pass's tokens as computed: their keys and values stand in `kv` after `length`."""
        inner = nodes[nodes != ROOT].tolist()
        self.length += len(trie_pass.tokens)
        self.slots.update(zip(inner, range(self.length - len(inner), self.length), strict=True))
