"""Builds the batches of a draft's alignment: prompts with their trees of prefixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atspeed.engine.arrays import Bools, Int64
from atspeed.engine.search.trie import ENDED, ROOT, Trie
from atspeed.training.prompt_trees import PromptTrees, row_of
from atspeed.training.sequences import Sequencer, batches_of_like_length
from atspeed.training.teacher import TeacherShard, TrainingPrompts, ancestors, shards, tree_nodes


@dataclass(frozen=True)
class Paths:
    """Code paths in a tree.

    Attributes:
        row: int64 [b, P, L]. The prefix before each code, as an index among the nodes of its tree.
        token: int64 [b, P, L]. The token of each code.
        scored: bool [b, P, L]. True where there is a path that has not ended before.
    """

    row: Tensor
    token: Tensor
    scored: Tensor

    @classmethod
    def of(cls, leaves: Int64, nodes: Int64, trie: Trie, code_tokens: Int64) -> Self:
        """Build the paths from their leaves.

        Args:
            leaves: int64 [b, P], -1 where there is none.
            nodes: int64 [b, m], the nodes of the trees.
            trie: the catalogue's trie.
            code_tokens: int64 [C], the token of each code column.
        """
        # Walk from the leaves up to the root; the levels are collected in reverse.
        node = np.where(leaves < 0, ROOT, leaves)
        rows, tokens, scored = [], [], []
        for _ in range(trie.levels):
            parent = np.maximum(trie.parent[node], ROOT).astype(np.int64)
            rows.append(row_of(nodes, parent))
            tokens.append(_tokens(trie, node, code_tokens))
            scored.append((leaves >= 0) & (trie.code[node] != ENDED))
            node = parent
        return cls(*(torch.from_numpy(np.stack(parts[::-1], axis=2)) for parts in (rows, tokens, scored)))

    def to(self, device: torch.device) -> Self:
        """Move the paths to a device."""
        return type(self)(self.row.to(device), self.token.to(device), self.scored.to(device))


@dataclass(frozen=True)
class TreeLevel:
    """The nodes of one depth in b trees: f at most per tree, with c children at most per node.

    There is one part per depth, because a trie is wide at its first levels and narrow below them. One table for all depths
    would hold ten times as many entries.

    Attributes:
        row: int64 [b, f]. Each node's index among the m nodes of its tree; 0 where there is none.
        place: int64 [b, f]. Its index among the f * c children of the depth above; 0 at the root.
        token: int64 [b, f, c]. The token of each child.
        allowed: bool [b, f, c]. True where there is a child.
        ended: bool [b, f]. True for the nodes whose path has ended: their one child scores 0 and is not predicted.
        target: float32 [b, f, c]. The target's log-probability of each child; 0 where there is none.
        on_beam: bool [b, f]. True for the prefixes of the target's beams.
        on_gold: bool [b, f]. True for the prefixes of the gold item.
        wanted: bool [b, f, c]. True for the children that are beams themselves.
    """

    row: Tensor
    place: Tensor
    token: Tensor
    allowed: Tensor
    ended: Tensor
    target: Tensor
    on_beam: Tensor
    on_gold: Tensor
    wanted: Tensor

    def of_children(self, logits: Tensor) -> Tensor:
        """Select the children's logits [b, f, c] from [b, m, V]; any number where there is no child."""
        index = (self.row * logits.shape[2]).unsqueeze(2) + self.token
        return logits.flatten(1).gather(1, index.flatten(1)).view_as(index)

    def of_nodes(self, values: Tensor) -> Tensor:
        """Select the nodes' values [b, f] from [b, m]."""
        return values.gather(1, self.row)

    def to(self, device: torch.device) -> Self:
        """Move the level to a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class AlignmentBatch:
    """Prompts with their trees of m nodes, depth by depth.

    Attributes:
        trees: the token trees of the prompts.
        levels: the nodes of each depth.
        beams: the target's K complete beams.
        gold: the path of the gold item.
        code_token: int64 [c]. The draft's distinct code tokens, ascending.
    """

    trees: PromptTrees
    levels: tuple[TreeLevel, ...]
    beams: Paths
    gold: Paths
    code_token: Tensor

    def inputs(self, dtype: torch.dtype, /) -> dict[str, Any]:
        """Return the arguments of the draft; its logits are [b, m, V], one row per node."""
        return self.trees.inputs(dtype)

    def to(self, device: torch.device) -> Self:
        """Move the batch to a device."""
        return type(self)(
            self.trees.to(device),
            tuple(level.to(device) for level in self.levels),
            self.beams.to(device),
            self.gold.to(device),
            self.code_token.to(device),
        )


@dataclass(frozen=True)
class _Group:
    """The prompts of one future batch.

    Attributes:
        shard: the number of the shard that holds them.
        places: int64 [b]. Their places in the shard.
    """

    shard: int
    places: Int64


@dataclass(frozen=True)
class AlignmentBatches:
    """The batches of each epoch, a pure function of (seed, epoch). Only one shard is in memory at a time.

    Shards hold prompts in random order. Each epoch takes the shards in another order. Within a shard, batches hold prompts of
    similar length; see `batches_of_like_length` for `run`.

    Attributes:
        folder: the folder of the teacher's shards.
        prompts: the prompts that the shards answer.
        sequencer: builds the prompts' tokens.
        trie: the catalogue's trie.
        batch_size: prompts per batch.
        seed: the seed of the order.
        run: batches that stay neighbours.
    """

    folder: Path
    prompts: TrainingPrompts
    sequencer: Sequencer
    trie: Trie
    batch_size: int
    seed: int
    run: int = 1

    def __call__(self, epoch: int) -> Sequence[AlignmentBatch]:
        """Return all batches of an epoch. Each is built on access."""
        rng = np.random.default_rng([self.seed, epoch])
        groups = [group for shard in rng.permutation(len(self._shards)) for group in self._groups(int(shard), rng)]
        return _Lazy(groups, self._batch)

    @cached_property
    def _shards(self) -> list[tuple[range, Path]]:
        """Return the prompts of each shard and its file."""
        paths = shards(self.folder)
        ends = [*list(paths)[1:], len(self.prompts)]
        return [(range(first, end), path) for (first, path), end in zip(paths.items(), ends, strict=True)]

    @cached_property
    def _load(self) -> Callable[[int], TeacherShard]:
        return lru_cache(maxsize=1)(lambda shard: TeacherShard.load(self._shards[shard][1]))

    def _groups(self, shard: int, rng: np.random.Generator) -> list[_Group]:
        """Group the prompts of a shard into batches of similar length, in random order."""
        held = self._shards[shard][0]
        lengths = [len(self.sequencer.prompt(self.prompts.history(prompt))) for prompt in held]
        return [_Group(shard, group) for group in batches_of_like_length(lengths, self.batch_size, rng, self.run)]

    def _batch(self, group: _Group) -> AlignmentBatch:
        shard, held = self._load(group.shard), self._shards[group.shard][0]
        prompts = [self.sequencer.prompt(self.prompts.history(held[place])) for place in group.places]
        beams, gold = (part[group.places].astype(np.int64) for part in (shard.beams, shard.gold))
        nodes = tree_nodes(self.trie, beams, gold)
        logp = np.concatenate([shard.logp[shard.start[place] : shard.start[place + 1]] for place in group.places])
        return AlignmentBatch(
            trees=PromptTrees.of(prompts, nodes, self.trie, self.sequencer.spelling),
            levels=tuple(self._levels(nodes, beams, gold, logp)),
            beams=Paths.of(beams[:, -1], nodes, self.trie, self._code_tokens),
            gold=Paths.of(gold[:, None], nodes, self.trie, self._code_tokens),
            code_token=torch.from_numpy(np.unique(self._code_tokens)),
        )

    def _levels(self, nodes: Int64, beams: Int64, gold: Int64, logp: npt.NDArray[np.float16]) -> Iterator[TreeLevel]:
        """Yield the nodes of each depth.

        Args:
            nodes: int64 [b, m], the trees.
            beams: int64 [b, L, K], the target's beams.
            gold: int64 [b], the gold items' leaves.
            logp: float16, the log-probabilities of all children of `nodes`, in order, prompt after prompt.
        """
        trie = self.trie
        # Each node's depth and number of children, [b, m]; -1 and 0 where there is no node.
        depth = np.where(nodes < 0, -1, trie.depth(nodes))
        count = np.where(nodes < 0, 0, trie.child_count[nodes]).astype(np.int64)
        # The place in `logp` of each node's first child: an exclusive running sum over all prompts.
        first_logp = (np.cumsum(count) - count.ravel()).reshape(count.shape)
        golden = ancestors(trie, gold)
        # The nodes one depth up, and the largest number of children of any of them.
        above, widest = nodes[:, :1], 0
        for level in range(trie.levels):
            # The nodes of this depth, left-aligned [b, f], and their numbers of children.
            row, found = _ragged(depth == level)
            node = np.where(found, np.take_along_axis(nodes, row, 1), ROOT)
            children = np.where(found, np.take_along_axis(count, row, 1), 0)
            # Their children [b, f, c]: consecutive nodes, since the trie is stored in breadth-first order.
            within = np.arange(children.max())
            allowed = within < children[..., None]
            child = np.where(allowed, trie.child_start[node][..., None] + within, ROOT)
            # The target's log-probabilities, in the order in which the shard holds them.
            target = np.zeros(allowed.shape, dtype=np.float32)
            target[allowed] = logp[(np.take_along_axis(first_logp, row, 1)[..., None] + within)[allowed]]
            # Each node's place among the children of the depth above: parent's row, then offset below the parent.
            if level:
                parent = np.where(found, trie.parent[node], above[:, :1])
                place = np.where(found, row_of(above, parent) * widest + node - trie.child_start[parent], 0)
            else:
                place = np.zeros_like(row)
            yield TreeLevel(
                row=torch.from_numpy(row),
                place=torch.from_numpy(place),
                token=torch.from_numpy(_tokens(trie, child, self._code_tokens)),
                allowed=torch.from_numpy(allowed),
                ended=torch.from_numpy(found & (trie.code[trie.child_start[node]] == ENDED)),
                target=torch.from_numpy(target),
                on_beam=torch.from_numpy(found & ((node == ROOT) | _among(beams, node, trie))),
                on_gold=torch.from_numpy(found & (node == golden[:, level, None])),
                wanted=torch.from_numpy(_among(beams, np.where(allowed, child, -1), trie)),
            )
            above, widest = np.where(found, node, -1), len(within)

    @cached_property
    def _code_tokens(self) -> Int64:
        return np.asarray(self.sequencer.spelling.code_tokens, dtype=np.int64)


def _tokens(trie: Trie, nodes: Int64, code_tokens: Int64) -> Int64:
    """Return the token of each node's own code; any token for the root and for a path that has ended."""
    tokens: Int64 = code_tokens[np.where(trie.code[nodes] == ENDED, 0, trie.column(nodes))]
    return tokens


def _ragged(where: Bools) -> tuple[Int64, Bools]:
    """Return the columns set in each row of `where` [b, m], left-aligned [b, f], and a mask of the real entries [b, f]."""
    count = where.sum(axis=1)
    # A stable sort puts the columns that are set first and keeps their order.
    order: Int64 = np.argsort(~where, axis=1, kind="stable")[:, : int(count.max())]
    real: Bools = np.arange(order.shape[1]) < count[:, None]
    return np.where(real, order, 0), real


def _among(beams: Int64, nodes: Int64, trie: Trie) -> Bools:
    """Mark the nodes [b, ...] that are beams [b, L, K] of their prompt; False for the root and for -1."""
    # Numbers of (prompt, node) pairs, so that one search serves all prompts.
    first = np.arange(len(beams)) * trie.nodes
    known = (beams + first[:, None, None])[beams >= 0]
    found: Bools = np.isin(nodes + first.reshape(-1, *[1] * (nodes.ndim - 1)), known) & (nodes >= 0)
    return found


@dataclass(frozen=True)
class _Lazy(Sequence[AlignmentBatch]):
    """A sequence of batches that builds each one on access.

    Attributes:
        groups: the prompts of each batch.
        batch: builds a batch.
    """

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
