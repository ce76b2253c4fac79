"""Beam search through the trie for a batch of prompts, in torch: for evaluation and for the draft's teacher.

The prompt's keys and values are computed once. The beams of a level go through as one row of tokens per prompt, each
seeing the prompt and its own ancestors only (method: one pass over a token tree), so nothing is copied per beam.
Same scores and the same order as serving: log-probability descending, then code path ascending.
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
from atspeed.engine.search.trie import Pruning, Trie
from atspeed.training.errors import TrainingError
from atspeed.training.sequences import Spelling


@dataclass(frozen=True)
class Beams:
    """The beams of every level, best first. node: int64 [b, K], trie nodes, -1 where there are fewer; score: [b, K]."""

    node: tuple[Tensor, ...]
    score: tuple[Tensor, ...]


@dataclass(frozen=True)
class Level:
    """One level of a search: what was asked and what was chosen.

    prefix: int64 [b, f], the nodes that were asked, in the order of their paths, -1 where there is none.
    logp: float [b, f, codes], after each of them, of every code of the level, -inf where the catalogue has none.
    node, score: [b, K], the chosen children, best first; node -1 where there are fewer.
    """

    prefix: Tensor
    logp: Tensor
    node: Tensor
    score: Tensor


@dataclass(frozen=True)
class BeamSearch:
    """Strict beam search of `width` K under a scoring rule."""

    model: PreTrainedModel
    spelling: Spelling
    trie: Trie
    rule: ScoringRule
    width: int

    def __call__(self, prompts: npt.NDArray[np.int64], prunings: Sequence[Pruning] | None = None) -> Beams:
        """Search from prompts of equal length, [b, s]; prunings: what each may not be given."""
        levels = list(self.levels(prompts, prunings))
        return Beams(tuple(level.node for level in levels), tuple(level.score for level in levels))

    @torch.inference_mode()
    def levels(
        self,
        prompts: npt.NDArray[np.int64],
        prunings: Sequence[Pruning] | None = None,
        *,
        along: npt.NDArray[np.int64] | None = None,
    ) -> Iterator[Level]:
        """The search level by level. along: nodes [b, L - 1] of a path that is asked too, whatever becomes of it."""
        cache = DynamicCache(config=self.model.config)
        tokens = torch.from_numpy(prompts).to(self.model.device)
        count, prompt_length = tokens.shape
        logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        dead = self._dead(prunings, count)
        node = torch.zeros((count, 1), dtype=torch.int64, device=tokens.device)
        score = torch.zeros((count, 1), device=tokens.device)
        sees = torch.ones((count, 1, prompt_length), dtype=torch.bool, device=tokens.device)
        for level in range(self.trie.levels):
            asked = node.shape[1]
            # Prefixes in the order of their paths, so that a stable sort leaves ties in the declared order.
            by_path = node.argsort(dim=1)
            node, score = node.gather(1, by_path), score.gather(1, by_path)
            logits = logits.gather(1, by_path.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
            child = self._child_of[level][node]  # [b, f, codes]; node -1 takes the last row, which has no children
            logp = self._log_probabilities(level, logits, child >= 0)
            best, value, parent = self._select(score, child, logp, dead)
            yield Level(node, logp, best, value)
            if level + 1 == self.trie.levels:
                return
            node, score, parent = best, value, by_path.gather(1, parent)
            if along is not None:
                # It takes no beam's place: its score is -inf. Its parent is the last one asked, the root at first.
                path = torch.from_numpy(along[:, level, None]).to(node.device)
                node, score = torch.cat([node, path], 1), torch.cat([score, torch.full_like(score[:, :1], -inf)], 1)
                parent = torch.cat([parent, torch.full_like(path, asked - 1)], 1)
            sees = _seen_by_children(sees, parent)
            logits = self._logits_of(level, node, sees, prompt_length, cache)

    def _logits_of(self, level: int, node: Tensor, sees: Tensor, prompt_length: int, cache: DynamicCache) -> Tensor:
        """Logits [b, K, V] after each beam. sees: bool [b, K, tokens in the cache once these are]."""
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
        """The best K children of the asked [b, f]: node, score, and the index of the parent; each [b, K]."""
        live = child >= 0
        if dead is not None:
            rows = torch.arange(len(child), device=child.device)[:, None, None]
            live = live & ~dead[rows, child.clamp(min=0)]
        total = (score.unsqueeze(-1) + logp).masked_fill(~live, -inf).flatten(1)
        index = _first_best(total, self.width)
        value = total.gather(1, index)
        chosen = child.flatten(1).gather(1, index).masked_fill(value == -inf, -1)
        return chosen, value, index // child.shape[-1]

    def _log_probabilities(self, level: int, logits: Tensor, valid: Tensor) -> Tensor:
        """Log-probability of each code of a level, [b, f, codes]. valid: those in the catalogue."""
        if self.rule is ScoringRule.VOCAB:
            every = logits.float()
            logp = every[..., self._column[level]] - every.logsumexp(-1, keepdim=True)
        else:
            logp = logits.float()[..., self._column[level]].masked_fill(~valid, -inf).log_softmax(-1)
        logp = logp.masked_fill(~valid, -inf)
        if logp.isnan().any():
            raise TrainingError(
                "the model's log-probabilities are no numbers; its schedule.learning_rate may be too large"
            )
        return logp

    def _dead(self, prunings: Sequence[Pruning] | None, count: int) -> Tensor | None:
        """bool [b, nodes]: the topmost dead nodes of each prompt; a search never gets below them."""
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
    def _code(self) -> Tensor:
        return torch.from_numpy(self.trie.code.astype(np.int64)).to(self.model.device)

    @cached_property
    def _child_of(self) -> tuple[Tensor, ...]:
        """Per level int64 [nodes + 1, codes]: the child under each code, or -1; the last row is for node -1."""
        tables = []
        for level, size in enumerate(self.trie.codebook_sizes):
            table = np.full((self.trie.nodes + 1, size), -1, dtype=np.int64)
            children = np.arange(*self.trie.level_start[level + 1 : level + 3])
            table[self.trie.parent[children], self.trie.code[children]] = children
            tables.append(torch.from_numpy(table).to(self.model.device))
        return tuple(tables)


def _first_best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, largest first, equal ones by index; [b, min(count, n)] from [b, n]."""
    count = min(count, values.shape[1])
    least = values.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, level = values > least, values == least
    room = count - above.sum(dim=1, keepdim=True)
    kept = above | (level & (level.cumsum(dim=1) <= room))
    index = kept.nonzero()[:, 1].view(len(values), count)
    return index.gather(1, values.gather(1, index).sort(dim=1, descending=True, stable=True).indices)


def _seen_by_children(sees: Tensor, parent: Tensor) -> Tensor:
    """What new beams see: all that their parent sees, and themselves. bool [b, K, tokens] from the parents' masks."""
    count, width = parent.shape
    inherited = sees.gather(1, parent.unsqueeze(-1).expand(-1, -1, sees.shape[-1]))
    own = torch.eye(width, dtype=torch.bool, device=sees.device).expand(count, -1, -1)
    return torch.cat([inherited, own], dim=-1)


def batches_of_equal_length(prompts: Sequence[npt.NDArray[np.int64]], size: int) -> Iterator[list[int]]:
    """Indices of prompts that go through together: of one length, at most `size`. No padding, so no mask for it."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
