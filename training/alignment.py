"""Training a draft on what the target says: batches of prompts with their trees, and the loss of a recipe's alignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor

from engine.scoring import ScoringRule
from engine.trie import ROOT, Trie
from training.losses import coverage, forward_kl, path_cross_entropy, top_k_reverse_kl, total_variation
from training.prompt_trees import Bools, Int64, PromptTrees, parent_rows, row_of
from training.recipe import Alignment
from training.sequences import Sequencer
from training.teacher import TeacherShard, TrainingPrompts, shards, tree_nodes

_POOL = 16  # batches of like length are cut from pools of so many, as in training/sequences.py


@dataclass(frozen=True)
class Paths:
    """Code paths in a tree. row, token: int64 [b, P, L], the prefix before each code and the code's token. valid: bool [b, P]."""

    row: Tensor
    token: Tensor
    valid: Tensor

    @classmethod
    def of(cls, leaves: Int64, nodes: Int64, trie: Trie, token_of: Int64) -> Self:
        """leaves: [b, P], -1 where there is none; nodes: [b, m], the trees. token_of: int64 [nodes of the trie]."""
        node = np.where(leaves < 0, ROOT, leaves)
        rows, tokens = [], []
        for _ in range(trie.levels):
            parent = np.maximum(trie.parent[node], ROOT).astype(np.int64)
            rows.append(row_of(nodes, parent))
            tokens.append(token_of[node])
            node = parent
        row, token = (torch.from_numpy(np.stack(parts[::-1], axis=2)) for parts in (rows, tokens))
        return cls(row, token, torch.from_numpy(leaves >= 0))

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(self.row.to(device), self.token.to(device), self.valid.to(device))


@dataclass(frozen=True)
class AlignmentBatch:
    """Prompts with their trees of m nodes, at most c children each, and what the target says of these.

    token: int64 [b, m, c], the child's; allowed: bool [b, m, c], where there is a child. target: float32 [b, m, c],
    log-probability, 0 where there is none. on_beam: bool [b, m], the prefixes of the target's beams; wanted: bool [b, m, c],
    the children that are beams themselves. depth, place: int64 [b, m], of each node: its depth, and its index among the
    m * c children of all nodes. beams: the target's K whole beams; gold: the gold item alone.
    """

    trees: PromptTrees
    token: Tensor
    allowed: Tensor
    target: Tensor
    on_beam: Tensor
    wanted: Tensor
    depth: Tensor
    place: Tensor
    beams: Paths
    gold: Paths

    @property
    def on_gold(self) -> Tensor:
        """bool [b, m], the prefixes of the gold item."""
        return torch.zeros_like(self.on_beam).scatter(1, self.gold.row[:, 0], value=True)

    def inputs(self, dtype: torch.dtype, /) -> dict[str, Any]:
        """Arguments of the draft; its logits are [b, m, V], one row per node."""
        return self.trees.inputs(dtype)

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class _Group:
    """A batch to be: prompts of a shard by their place in it, int64 [b]."""

    shard: int
    places: Int64


