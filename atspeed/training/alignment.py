"""Losses of a draft's alignment, as the recipe's `[draft.alignment]` names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.alignment_batches import AlignmentBatch, Paths, TreeLevel
from atspeed.training.losses import coverage, forward_kl, path_cross_entropy, top_k_reverse_kl, total_variation
from atspeed.training.recipe import Alignment


@dataclass(frozen=True)
class AlignmentObjective:
    """The loss of alignment: (1 - weight) * cross-entropy of the gold item + weight * the loss that the recipe names.

    Attributes:
        settings: the recipe's `[draft.alignment]`.
        rule: the scoring rule of the bundle.
    """

    settings: Alignment
    rule: ScoringRule

    def __call__(self, logits: Tensor, batch: AlignmentBatch) -> Tensor:
        """Return the total loss, a scalar. logits: float [b, m, V], the draft's, one row per tree node."""
        gold = _cross_entropy(logits, batch.gold)
        if self.settings.loss is None:
            return gold
        return (1 - self.settings.weight) * gold + self.settings.weight * self.alignment(logits, batch)

    def alignment(self, logits: Tensor, batch: AlignmentBatch) -> Tensor:
        """Return the alignment loss without the cross-entropy."""
        s = self.settings
        match s.loss:
            case "atspeed-s":
                return _mean_over_positions(
                    partial(top_k_reverse_kl, top=s.beams, density=s.density, renormalise=s.renormalise),
                    (_rows(logits, level, level.on_beam) for level in batch.levels),
                )
            case "atspeed-r":
                return _mean_over_positions(
                    partial(total_variation, temperature=s.temperature),
                    (_rows(logits, level, level.on_beam) for level in batch.levels),
                )
            case "word-kd":
                return _mean_over_positions(
                    partial(forward_kl, temperature=s.temperature),
                    (_rows(logits, level, level.on_gold) for level in batch.levels),
                )
            case "tvd-kd":
                return _mean_over_positions(
                    partial(total_variation, temperature=s.temperature),
                    (_rows(logits, level, level.on_gold) for level in batch.levels),
                )
            case "seq-kd":
                return _cross_entropy(logits, batch.beams)
            case "level-kd":
                return _mean_over_positions(
                    partial(forward_kl, temperature=s.temperature),
                    ((row.draft, row.target, row.allowed) for row in level_rows(logits, batch, self.rule)),
                )
            case "coverage":
                rows = level_rows(logits, batch, self.rule)
                losses = [coverage(r.draft, r.wanted, r.allowed, budget=s.budget, margin=s.margin) for r in rows]
                return torch.stack(losses).mean()
            case None:
                return _cross_entropy(logits, batch.gold)


Rows = tuple[Tensor, Tensor, Tensor]  # draft, target and which columns are allowed, each [n, c]


def _rows(logits: Tensor, level: TreeLevel, where: Tensor) -> Rows:
    """Select the nodes `where` bool [b, f]: the draft's and the target's values and the mask of children, each [n, c].

    Nodes whose path has ended are left out: nothing is predicted after them.
    """
    where = where & ~level.ended
    return level.of_children(logits.float())[where], level.target[where], level.allowed[where]


def _mean_over_positions(loss: Callable[[Tensor, Tensor, Tensor], Tensor], parts: Iterable[Rows]) -> Tensor:
    """Average a loss over the rows of all parts; the loss is itself a mean over the rows of one part."""
    total, count = torch.zeros(()), 0
    for draft, target, allowed in parts:
        if len(draft):
            total = total.to(draft.device) + len(draft) * loss(draft, target, allowed)
            count += len(draft)
    return total / max(1, count)


def _cross_entropy(logits: Tensor, paths: Paths) -> Tensor:
    return path_cross_entropy(logits.float(), paths.row, paths.token, paths.scored)


@dataclass(frozen=True)
class LevelRows:
    """One level of each prompt: all children of the target's beams on that level.

    Attributes:
        draft: float [b, f * c]. The draft's cumulative log-probability; any finite number where not allowed.
        target: float [b, f * c]. The target's, in the same form.
        allowed: bool [b, f * c]. True where there is a child.
        wanted: bool [b, f * c]. True for the target's beams.
    """

    draft: Tensor
    target: Tensor
    allowed: Tensor
    wanted: Tensor


def level_rows(logits: Tensor, batch: AlignmentBatch, rule: ScoringRule) -> list[LevelRows]:
    """Return the first L - 1 levels, the ones that are drafted, scored by the bundle's rule.

    Args:
        logits: float [b, m, V], the draft's.
        batch: the batch that the logits belong to.
        rule: the scoring rule.
    """
    logits = logits.float()
    among = logits[..., batch.code_token] if rule is ScoringRule.CODES else logits
    total = among.logsumexp(-1)
    reached: tuple[Tensor, Tensor] | None = None  # the cumulative scores of the children above, [b, f * c] each
    rows = []
    for level in batch.levels[:-1]:
        # Log-probabilities of the children over the vocabulary or the codes, or over their siblings with the rule `trie`.
        draft, target = level.of_children(logits) - level.of_nodes(total).unsqueeze(2), level.target
        if rule is ScoringRule.TRIE:
            draft, target = (_over_children(logp, level.allowed) for logp in (draft, target))
        draft = draft.masked_fill(level.ended.unsqueeze(2), 0.0)  # as the target's is
        # Cumulative scores: the score of the node itself, looked up among the children above, is added.
        if reached is not None:
            above = [scores.gather(1, level.place).unsqueeze(2) for scores in reached]
            draft, target = draft + above[0], target + above[1]
        reached = draft.flatten(1), target.flatten(1)
        allowed = (level.allowed & level.on_beam.unsqueeze(2)).flatten(1)
        rows.append(LevelRows(*reached, allowed, level.wanted.flatten(1) & allowed))
    return rows


def _over_children(logp: Tensor, allowed: Tensor) -> Tensor:
    """Renormalise log-probabilities [b, f, c] over each node's children; 0 where there are none."""
    total = logp.masked_fill(~allowed, torch.finfo(logp.dtype).min).logsumexp(-1, keepdim=True)
    return (logp - total).masked_fill(~allowed, 0.0)
