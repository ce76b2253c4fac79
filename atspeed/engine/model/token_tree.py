"""Token trees: one pass reads prompt and proposed nodes with tree attention.

The prompt is a chain, and the plan's nodes hang below it (docs/method.md, section 3). In tree attention a token sees only its
ancestors, so one pass evaluates every node as if its code path had been read alone (SpecInfer, arXiv 2305.09781).
"""

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
    """The input of one pass: the new tokens of a token tree, flattened into one row.

    Attributes:
        tokens: token ids, int64 [S].
        positions: positions, int64 [S]. Nodes of one depth share a position.
        visible: the tree attention mask, bool [S, P + S]: true where a new token attends to a cached or new one.
        rows: the new tokens whose logits are wanted, int64 [M], in the order of the nodes of the pass.
        nodes: bool [P + S]: true for nodes, false for prompt tokens.
    """

    tokens: Int64
    positions: Int64
    visible: npt.NDArray[np.bool_]
    rows: Int64
    nodes: npt.NDArray[np.bool_]


@dataclass
class TokenTree:
    """The prompt and the evaluated nodes of one request, with their keys and values in the order of computation.

    Attributes:
        prompt: token ids, int64 [prompt].
        kv: [layers, 2, capacity, kv_heads, head_dim]. The capacity is that of the last buffer, 0 at first.
        length: the number of tokens of `kv` that are filled.
        slots: evaluated node -> its place in `kv`. The root has none: its logits are the last prompt token's.
    """

    prompt: Int64
    kv: KvArray
    length: int = 0
    slots: dict[int, int] = field(default_factory=dict)

    def move_to(self, kv: KvArray) -> KvArray:
        """Move to a larger buffer. Returns the old one, which the tree no longer uses."""
        old = self.kv
        self.kv = kv
        kv[:, :, : self.length] = old[:, :, : self.length]
        return old

    def fill_prefix(self, blocks: Sequence[KvArray]) -> None:
        """Copy in cached blocks [layers, 2, block, kv_heads, head_dim] of the prompt's beginning.

        The last prompt token is always computed: it evaluates the root.
        """
        for block in blocks:
            end = min(self.length + block.shape[2], len(self.prompt) - 1)
            self.kv[:, :, self.length : end] = block[:, :, : end - self.length]
            self.length = end

    def plan_pass(self, trie: Trie, nodes: Int64, code_tokens: Int64) -> TreePass:
        """Return the pass that computes the rest of the prompt and evaluates `nodes`, int64 [n], ascending.

        Raises CapacityError, a mistake of the caller, when an ancestor of a node is neither evaluated nor among `nodes`.
        """
        cached, prompt = self.length, len(self.prompt)
        new_prompt = max(0, prompt - cached)
        inner = nodes[nodes != ROOT]
        total = new_prompt + len(inner)
        depth = trie.depth(inner)
        # The new tokens: the rest of the prompt, then a code token for each node.
        tokens = np.concatenate([self.prompt[prompt - new_prompt :], code_tokens[trie.column(inner)]])
        positions = np.concatenate([np.arange(prompt - new_prompt, prompt), prompt + depth - 1])

        visible = np.zeros((total, cached + total), dtype=bool)
        # A prompt token sees the prompt up to itself, a node sees all of it.
        visible[:new_prompt, :prompt] = np.tri(new_prompt, prompt, k=prompt - new_prompt, dtype=bool)
        visible[new_prompt:, :prompt] = True
        slots = dict(zip(inner.tolist(), range(cached + new_prompt, cached + total), strict=True))
        known = self.slots | slots
        # Each node also sees itself and its ancestors: mark them level by level, upwards to the root.
        row, node = np.arange(new_prompt, total), inner
        while len(node):
            try:
                visible[row, [known[n] for n in node.tolist()]] = True
            except KeyError as missing:
                raise CapacityError(f"nodes: node {missing} is an ancestor that was not evaluated") from None
            node = trie.parent[node].astype(np.int64)
            row, node = row[node != ROOT], node[node != ROOT]
        # The logits of each node, and of the last prompt token for the root.
        rows = np.arange(new_prompt, total)
        if len(nodes) and nodes[0] == ROOT:
            rows = np.concatenate([[new_prompt - 1], rows])
        return TreePass(tokens, positions, visible, rows, np.arange(cached + total) >= prompt)

    def commit(self, trie_pass: TreePass, nodes: Int64) -> None:
        """Record a pass whose keys and values are in `kv` after `length`."""
        inner = nodes[nodes != ROOT].tolist()
        self.length += len(trie_pass.tokens)
        self.slots.update(zip(inner, range(self.length - len(inner), self.length), strict=True))
