"""Beam search through the trie for a batch of prompts, in torch.

Evaluation and the draft's teacher use it. The prompt's keys and values are computed once. The beams of a level are one
row of tokens per prompt, and each beam attends to the prompt and to its own ancestors (tree attention), so nothing is
copied per beam. Scores and order are those of serving: log-probability descending, then code path ascending.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, inf
from transformers import DynamicCache, PreTrainedModel

from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import ENDED, Pruning, Trie
from atspeed.training.errors import TrainingError
from atspeed.training.sequences import Spelling


@dataclass(frozen=True)
class BatchBeams:
    """The beams of every level, best first.

    Attributes:
        node: int64 [b, K] per level. Trie nodes, -1 where there are fewer.
        score: float [b, K] per level. Cumulative log-probabilities.
    """

    node: tuple[Tensor, ...]
    score: tuple[Tensor, ...]


@dataclass(frozen=True)
class BeamLevel:
    """One level of a search: the prefixes that were evaluated and the children that were chosen.

    Attributes:
        prefix: int64 [b, f]. The evaluated nodes in the order of their paths, -1 where there is none.
        logp: float [b, f, codes]. The log-probability of every code of the level; -inf where the catalogue has none.
        node: int64 [b, K]. The chosen children, best first; -1 where there are fewer.
        score: float [b, K]. Their cumulative log-probabilities.
    """

    prefix: Tensor
    logp: Tensor
    node: Tensor
    score: Tensor


@dataclass(frozen=True)
class BeamSearch:
    """Plain beam search under a scoring rule.

    Attributes:
        model: the model.
        spelling: the tokens of its prompts and codes.
        trie: the catalogue's trie.
        rule: the scoring rule.
        width: K, the beam width.
    """

    model: PreTrainedModel
    spelling: Spelling
    trie: Trie
    rule: ScoringRule
    width: int

    def __call__(self, prompts: npt.NDArray[np.int64], prunings: Sequence[Pruning] | None = None) -> BatchBeams:
        """Search from prompts of equal length, int64 [b, s]. prunings: the nodes that each prompt excludes."""
        levels = list(self.levels(prompts, prunings))
        return BatchBeams(tuple(level.node for level in levels), tuple(level.score for level in levels))

    @torch.inference_mode()
    def levels(
        self,
        prompts: npt.NDArray[np.int64],
        prunings: Sequence[Pruning] | None = None,
        *,
        along: npt.NDArray[np.int64] | None = None,
    ) -> Iterator[BeamLevel]:
        """Yield the search level by level.

        Args:
            prompts: int64 [b, s], of equal length.
            prunings: the nodes that each prompt excludes.
            along: int64 [b, L - 1], the nodes of one more path per prompt that is evaluated even if it is no beam.
        """
        # The pass over the prompts: their keys and values stay in the cache, and the root is the only beam.
        cache = DynamicCache(config=self.model.config)
        tokens = torch.from_numpy(prompts).to(self.model.device)
        count, prompt_length = tokens.shape
        logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        dead = self._dead(prunings, count)
        node = torch.zeros((count, 1), dtype=torch.int64, device=tokens.device)
        score = torch.zeros((count, 1), device=tokens.device)
        sees = torch.ones((count, 1, prompt_length), dtype=torch.bool, device=tokens.device)
        for level in range(self.trie.levels):
            prefixes = node.shape[1]
            # Sort the prefixes by path, so that a stable sort leaves ties in the declared order.
            by_path = node.argsort(dim=1)
            node, score = node.gather(1, by_path), score.gather(1, by_path)
            logits = logits.gather(1, by_path.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
            # Their children [b, f, codes] and the best K of them. Node -1 takes the last row, which has no children.
            child = self._child_of[level][node]
            logp = self._log_probabilities(level, logits, child)
            best, value, parent = self._select(score, child, logp, dead)
            yield BeamLevel(node, logp, best, value)
            if level + 1 == self.trie.levels:
                return
            node, score, parent = best, value, by_path.gather(1, parent)
            if along is not None:
                # The extra path takes no beam's place, since its score is -inf. Its parent is the last prefix, at first the root.
                path = torch.from_numpy(along[:, level, None]).to(node.device)
                node, score = torch.cat([node, path], 1), torch.cat([score, torch.full_like(score[:, :1], -inf)], 1)
                parent = torch.cat([parent, torch.full_like(path, prefixes - 1)], 1)
            # The pass over the new beams.
            sees = _seen_by_children(sees, parent)
            logits = self._logits_of(level, node, sees, prompt_length, cache)

    def _logits_of(self, level: int, node: Tensor, sees: Tensor, prompt_length: int, cache: DynamicCache) -> Tensor:
        """Compute the logits [b, K, V] after each beam. sees: bool [b, K, cached tokens with these].

        The logits after an ended place, which has no token, mean nothing and are not used.
        """
        tokens = self._column[level][self._code[node.clamp(min=0)].clamp(min=0)]
        dtype = self.model.dtype
        bias = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
        positions = torch.full_like(node, prompt_length + level)
        logits: Tensor = self.model(
            input_ids=tokens,
            attention_mask=bias.unsqueeze(1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits

    def _select(self, score: Tensor, child: Tensor, logp: Tensor, dead: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the best K children of the prefixes [b, f]. Returns node, score and parent's index, each [b, K]."""
        # Children that exist and are not excluded.
        live = child >= 0
        if dead is not None:
            rows = torch.arange(len(child), device=child.device)[:, None, None]
            live = live & ~dead[rows, child.clamp(min=0)]
        # Cumulative scores of all candidates of a prompt in one row, [b, f * codes].
        total = (score.unsqueeze(-1) + logp).masked_fill(~live, -inf).flatten(1)
        index = _first_best(total, self.width)
        value = total.gather(1, index)
        chosen = child.flatten(1).gather(1, index).masked_fill(value == -inf, -1)
        return chosen, value, index // child.shape[-1]

    def _log_probabilities(self, level: int, logits: Tensor, child: Tensor) -> Tensor:
        """Return the log-probability of each child, [b, f, codes]; -inf where there is none, 0 for an ended place."""
        every, valid = logits.float(), child >= 0
        logp = every[..., self._column[level]]
        if self.rule is ScoringRule.TRIE:
            logp = logp.masked_fill(~valid, -inf).log_softmax(-1)
        else:
            among = every if self.rule is ScoringRule.VOCAB else every[..., self._code_token]
            logp = logp - among.logsumexp(-1, keepdim=True)
        ended = self._code[child.clamp(min=0)] == ENDED
        logp = logp.masked_fill(ended, 0.0).masked_fill(~valid, -inf)
        if logp.isnan().any():
            raise TrainingError(
                "the model's log-probabilities are not numbers; its schedule.learning_rate may be too large"
            )
        return logp

    def _dead(self, prunings: Sequence[Pruning] | None, count: int) -> Tensor | None:
        """bool [b, nodes]: the topmost excluded nodes of each prompt. A search never gets below them."""
        if prunings is None:
            return None
        dead = torch.zeros((count, self.trie.nodes), dtype=torch.bool)
        for row, pruning in enumerate(prunings):
            dead[row, torch.from_numpy(pruning.cut.astype(np.int64))] = True
        return dead.to(self.model.device)

    @cached_property
    def _column(self) -> tuple[Tensor, ...]:
        """Token ids of each level's codes."""
        tokens = torch.tensor(self.spelling.code_tokens, device=self.model.device)
        return tuple(torch.split(tokens, list(self.trie.codebook_sizes)))

    @cached_property
    def _code_token(self) -> Tensor:
        """Distinct token ids of all codes."""
        return torch.tensor(sorted(set(self.spelling.code_tokens)), device=self.model.device)

    @cached_property
    def _code(self) -> Tensor:
        return torch.from_numpy(self.trie.code.astype(np.int64)).to(self.model.device)

    @cached_property
    def _child_of(self) -> tuple[Tensor, ...]:
        """int64 [nodes + 1, codes] per level: the child under each code, or -1. The last row is for node -1.

        An ended place takes the last code's place: it is an only child.
        """
        tables = []
        for level, size in enumerate(self.trie.codebook_sizes):
            table = np.full((self.trie.nodes + 1, size), -1, dtype=np.int64)
            children = np.arange(*self.trie.level_start[level + 1 : level + 3])
            table[self.trie.parent[children], self.trie.code[children]] = children
            tables.append(torch.from_numpy(table).to(self.model.device))
        return tuple(tables)


