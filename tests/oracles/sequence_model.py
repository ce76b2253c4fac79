"""A checkpoint read as a plain sequence: prompt, then the codes of a path, one causal pass, no tree and no cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from tests.oracles.naive_trie import NaiveTrie, Path


class SequenceModel:
    """Log-probabilities of codes after a path, from the torch model itself; see `NaiveModel` for the two rules."""

    def __init__(
        self,
        model: PreTrainedModel,
        trie: NaiveTrie,
        code_tokens: Sequence[int],
        prompt: npt.NDArray[np.int64],
        *,
        over_children: bool,
    ) -> None:
        self._model, self._trie, self._code_tokens = model, trie, code_tokens
        self._prompt, self._over_children = prompt.tolist(), over_children
        self._known: dict[Path, dict[int, float]] = {}
        for depth in range(trie.levels):
            self._read([path for path in trie.nodes if len(path) == depth])

    def __call__(self, path: Path, code: int) -> float:
        """Of one code."""
        return self._known[path][code]

    def _token(self, level: int, code: int) -> int:
        return self._code_tokens[sum(self._trie.codebook_sizes[:level]) + code]

    def _read(self, paths: Sequence[Path]) -> None:
        """Paths of one length, as a batch of independent sequences."""
        tokens = [self._prompt + [self._token(level, code) for level, code in enumerate(path)] for path in paths]
        with torch.no_grad():
            last = self._model(torch.tensor(tokens)).logits[:, -1].double()
        for path, logits in zip(paths, last, strict=True):
            children = self._trie.children(path)
            wanted = logits[torch.tensor([self._token(len(path), code) for code in children])]
            normalizer = torch.logsumexp(wanted if self._over_children else logits, dim=0)
            self._known[path] = dict(zip(children, (wanted - normalizer).tolist(), strict=True))