@dataclass(frozen=True)
class AlignmentBatches:
    """The batches of each epoch, a pure function of (seed, epoch); a shard at a time, so memory holds one of them.

    Shards hold prompts in random order. Each epoch takes them in another order, and batches of like length within each.
    """

    folder: Path
    prompts: TrainingPrompts
    sequencer: Sequencer
    trie: Trie
    batch_size: int
    seed: int

    def __call__(self, epoch: int) -> Sequence[AlignmentBatch]:
        """All batches of an epoch, each made when it is asked for."""
        rng = np.random.default_rng([self.seed, epoch])
        groups = [group for shard in rng.permutation(len(self._shards)) for group in self._groups(int(shard), rng)]
        return _Lazy(groups, self._batch)

    @cached_property
    def _shards(self) -> list[tuple[range, Path]]:
        """The prompts of each shard and its file."""
        paths = shards(self.folder)
        ends = [*list(paths)[1:], len(self.prompts)]
        return [(range(first, end), path) for (first, path), end in zip(paths.items(), ends, strict=True)]

    @cached_property
    def _load(self) -> Callable[[int], TeacherShard]:
        return lru_cache(maxsize=1)(lambda shard: TeacherShard.load(self._shards[shard][1]))

    def _groups(self, shard: int, rng: np.random.Generator) -> list[_Group]:
        """The prompts of a shard in batches of like length, in random order."""
        held = self._shards[shard][0]
        lengths = np.array([len(self.sequencer.prompt(self.prompts.history(prompt))) for prompt in held])
        order, pool = rng.permutation(len(held)), _POOL * self.batch_size
        groups: list[Int64] = []
        for start in range(0, len(order), pool):
            alike = order[start : start + pool]
            alike = alike[np.argsort(lengths[alike], kind="stable")]
            groups += [alike[first : first + self.batch_size] for first in range(0, len(alike), self.batch_size)]
        return [_Group(shard, groups[index]) for index in rng.permutation(len(groups))]

    def _batch(self, group: _Group) -> AlignmentBatch:
        said, held = self._load(group.shard), self._shards[group.shard][0]
        prompts = [self.sequencer.prompt(self.prompts.history(held[place])) for place in group.places]
        beams, gold = (part[group.places].astype(np.int64) for part in (said.beams, said.gold))
        nodes = tree_nodes(self.trie, beams, gold)
        child, allowed = _children(nodes, self.trie)
        target = np.zeros(allowed.shape, dtype=np.float32)
        target[allowed] = np.concatenate(
            [said.logp[said.start[place] : said.start[place + 1]] for place in group.places]
        )
        return AlignmentBatch(
            trees=PromptTrees.of(prompts, nodes, self.trie, self.sequencer.spelling),
            token=torch.from_numpy(self._token_of[child]),
            allowed=torch.from_numpy(allowed),
            target=torch.from_numpy(target),
            on_beam=torch.from_numpy((nodes == ROOT) | _among(beams, nodes, self.trie)),
            wanted=torch.from_numpy(_among(beams, child, self.trie)),
            depth=torch.from_numpy(self.trie.depth(nodes)),
            place=torch.from_numpy(_places(nodes, child.shape[2], self.trie)),
            beams=Paths.of(beams[:, -1], nodes, self.trie, self._token_of),
            gold=Paths.of(gold[:, None], nodes, self.trie, self._token_of),
        )

    @cached_property
    def _token_of(self) -> Int64:
        """int64 [nodes of the trie]: the token of each node's own code; the root's means nothing."""
        tokens = np.asarray(self.sequencer.spelling.code_tokens, dtype=np.int64)
        return np.append(tokens[:1], tokens[self.trie.column(np.arange(1, self.trie.nodes))])


def _children(nodes: Int64, trie: Trie) -> tuple[Int64, Bools]:
    """Children of tree nodes [b, m] in code order, and where there are any; [b, m, c]."""
    count = np.where(nodes < 0, 0, trie.child_count[nodes])
    place = np.arange(count.max())
    exists: Bools = place < count[..., None]
    return np.where(exists, trie.child_start[nodes][..., None] + place, ROOT), exists


def _among(beams: Int64, nodes: Int64, trie: Trie) -> Bools:
    """Which of nodes [b, ...] are beams [b, L, K] of their prompt; never the root, nor where there is no node."""
    rows = np.arange(len(beams))
    table = np.zeros((len(beams), trie.nodes + 1), dtype=bool)  # the last column is for -1
    table[rows[:, None, None], beams] = True
    table[:, -1] = False
    found: Bools = table[rows.reshape(-1, *[1] * (nodes.ndim - 1)), nodes]
    return found


def _places(nodes: Int64, columns: int, trie: Trie) -> Int64:
    """Where each node [b, m] stands among the m * `columns` children of all; 0 for the root and where there is none."""
    parent = trie.parent[np.maximum(nodes, ROOT)]
    place: Int64 = parent_rows(nodes, trie) * columns + nodes - trie.child_start[parent]
    return np.where(nodes > ROOT, place, 0)


