"""Training a draft on what the target says: batches of prompts with their trees, and the loss of a recipe's alignment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atspeed.engine.arrays import Bools, Int64
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import ROOT, Trie
from atspeed.training.losses import coverage, forward_kl, path_cross_entropy, top_k_reverse_kl, total_variation
from atspeed.training.prompt_trees import PromptTrees, row_of
from atspeed.training.recipe import Alignment
from atspeed.training.sequences import Sequencer, batches_of_like_length
from atspeed.training.teacher import TeacherShard, TrainingPrompts, ancestors, shards, tree_nodes


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
class TreeLevel:
    """The nodes of one depth in b trees, f at most per tree, their children, c at most per node, and what the target says.

    One part per depth, because a trie is wide below its first levels and narrow further down: of a whole tree's nodes times
    the most children of any, a tenth would be real.

    row: int64 [b, f], each node's index among the m of its tree; 0 where there is none. place: int64 [b, f], its index among
    the f * c children of the depth above; 0 at the root. token: int64 [b, f, c], the child's; allowed: bool [b, f, c], where
    there is a child. target: float32 [b, f, c], log-probability, 0 where there is none. on_beam, on_gold: bool [b, f], the
    prefixes of the target's beams and of the gold item; wanted: bool [b, f, c], the children that are beams themselves.
    """

    row: Tensor
    place: Tensor
    token: Tensor
    allowed: Tensor
    target: Tensor
    on_beam: Tensor
    on_gold: Tensor
    wanted: Tensor

    def of_children(self, logits: Tensor) -> Tensor:
        """The children's among logits [b, m, V]: [b, f, c], any number where there is none."""
        index = (self.row * logits.shape[2]).unsqueeze(2) + self.token
        return logits.flatten(1).gather(1, index.flatten(1)).view_as(index)

    def of_nodes(self, values: Tensor) -> Tensor:
        """The nodes' among values [b, m]: [b, f]."""
        return values.gather(1, self.row)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class AlignmentBatch:
    """Prompts with their trees of m nodes, depth by depth. beams: the target's K whole beams; gold: the gold item alone."""

    trees: PromptTrees
    levels: tuple[TreeLevel, ...]
    beams: Paths
    gold: Paths

    def inputs(self, dtype: torch.dtype, /) -> dict[str, Any]:
        """Arguments of the draft; its logits are [b, m, V], one row per node."""
        return self.trees.inputs(dtype)

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return type(self)(
            self.trees.to(device),
            tuple(level.to(device) for level in self.levels),
            self.beams.to(device),
            self.gold.to(device),
        )


@dataclass(frozen=True)
class _Group:
    """A batch to be: prompts of a shard by their place in it, int64 [b]."""

    shard: int
    places: Int64


@dataclass(frozen=True)
class AlignmentBatches:
    """The batches of each epoch, a pure function of (seed, epoch); a shard at a time, so memory holds one of them.

    Shards hold prompts in random order. Each epoch takes them in another order, and batches of like length within each;
    see `batches_of_like_length` for `run`.
    """

    folder: Path
    prompts: TrainingPrompts
    sequencer: Sequencer
    trie: Trie
    batch_size: int
    seed: int
    run: int = 1

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
        lengths = [len(self.sequencer.prompt(self.prompts.history(prompt))) for prompt in held]
        return [_Group(shard, group) for group in batches_of_like_length(lengths, self.batch_size, rng, self.run)]

    def _batch(self, group: _Group) -> AlignmentBatch:
        said, held = self._load(group.shard), self._shards[group.shard][0]
        prompts = [self.sequencer.prompt(self.prompts.history(held[place])) for place in group.places]
        beams, gold = (part[group.places].astype(np.int64) for part in (said.beams, said.gold))
        nodes = tree_nodes(self.trie, beams, gold)
        told = np.concatenate([said.logp[said.start[place] : said.start[place + 1]] for place in group.places])
        return AlignmentBatch(
            trees=PromptTrees.of(prompts, nodes, self.trie, self.sequencer.spelling),
            levels=tuple(self._levels(nodes, beams, gold, told)),
            beams=Paths.of(beams[:, -1], nodes, self.trie, self._token_of),
            gold=Paths.of(gold[:, None], nodes, self.trie, self._token_of),
        )

    def _levels(self, nodes: Int64, beams: Int64, gold: Int64, told: npt.NDArray[np.float16]) -> Iterator[TreeLevel]:
        """nodes: [b, m]. told: the log-probabilities of all their children, in order, prompt after prompt."""
        trie = self.trie
        depth = np.where(nodes < 0, -1, trie.depth(nodes))
        count = np.where(nodes < 0, 0, trie.child_count[nodes]).astype(np.int64)
        first_told = (np.cumsum(count) - count.ravel()).reshape(count.shape)
        golden = ancestors(trie, gold)
        above, widest = nodes[:, :1], 0  # the nodes a depth up, and the most children of any of them
        for level in range(trie.levels):
            row, found = _ragged(depth == level)
            node = np.where(found, np.take_along_axis(nodes, row, 1), ROOT)
            children = np.where(found, np.take_along_axis(count, row, 1), 0)
            within = np.arange(children.max())
            allowed = within < children[..., None]
            child = np.where(allowed, trie.child_start[node][..., None] + within, ROOT)
            target = np.zeros(allowed.shape, dtype=np.float32)
            target[allowed] = told[(np.take_along_axis(first_told, row, 1)[..., None] + within)[allowed]]
            if level:
                parent = np.where(found, trie.parent[node], above[:, :1])
                place = np.where(found, row_of(above, parent) * widest + node - trie.child_start[parent], 0)
            else:
                place = np.zeros_like(row)
            yield TreeLevel(
                row=torch.from_numpy(row),
                place=torch.from_numpy(place),
                token=torch.from_numpy(self._token_of[child]),
                allowed=torch.from_numpy(allowed),
                target=torch.from_numpy(target),
                on_beam=torch.from_numpy(found & ((node == ROOT) | _among(beams, node, trie))),
                on_gold=torch.from_numpy(found & (node == golden[:, level, None])),
                wanted=torch.from_numpy(_among(beams, np.where(allowed, child, -1), trie)),
            )
            above, widest = np.where(found, node, -1), len(within)

    @cached_property
    def _token_of(self) -> Int64:
        """int64 [nodes of the trie]: the token of each node's own code; the root's means nothing."""
        tokens = np.asarray(self.sequencer.spelling.code_tokens, dtype=np.int64)
        return np.append(tokens[:1], tokens[self.trie.column(np.arange(1, self.trie.nodes))])


