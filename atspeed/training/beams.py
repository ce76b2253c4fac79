"""Beam search through the trie for a batch of prompts, in torch.

Evaluation and the draft's teacher use it. A prompt is read once. The beams of a level are one row of tokens per prompt, and
each beam attends to the prompt and to its own ancestors (tree attention), so a decoder copies nothing per beam. Scores and
order are those of serving: log-probability descending, then code path ascending.

The children of a level's beams are gathered from the trie's flat arrays. No table holds an entry per node and code, so the
memory beside the trie depends on the batch, never on the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, inf
from transformers import PreTrainedModel

from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import ENDED, Pruning, Trie
from atspeed.training.beam_passes import beam_passes
from atspeed.training.errors import TrainingError
from atspeed.training.sequences import Spelling

_PROMPTS_AT_ONCE = 64  # affects speed and memory only
_LOGITS_AT_ONCE = 1 << 26  # likewise; a quarter of a gigabyte in float32


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
        logp: float [b, f, c]. The log-probability of each prefix's children, in code order; -inf where there are fewer.
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
        following: npt.NDArray[np.int64] | None = None,
    ) -> Iterator[BeamLevel]:
        """Yield the search level by level.

        Args:
            prompts: int64 [b, s], of equal length.
            prunings: the nodes that each prompt excludes.
            along: int64 [b, L - 1], the nodes of one more path per prompt that is evaluated even if it is no beam.
            following: int64 [b, L, K], another search's beams, -1 where there are fewer. They are taken instead of the best.
        """
        # The pass over the prompts: the root is the only beam.
        passes = beam_passes(self.model)
        tokens = torch.from_numpy(prompts).to(self.model.device)
        count = len(tokens)
        logits = passes.first(tokens)
        dead = self._dead(prunings, count)
        node = torch.zeros((count, 1), dtype=torch.int64, device=tokens.device)
        score = torch.zeros((count, 1), device=tokens.device)
        for level in range(self.trie.levels):
            prefixes = node.shape[1]
            # Sort the prefixes by path, so that a stable sort leaves ties in the declared order.
            by_path = node.argsort(dim=1)
            node, score = node.gather(1, by_path), score.gather(1, by_path)
            # Their children [b, f, c] and the best K of them.
            child = self._children(node)
            logp = self._log_probabilities(level, logits, by_path, child)
            best, value, parent = (
                self._select(score, child, logp, dead)
                if following is None
                else self._follow(torch.from_numpy(following[:, level]).to(node.device), node, score, logp)
            )
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
            logits = passes.next(self._tokens(level, node), parent)

    def _tokens(self, level: int, node: Tensor) -> Tensor:
        """Return the token of each node's code, [b, K]. An ended place has none, and what stands there is not used."""
        return self._column[level][self._code[node.clamp(min=0)].clamp(min=0)]

    def _select(self, score: Tensor, child: Tensor, logp: Tensor, dead: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the best K children of the prefixes [b, f]. Returns node, score and parent's index, each [b, K]."""
        # Children that exist and are not excluded.
        live = child >= 0
        if dead is not None:
            place = torch.searchsorted(dead, child.flatten(1)).clamp(max=dead.shape[1] - 1)
            live = live & (dead.gather(1, place).view_as(child) != child)
        # Cumulative scores of all candidates of a prompt in one row, [b, f * c].
        total = (score.unsqueeze(-1) + logp).masked_fill(~live, -inf).flatten(1)
        index = _first_best(total, self.width)
        value = total.gather(1, index)
        chosen = child.flatten(1).gather(1, index).masked_fill(value == -inf, -1)
        return chosen, value, index // child.shape[-1]

    def _follow(self, best: Tensor, node: Tensor, score: Tensor, logp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Look up given children [b, K] of the ascending prefixes [b, f]. Returns what `_select` does."""
        above = self._parent[best.clamp(min=0)]
        parent = torch.searchsorted(node, above).clamp(max=node.shape[1] - 1)
        place = parent * logp.shape[2] + best.clamp(min=0) - self._child_start[above]
        total = (score.unsqueeze(-1) + logp).flatten(1)
        value = total.gather(1, place.clamp(0, total.shape[1] - 1)).masked_fill(best < 0, -inf)
        return best, value, parent

    def _children(self, node: Tensor) -> Tensor:
        """Return the children of nodes [b, f] in code order, [b, f, c]; -1 where there are fewer. Node -1 has none."""
        known = node.clamp(min=0)
        count = (self._child_start[known + 1] - self._child_start[known]).masked_fill(node < 0, 0)
        within = torch.arange(max(1, int(count.max())), device=node.device)
        return torch.where(within < count.unsqueeze(-1), self._child_start[known].unsqueeze(-1) + within, -1)

    def _log_probabilities(self, level: int, logits: Tensor, by_path: Tensor, child: Tensor) -> Tensor:
        """Return the log-probability of each child, [b, f, c]; -inf where there is none, 0 for an ended place.

        Args:
            level: the level of the children's codes.
            logits: float [b, f, V], after each prefix, in the order of the last pass.
            by_path: int64 [b, f]. The place in `logits` of each prefix.
            child: int64 [b, f, c].
        """
        real, code = child >= 0, self._code[child.clamp(min=0)]
        place = by_path.unsqueeze(-1) * logits.shape[-1] + self._column[level][code.clamp(min=0)]
        logp = logits.flatten(1).gather(1, place.flatten(1)).view_as(place).float()
        if self.rule is ScoringRule.TRIE:
            logp = logp.masked_fill(~real, -inf).log_softmax(-1)
        else:
            among = logits if self.rule is ScoringRule.VOCAB else logits[..., self._code_token]
            logp = logp - among.float().logsumexp(-1).gather(1, by_path).unsqueeze(-1)
        logp = logp.masked_fill(code == ENDED, 0.0).masked_fill(~real, -inf)
        if logp.isnan().any():
            raise TrainingError(
                "the model's log-probabilities are not numbers; its schedule.learning_rate may be too large"
            )
        return logp

    def _dead(self, prunings: Sequence[Pruning] | None, count: int) -> Tensor | None:
        """Return the topmost excluded nodes of each prompt, ascending, int64 [b, n]. A search never gets below them."""
        if prunings is None:
            return None
        longest = max(1, max(len(pruning.cut) for pruning in prunings))
        dead = np.full((count, longest), self.trie.nodes, dtype=np.int64)  # no node has this number
        for row, pruning in enumerate(prunings):
            dead[row, : len(pruning.cut)] = pruning.cut
        return torch.from_numpy(dead).to(self.model.device)

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
    def _parent(self) -> Tensor:
        return torch.from_numpy(self.trie.parent.astype(np.int64)).clamp(min=0).to(self.model.device)

    @cached_property
    def _child_start(self) -> Tensor:
        return torch.from_numpy(self.trie.child_start).to(self.model.device)


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


def prompts_at_once(vocab_size: int, width: int) -> int:
    """Return the number of prompts of one pass, so that the logits of its beams stay small."""
    return max(1, min(_PROMPTS_AT_ONCE, _LOGITS_AT_ONCE // (vocab_size * (width + 1))))


def batches_of_equal_length(prompts: Sequence[npt.NDArray[np.int64]], size: int) -> Iterator[list[int]]:
    """Yield indices of prompts of one length, at most `size` at a time, so that no batch needs padding."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
