"""The target's answers that a draft learns from: its beams and log-probabilities.

For each training prompt: the target's beams of every level, and at every prefix of those beams and of the gold item the
log-probability of every code allowed there. Only allowed codes are kept: on real catalogues a few percent of the vocabulary,
and the losses need no others. The data is written in shards as safetensors; a killed run continues after the last shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel

from atspeed.engine.arrays import Int32, Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import Trie
from atspeed.training.beams import BeamSearch, batches_of_equal_length, prompts_at_once
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.errors import DataError, Paused
from atspeed.training.evaluate import EvalExample, ModelRecommender
from atspeed.training.processes import processes, wait_for_all
from atspeed.training.sequences import Sequencer

SHARD = 2048  # prompts per file; a killed run loses at most the work on one


@dataclass(frozen=True)
class TrainingPrompts:
    """Training prompts. The first `cut` items of a history are the prompt's; the next item is the gold item.

    Attributes:
        histories: int64 [h] each, item indices.
        chosen: int64 [n, 2]. Index of the history and cut, in random order.
    """

    histories: Sequence[Int64]
    chosen: Int64

    @classmethod
    def draw(cls, histories: Sequence[Int64], *, allow_empty: bool, limit: int, seed: int) -> Self:
        """Take every place of every history, or `limit` drawn by the seed; the first place only if `allow_empty`."""
        first = 0 if allow_empty else 1
        count = np.maximum(np.array([len(history) for history in histories], dtype=np.int64) - first, 0)
        ends = np.cumsum(count)
        order = np.random.default_rng(seed).permutation(int(count.sum()))[:limit]
        # A place's history is the first whose places end after it.
        index = np.searchsorted(ends, order, side="right")
        return cls(histories, np.stack([index, order - (ends - count)[index] + first], axis=1))

    def __len__(self) -> int:
        return len(self.chosen)

    def history(self, prompt: int) -> Int64:
        """Return all items before the gold one, oldest first."""
        index, cut = self.chosen[prompt]
        before: Int64 = self.histories[index][:cut]
        return before

    def gold(self, prompt: int) -> int:
        """Return the item index of the gold item."""
        index, cut = self.chosen[prompt]
        return int(self.histories[index][cut])


@dataclass(frozen=True)
class TeacherShard:
    """The target's answers to n consecutive training prompts.

    Attributes:
        beams: int32 [n, L, K]. Trie nodes of each level, best first, -1 where there are fewer. The target's, or a draft's.
        gold: int32 [n]. The gold items' leaves.
        logp: float16, nats, under the scoring rule: the children of `tree_nodes`, in order, prompt after prompt.
        start: int64 [n + 1]. Prompt i has logp[start[i] : start[i + 1]].
    """

    beams: Int32
    gold: Int32
    logp: npt.NDArray[np.float16]
    start: Int64

    def __len__(self) -> int:
        return len(self.gold)

    def save(self, path: Path) -> None:
        """Write the shard in one step, so that a kill never leaves half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({field.name: getattr(self, field.name) for field in fields(self)}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a shard that `save` wrote."""
        return cls(**load_file(path))


def tree_nodes(trie: Trie, beams: npt.NDArray[np.integer], gold: npt.NDArray[np.integer]) -> Int64:
    """Return the prefixes of beams [b, L, K] and gold leaves [b] with the root, [b, m]: ascending, then -1."""
    every = np.concatenate([ancestors(trie, gold), beams[:, :-1].reshape(len(beams), -1)], axis=1)
    distinct = [np.unique(row[row >= 0]) for row in every]
    nodes = np.full((len(beams), max(map(len, distinct))), -1, dtype=np.int64)
    for row, found in enumerate(distinct):
        nodes[row, : len(found)] = found
    return nodes


def ancestors(trie: Trie, leaves: npt.NDArray[np.integer]) -> Int64:
    """Return the prefixes of leaves [b], from the root down to the parent: [b, L]."""
    above = [leaves.astype(np.int64)]
    for _ in range(trie.levels):
        above.append(trie.parent[above[-1]].astype(np.int64))
    return np.stack(above[:0:-1], axis=1)


@dataclass(frozen=True)
class Teacher:
    """The target as the source of training data.

    Attributes:
        model: the target.
        sequencer: builds its prompts.
        catalogue: the catalogue.
        rule: the scoring rule.
        beams: K.
        draft: a draft whose beams are answered instead of the target's own.
    """

    model: PreTrainedModel
    sequencer: Sequencer
    catalogue: Catalogue
    rule: ScoringRule
    beams: int
    draft: ModelRecommender | None = None

    def shard(self, prompts: TrainingPrompts, first: int, count: int) -> TeacherShard:
        """Compute beams and log-probabilities of `count` prompts from `first` on."""
        indices = range(first, first + count)
        tokens = [self.sequencer.prompt(prompts.history(index)) for index in indices]
        gold = self.catalogue.leaf_of(np.array([prompts.gold(index) for index in indices]))
        beams = np.full((count, self.catalogue.trie.levels, self.beams), -1, dtype=np.int32)
        logp: dict[int, npt.NDArray[np.float16]] = {}
        given = self._given([prompts.history(index) for index in indices])
        search = BeamSearch(self.model, self.sequencer.spelling, self.catalogue.trie, self.rule, self.beams)
        for group in batches_of_equal_length(
            tokens, prompts_at_once(self.sequencer.spelling.vocab_size, self.beams + 1)
        ):
            found, values = self._search(
                search,
                np.stack([tokens[index] for index in group]),
                gold[group],
                None if given is None else given[group],
            )
            beams[group, :, : found.shape[2]] = found
            logp |= zip(group, values, strict=True)
        ordered = [logp[index] for index in range(count)]
        start = np.concatenate([[0], np.cumsum([len(part) for part in ordered])]).astype(np.int64)
        return TeacherShard(beams, gold.astype(np.int32), np.concatenate(ordered), start)

    def _given(self, histories: Sequence[Int64]) -> Int64 | None:
        """Return the draft's beams, [n, L, K]; None for the target's."""
        if self.draft is None:
            return None
        levels = self.draft.beams([EvalExample(history, ()) for history in histories], beams=self.beams)
        return np.stack(levels, axis=1)

    def _search(
        self, search: BeamSearch, prompts: Int64, gold: Int64, given: Int64 | None
    ) -> tuple[Int32, list[npt.NDArray[np.float16]]]:
        """Search for prompts of one length. Returns beams [b, L, K] and each prompt's part of `TeacherShard.logp`."""
        trie = self.catalogue.trie
        levels = list(search.levels(prompts, along=ancestors(trie, gold)[:, 1:], following=given))
        beams = np.full((len(prompts), trie.levels, self.beams), -1, dtype=np.int32)
        for level, step in enumerate(levels):
            beams[:, level, : step.node.shape[1]] = step.node.cpu().numpy()
        # For each prompt and level, the log-probabilities of the children of its distinct prefixes.
        parts: list[list[npt.NDArray[np.float16]]] = [[] for _ in prompts]
        for step in levels:
            prefix, logp = step.prefix.cpu().numpy(), step.logp.to(torch.float16).cpu().numpy()
            # Prefixes are ascending, so duplicates (the gold path on a beam) are neighbours and are dropped.
            kept = (prefix >= 0) & np.diff(prefix, axis=1, prepend=-1).astype(bool)
            row, place = np.nonzero(kept)
            # All children of the kept prefixes, and their values. Rows are ascending, so they split by prompt.
            which, child = trie.children_of(prefix[row, place])
            above = prefix[row, place][which]
            values = logp[row[which], place[which], child - trie.child_start[above]]
            ends = np.cumsum(np.bincount(row[which], minlength=len(prompts)))[:-1]
            for part, found in zip(parts, np.split(values, ends), strict=True):
                part.append(found)
        return beams, [np.concatenate(part) for part in parts]


def write_teacher_data(
    teacher: Teacher,
    prompts: TrainingPrompts,
    folder: Path,
    *,
    shard: int = SHARD,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Write every shard that is missing; a shard is named after its first prompt. Raises Paused between shards.

    Several processes take turns, each with a model on its own device.
    """
    firsts, state = range(0, len(prompts), shard), processes()
    mine = firsts[state.process_index :: state.num_processes]
    for first in track(mine, description="teacher data", transient=True, disable=not state.is_main_process):
        path = _shard_path(folder, first)
        if not path.exists():
            teacher.shard(prompts, first, min(shard, len(prompts) - first)).save(path)
            if checkpoints is not None and checkpoints.stopping:
                break
    wait_for_all()
    done = sum(_shard_path(folder, first).exists() for first in firsts)
    if done < len(firsts):
        raise Paused(f"teacher data: {done} of {len(firsts)} shards")


def check_teacher_data(folder: Path, prompts: int) -> None:
    """Raise DataError unless the folder's shards can be read and hold `prompts` prompts together."""
    first = 0
    for number, path in shards(folder).items():
        try:
            with safe_open(path, framework="np") as shard:
                held = {field.name: shard.get_slice(field.name).get_shape() for field in fields(TeacherShard)}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: {error}") from error
        if number != first:
            raise DataError(f"{path}: the shard before it ends at prompt {first}")
        first += held["gold"][0]
    if first != prompts:
        raise DataError(f"{folder}: holds {first} of {prompts} prompts")


def _shard_path(folder: Path, first: int) -> Path:
    return folder / f"{first:09d}.safetensors"


def shards(folder: Path) -> dict[int, Path]:
    """Return the shards of a folder by their first prompt, ascending."""
    return {int(path.stem): path for path in sorted(folder.glob("*.safetensors"))}
