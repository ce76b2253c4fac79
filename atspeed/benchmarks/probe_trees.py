"""Token trees of random tokens, and passes of either graph over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atspeed.benchmarks.made_models import PAGE_TOKENS
from atspeed.engine.arrays import Float32, KvArray
from atspeed.engine.model.decoder import Decoder
from atspeed.engine.model.device_decoder import DeviceDecoder
from atspeed.engine.model.device_pass import PagedInput
from atspeed.engine.model.token_tree import PathPass


class ProbeTree:
    """A prompt and nodes below it, with random tokens.

    Args:
        vocab_size: the number of tokens to choose from.
        prompt: the number of tokens of the chain at its beginning.
        parents: the parent of every token, -1 for the first.

    Attributes:
        prompt: as above.
        tokens, positions: int64 [T].
        visible: bool [T, T], the tree attention mask.
    """

    def __init__(self, vocab_size: int, prompt: int, parents: Sequence[int]) -> None:
        self.prompt = prompt
        self.tokens = np.random.default_rng(len(parents)).integers(0, vocab_size, len(parents))
        self.visible = np.eye(len(parents), dtype=bool)
        for token, parent in enumerate(parents):
            if parent >= 0:
                self.visible[token] |= self.visible[parent]
        self.positions = self.visible.sum(axis=1) - 1

    @classmethod
    def siblings(cls, vocab_size: int, prompt: int, nodes: int) -> ProbeTree:
        """Make a tree whose nodes are all children of the prompt's last token, as a level of beams is."""
        return cls(vocab_size, prompt, [*range(-1, prompt - 1), *[prompt - 1] * nodes])

    @classmethod
    def grown(cls, vocab_size: int, prompt: int, nodes: int, seed: int = 0) -> ProbeTree:
        """Make a tree whose nodes hang anywhere below the prompt."""
        random = np.random.default_rng(seed)
        below = [int(random.integers(prompt - 1, token)) for token in range(prompt, prompt + nodes)]
        return cls(vocab_size, prompt, [*range(-1, prompt - 1), *below])

    def __len__(self) -> int:
        return len(self.tokens)


class HostPasses:
    """Passes of the host's graph, with KV in host memory. The KV that no pass has computed is random."""

    def __init__(self, decoder: Decoder, tree: ProbeTree) -> None:
        self._decoder = decoder
        self._tree = tree
        self._kv: KvArray = decoder.empty_kv(len(tree))
        self._kv[:] = np.random.default_rng(0).standard_normal(self._kv.shape[1:]) * 0.1

    def run(self, start: int, end: int, *, first_row: int = 0) -> Float32:
        """Make a pass over these tokens, behind all before them. Returns the code tokens' log-probabilities, float32 [M, C].

        first_row: the first token of the tree whose scores are wanted.
        """
        tree, span, rows = self._tree, slice(start, end), np.arange(max(start, first_row), end) - start
        past, new = self._kv[:, :, :start], self._kv[:, :, start:end]
        logits, normalizer, *_ = self._decoder.run(
            tree.tokens[span], tree.positions[span], tree.visible[span, :end], past, rows, new
        )
        return logits - normalizer[:, None]


class PagedPasses:
    """Passes of the device's graph, with KV in pages. The KV that no pass has computed is zero.

    first_page: the first of the tree's pages.
    """

    def __init__(self, decoder: DeviceDecoder, tree: ProbeTree, first_page: int = 0) -> None:
        self._decoder = decoder
        self._tree = tree
        self.pages = range(first_page, first_page + -(-len(tree) // PAGE_TOKENS))
        below = [np.flatnonzero(row[tree.prompt :]) + tree.prompt for row in tree.visible]
        self._ancestors = np.zeros((len(tree), max(1, *map(len, below))), dtype=np.int32)
        for row, places in zip(self._ancestors, below, strict=True):
            row[: len(places)] = places

    def input(self, start: int, end: int) -> PagedInput:
        """Return the tree's part of a pass over these tokens."""
        tree, span = self._tree, slice(start, end)
        prefix = np.minimum(np.arange(start, end) + 1, tree.prompt)
        step = PathPass(tree.tokens[span], tree.positions[span], np.arange(end - start), prefix, self._ancestors[span])
        return PagedInput(step, self._decoder.slots(self.pages, end))

    def run(self, start: int, end: int) -> Float32:
        """Make a pass over these tokens, behind all before them. Returns their scores, float32 [end - start, C]."""
        (output,) = self._decoder.run([self.input(start, end)])
        return output.code_logits
