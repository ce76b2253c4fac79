"""Token trees: one pass reads prompt and proposed nodes with tree attention.

The prompt is a chain, and the plan's nodes hang below it (docs/method.md, section 3). In tree attention a token sees only its
ancestors, so one pass evaluates every node as if its code path had been read alone (SpecInfer, arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from atspeed.engine.arrays import Bools, Int32, Int64, KvArray
from atspeed.engine.errors import CapacityError
from atspeed.engine.search.trie import ROOT, Trie

_Ancestry = Iterator[tuple[Int64, list[int]]]


@dataclass(frozen=True)
class TreePass:
    """The input of one pass: the new tokens of a token tree, flattened into one row.

    Attributes:
        tokens: token ids, int64 [S].
        positions: positions, int64 [S]. Nodes of one depth share a position.
        rows: the new tokens whose logits are wanted, int64 [M], in the order of the nodes of the pass.
    """

    tokens: Int64
    positions: Int64
    rows: Int64


@dataclass(frozen=True)
class MaskedPass(TreePass):
    """A pass with its tree attention mask, as the host's graph takes it.

    Attributes:
        visible: bool [S, P + S]: true where a new token attends to a cached or new one.
        nodes: bool [P + S]: true for nodes, false for prompt tokens.
    """

    visible: Bools
    nodes: Bools


@dataclass(frozen=True)
class PathPass(TreePass):
    """A pass with the places that each token sees, as the device's graph takes them.

    Attributes:
        prefix_lengths: int64 [S]: n where the token sees the first n places.
        ancestors: int32 [S, depth]: further places that it sees; spare entries are 0.
    """

    prefix_lengths: Int64
    ancestors: Int32


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
        step, new_prompt, ancestry = self._planned(trie, nodes, code_tokens)
        cached, prompt, total = self.length, len(self.prompt), len(step.tokens)
        visible = np.zeros((total, cached + total), dtype=bool)
        # A prompt token sees the prompt up to itself, a node sees all of it.
        visible[:new_prompt, :prompt] = np.tri(new_prompt, prompt, k=prompt - new_prompt, dtype=bool)
        visible[new_prompt:, :prompt] = True
        for row, places in ancestry:
            visible[row, places] = True
        return MaskedPass(step.tokens, step.positions, step.rows, visible, np.arange(cached + total) >= prompt)

    def plan_prompt(self, tokens: int) -> TreePass:
        """Return the pass that computes so many more tokens of the prompt, and no node. Its one row is the last of them."""
        start, end = self.length, self.length + tokens
        visible = np.tri(tokens, end, k=start, dtype=bool)
        return MaskedPass(
            self.prompt[start:end],
            np.arange(start, end),
            np.array([tokens - 1]),
            visible,
            np.zeros(end, dtype=bool),
        )

    def _planned(self, trie: Trie, nodes: Int64, code_tokens: Int64) -> tuple[TreePass, int, _Ancestry]:
        """Return a pass without what its tokens see, the number of its prompt tokens, and the ancestry of its nodes."""
        cached, prompt = self.length, len(self.prompt)
        new_prompt = max(0, prompt - cached)
        inner = nodes[nodes != ROOT]
        total = new_prompt + len(inner)
        depth = trie.depth(inner)
        # The new tokens: the rest of the prompt, then a code token for each node.
        tokens = np.concatenate([self.prompt[prompt - new_prompt :], code_tokens[trie.column(inner)]])
        positions = np.concatenate([np.arange(prompt - new_prompt, prompt), prompt + depth - 1])
        # The logits of each node, and of the last prompt token for the root.
        rows = np.arange(new_prompt, total)
        if len(nodes) and nodes[0] == ROOT:
            rows = np.concatenate([[new_prompt - 1], rows])
        slots = dict(zip(inner.tolist(), range(cached + new_prompt, cached + total), strict=True))
        return TreePass(tokens, positions, rows), new_prompt, self._ancestry(trie, inner, new_prompt, slots)

    def _ancestry(self, trie: Trie, inner: Int64, first_row: int, slots: dict[int, int]) -> _Ancestry:
        """Yield rows of nodes and a place that each of them sees: the node itself, then its parent, upwards to the root."""
        known = self.slots | slots
        row, node = np.arange(first_row, first_row + len(inner)), inner
        while len(node):
            try:
                places = [known[n] for n in node.tolist()]
            except KeyError as missing:
                raise CapacityError(f"nodes: node {missing} is an ancestor that was not evaluated") from None
            yield row, places
            node = trie.parent[node].astype(np.int64)
            row, node = row[node != ROOT], node[node != ROOT]

    def commit(self, trie_pass: TreePass, nodes: Int64) -> None:
        """Record a pass whose keys and values are in `kv` after `length`."""
        inner = nodes[nodes != ROOT].tolist()
        self.length += len(trie_pass.tokens)
        self.slots.update(zip(inner, range(self.length - len(inner), self.length), strict=True))


@dataclass
class PagedTree(TokenTree):
    """A token tree whose keys and values are in pages on a device. `kv` stays empty."""

    def plan_pass(self, trie: Trie, nodes: Int64, code_tokens: Int64) -> PathPass:
        """Return the pass with the places that each token sees; see `TokenTree.plan_pass`."""
        step, new_prompt, ancestry = self._planned(trie, nodes, code_tokens)
        total, prompt = len(step.tokens), len(self.prompt)
        prefix_lengths = np.full(total, prompt, dtype=np.int64)
        prefix_lengths[:new_prompt] = step.positions[:new_prompt] + 1
        ancestors = np.zeros((total, path_depth(trie)), dtype=np.int32)
        for level, (row, places) in enumerate(ancestry):
            ancestors[row, level] = places
        return PathPass(step.tokens, step.positions, step.rows, prefix_lengths, ancestors)


def path_depth(trie: Trie) -> int:
    """Return the places that a node's token sees besides the prompt: itself and its ancestors below the root."""
    return max(1, trie.levels - 1)
