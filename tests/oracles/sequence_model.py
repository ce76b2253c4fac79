"""A checkpoint read as a plain sequence: prompt, then the codes of a path, no tree and no cache.

An encoder reads the prompt alone, and the decoder its first token and the codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from atspeed.engine.search.scoring import ScoringRule
from tests.oracles.naive_trie import NaiveTrie, Path


class SequenceModel:
    """Log-probabilities of codes after a path, from the torch model itself; see `NaiveModel`."""

    def __init__(
        self,
        model: PreTrainedModel,
        trie: NaiveTrie,
        code_tokens: Sequence[int],
        prompt: npt.NDArray[np.int64],
        rule: ScoringRule,
    ) -> None:
        self._model, self._trie, self._code_tokens = model, trie, code_tokens
        self._prompt, self._rule = prompt.tolist(), rule
        self._known: dict[Path, dict[int, float]] = {}
        for depth in range(trie.levels):
            self._read([path for path in trie.nodes if len(path) == depth and -1 not in path])

    def __call__(self, path: Path, code: int) -> float:
        """Return the log-probability of one code; a path that has ended stays as it is."""
        return 0.0 if code == -1 else self._known[path][code]

    def _token(self, level: int, code: int) -> int:
        return self._code_tokens[sum(self._trie.codebook_sizes[:level]) + code]

    def _read(self, paths: Sequence[Path]) -> None:
        """Paths of one length, as a batch of independent sequences."""
        codes = [[self._token(level, code) for level, code in enumerate(path)] for path in paths]
        with torch.no_grad():
            last = self._logits(codes)[:, -1].double()
        for path, logits in zip(paths, last, strict=True):
            children = self._trie.children(path)
            if children == [-1]:
                continue
            wanted = logits[torch.tensor([self._token(len(path), code) for code in children])]
            among = {
                ScoringRule.VOCAB: logits,
                ScoringRule.TRIE: wanted,
                ScoringRule.CODES: logits[torch.tensor(sorted(set(self._code_tokens)))],
            }
            normalizer = torch.logsumexp(among[self._rule], dim=0)
            self._known[path] = dict(zip(children, (wanted - normalizer).tolist(), strict=True))

    def _logits(self, codes: Sequence[list[int]]) -> torch.Tensor:
        """After every token of the prompt and of paths, or of the paths if an encoder reads the prompt."""
        config = self._model.config
        prompts = torch.tensor([self._prompt] * len(codes))
        if config.is_encoder_decoder:
            started = torch.tensor([[config.decoder_start_token_id, *path] for path in codes])
            logits: torch.Tensor = self._model(input_ids=prompts, decoder_input_ids=started).logits
        else:
            logits = self._model(torch.cat([prompts, torch.tensor(codes, dtype=torch.int64)], dim=1)).logits
        return logits
