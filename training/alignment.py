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

from engine.trie import ROOT, Trie
from training.losses import forward_kl, path_cross_entropy, top_k_reverse_kl, total_variation
from training.prompt_trees import Bools, Int64, PromptTrees, row_of
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
    log-probability, 0 where there is none. on_beam: bool [b, m], the prefixes of the target's beams.
    beams: the target's K whole beams; gold: the gold item alone.
    """

    trees: PromptTrees
    token: Tensor
    allowed: Tensor
    target: Tensor
    on_beam: Tensor
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
            on_beam=torch.from_numpy(_on_beam(nodes, beams)),
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


def _on_beam(nodes: Int64, beams: Int64) -> Bools:
    """Which tree nodes [b, m] are the root or beams [b, L, K] of a level."""
    inner = beams[:, :-1].reshape(len(beams), 1, -1)
    found: Bools = (nodes == ROOT) | (nodes >= 0) & (nodes[:, :, None] == inner).any(axis=2)
    return found


@dataclass(frozen=True)
class AlignmentObjective:
    """total = (1 - weight) * cross-entropy of the gold item + weight * the alignment's loss. Method: aligning the draft."""

    settings: Alignment

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
            case None:
                return _cross_entropy(logits, batch.gold)


def _rows(logits: Tensor, batch: AlignmentBatch, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tree nodes `where` bool [b, m]: draft and target on the children, and which there are; each [n, c]."""
    draft = logits.float()[where].gather(1, batch.token[where])
    return draft, batch.target[where], batch.allowed[where]


def _cross_entropy(logits: Tensor, paths: Paths) -> Tensor:
    return path_cross_entropy(logits.float(), paths.row, paths.token, paths.valid)


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