@dataclass(frozen=True)
class AlignmentObjective:
    """total = (1 - weight) * cross-entropy of the gold item + weight * the alignment's loss. Method: aligning the draft."""

    settings: Alignment
    rule: ScoringRule

    def __call__(self, logits: Tensor, batch: AlignmentBatch) -> Tensor:
        """logits: float [b, m, V], the draft's, one row per tree node. A scalar."""
        gold = _cross_entropy(logits, batch.gold)
        if self.settings.loss is None:
            return gold
        return (1 - self.settings.weight) * gold + self.settings.weight * self.alignment(logits, batch)

    def alignment(self, logits: Tensor, batch: AlignmentBatch) -> Tensor:
        """The alignment's loss alone."""
        s = self.settings
        match s.loss:
            case "atspeed-s":
                rows = _rows(logits, batch, batch.on_beam)
                return top_k_reverse_kl(*rows, top=s.beams, density=s.density, renormalise=s.renormalise)
            case "atspeed-r":
                return total_variation(*_rows(logits, batch, batch.on_beam), temperature=s.temperature)
            case "word-kd":
                return forward_kl(*_rows(logits, batch, batch.on_gold), temperature=s.temperature)
            case "tvd-kd":
                return total_variation(*_rows(logits, batch, batch.on_gold), temperature=s.temperature)
            case "seq-kd":
                return _cross_entropy(logits, batch.beams)
            case "level-kd":
                levels = level_rows(logits, batch, self.rule)
                return forward_kl(levels.draft, levels.target, levels.allowed, temperature=s.temperature)
            case "coverage":
                levels = level_rows(logits, batch, self.rule)
                return coverage(levels.draft, levels.wanted, levels.allowed, budget=s.budget, margin=s.margin)
            case None:
                return _cross_entropy(logits, batch.gold)


def _rows(logits: Tensor, batch: AlignmentBatch, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tree nodes `where` bool [b, m]: draft and target on the children, and which there are; each [n, c]."""
    draft = logits.float()[where].gather(1, batch.token[where])
    return draft, batch.target[where], batch.allowed[where]


def _cross_entropy(logits: Tensor, paths: Paths) -> Tensor:
    return path_cross_entropy(logits.float(), paths.row, paths.token, paths.valid)


@dataclass(frozen=True)
class LevelRows:
    """A level of a prompt per row: all children of the target's beams, in the first L - 1 levels, which are what is drafted.

    draft, target: float [n, m * c], cumulative log-probability, any finite number where not allowed.
    allowed, wanted: bool [n, m * c]; wanted are the target's beams. n = b * (L - 1).
    """

    draft: Tensor
    target: Tensor
    allowed: Tensor
    wanted: Tensor


def level_rows(logits: Tensor, batch: AlignmentBatch, rule: ScoringRule) -> LevelRows:
    """From the draft's logits [b, m, V], scored by the bundle's rule."""
    draft = logits.float().log_softmax(-1).gather(2, batch.token)
    target = batch.target
    if rule is ScoringRule.TRIE:
        draft, target = (_over_children(logp, batch.allowed) for logp in (draft, target))
    drafted = range(batch.gold.row.shape[2] - 1)
    masks = [(batch.allowed & (batch.on_beam & (batch.depth == depth)).unsqueeze(2)).flatten(1) for depth in drafted]
    draft, target = (_cumulative(logp, batch).flatten(1).repeat(len(masks), 1) for logp in (draft, target))
    allowed = torch.cat(masks)
    return LevelRows(draft, target, allowed, batch.wanted.flatten(1).repeat(len(masks), 1) & allowed)


def _over_children(logp: Tensor, allowed: Tensor) -> Tensor:
    """Log-probabilities [b, m, c] renormalised over each node's children; 0 where there are none."""
    total = logp.masked_fill(~allowed, torch.finfo(logp.dtype).min).logsumexp(-1, keepdim=True)
    return (logp - total).masked_fill(~allowed, 0.0)


def _cumulative(logp: Tensor, batch: AlignmentBatch) -> Tensor:
    """Score of each child: its own log-probability and that of all above it. [b, m, c]"""
    above = torch.zeros_like(logp[..., 0])
    for depth in range(1, batch.gold.row.shape[2]):
        reached = (above.unsqueeze(2) + logp).flatten(1).gather(1, batch.place)
        above = torch.where(batch.depth == depth, reached, above)
    return above.unsqueeze(2) + logp


@dataclass(frozen=True)
class _Lazy(Sequence[AlignmentBatch]):
    """Batches that exist only while they are looked at."""

    groups: Sequence[_Group]
    batch: Callable[[_Group], AlignmentBatch]

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> AlignmentBatch: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[AlignmentBatch]: ...

    def __getitem__(self, index: int | slice) -> AlignmentBatch | Sequence[AlignmentBatch]:
        if isinstance(index, slice):
            return replace(self, groups=self.groups[index])
        return self.batch(self.groups[index])