def _first_best(values: Tensor, count: int) -> Tensor:
    """Return the indices of each row's `count` largest values, ties by index: [b, min(count, n)] from [b, n]."""
    count = min(count, values.shape[1])
    # The smallest value that is kept. All larger values are kept, and equal ones in order as far as there is room.
    least = values.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, level = values > least, values == least
    room = count - above.sum(dim=1, keepdim=True)
    kept = above | (level & (level.cumsum(dim=1) <= room))
    # Exactly `count` entries are kept in each row; a stable sort puts them in order.
    index = kept.nonzero()[:, 1].view(len(values), count)
    return index.gather(1, values.gather(1, index).sort(dim=1, descending=True, stable=True).indices)


def _seen_by_children(sees: Tensor, parent: Tensor) -> Tensor:
    """Extend the parents' masks to their children: bool [b, K, tokens]. A child also sees itself."""
    count, width = parent.shape
    # The parent's mask, and one new token per child that only the child itself sees.
    inherited = sees.gather(1, parent.unsqueeze(-1).expand(-1, -1, sees.shape[-1]))
    own = torch.eye(width, dtype=torch.bool, device=sees.device).expand(count, -1, -1)
    return torch.cat([inherited, own], dim=-1)


def batches_of_equal_length(prompts: Sequence[npt.NDArray[np.int64]], size: int) -> Iterator[list[int]]:
    """Yield indices of prompts of one length, at most `size` at a time, so that no batch needs padding."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