def _ragged(where: Bools) -> tuple[Int64, Bools]:
    """The columns that are set in each row of `where` [b, m], left-aligned, and which entries are real: [b, f]."""
    count = where.sum(axis=1)
    order: Int64 = np.argsort(~where, axis=1, kind="stable")[:, : int(count.max())]
    real: Bools = np.arange(order.shape[1]) < count[:, None]
    return np.where(real, order, 0), real


def _among(beams: Int64, nodes: Int64, trie: Trie) -> Bools:
    """Which of nodes [b, ...] are beams [b, L, K] of their prompt; never the root, nor where there is no node."""
    rows = np.arange(len(beams))
    table = np.zeros((len(beams), trie.nodes + 1), dtype=bool)  # the last column is for -1
    table[rows[:, None, None], beams] = True
    table[:, -1] = False
    found: Bools = table[rows.reshape(-1, *[1] * (nodes.ndim - 1)), nodes]
    return found


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
    """Of the nodes `where` bool [b, f]: draft and target on the children, and which there are; each [n, c]."""
    return level.of_children(logits.float())[where], level.target[where], level.allowed[where]


def _mean_over_positions(loss: Callable[[Tensor, Tensor, Tensor], Tensor], parts: Iterable[Rows]) -> Tensor:
    """A mean over the rows of all parts of a loss that is itself a mean over rows."""
    total, count = torch.zeros(()), 0
    for draft, target, allowed in parts:
        if len(draft):
            total = total.to(draft.device) + len(draft) * loss(draft, target, allowed)
            count += len(draft)
    return total / max(1, count)


def _cross_entropy(logits: Tensor, paths: Paths) -> Tensor:
    return path_cross_entropy(logits.float(), paths.row, paths.token, paths.valid)


@dataclass(frozen=True)
class LevelRows:
    """A level of each prompt: all children of the target's beams there.

    draft, target: float [b, f * c], cumulative log-probability, any finite number where not allowed.
    allowed, wanted: bool [b, f * c]; wanted are the target's beams.
    """

    draft: Tensor
    target: Tensor
    allowed: Tensor
    wanted: Tensor


def level_rows(logits: Tensor, batch: AlignmentBatch, rule: ScoringRule) -> list[LevelRows]:
    """From the draft's logits [b, m, V], scored by the bundle's rule: the first L - 1 levels, which are what is drafted."""
    logits = logits.float()
    total = logits.logsumexp(-1)
    reached: tuple[Tensor, Tensor] | None = None  # the cumulative scores of the children above, [b, f * c] each
    rows = []
    for level in batch.levels[:-1]:
        draft, target = level.of_children(logits) - level.of_nodes(total).unsqueeze(2), level.target
        if rule is ScoringRule.TRIE:
            draft, target = (_over_children(logp, level.allowed) for logp in (draft, target))
        if reached is not None:
            above = [scores.gather(1, level.place).unsqueeze(2) for scores in reached]
            draft, target = draft + above[0], target + above[1]
        reached = draft.flatten(1), target.flatten(1)
        allowed = (level.allowed & level.on_beam.unsqueeze(2)).flatten(1)
        rows.append(LevelRows(*reached, allowed, level.wanted.flatten(1) & allowed))
    return rows


def _over_children(logp: Tensor, allowed: Tensor) -> Tensor:
    """Log-probabilities [b, f, c] renormalised over each node's children; 0 where there are none."""
    total = logp.masked_fill(~allowed, torch.finfo(logp.dtype).min).logsumexp(-1, keepdim=True)
    return (logp - total).masked_fill(~allowed, 0.0)


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
