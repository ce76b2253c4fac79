"""What the target would recommend, for the draft to learn from: its beams and its log-probabilities along them.

For each training prompt: the target's strict beams of every level, and at every prefix of those beams and of the gold item
the log-probability of every code allowed there. Only allowed codes are kept: on real catalogues a few percent of the
vocabulary, and the losses need no others. Written shard by shard as safetensors; a killed run goes on after the last shard.
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
from atspeed.training.beams import BeamSearch, batches_of_equal_length
from atspeed.training.checkpoints import Checkpoints
from atspeed.training.errors import DataError, Paused
from atspeed.training.processes import processes, wait_for_all
from atspeed.training.sequences import Sequencer

SHARD = 2048  # prompts
_BATCH = 64


@dataclass(frozen=True)
class TrainingPrompts:
    """The first `cut` items of a history are the prompt's, the item after them is the gold item.

    histories: int64 [h] each, item indices. chosen: int64 [n, 2]: index of the history, cut; in random order.
    """

    histories: Sequence[Int64]
    chosen: Int64

    @classmethod
    def draw(cls, histories: Sequence[Int64], *, allow_empty: bool, limit: int, seed: int) -> Self:
        """Every place of every history, or `limit` of them drawn by the seed; before the first item only if `allow_empty`."""
        first = 0 if allow_empty else 1
        every = [(index, cut) for index, history in enumerate(histories) for cut in range(first, len(history))]
        order = np.random.default_rng(seed).permutation(len(every))[:limit]
        return cls(histories, np.asarray(every, dtype=np.int64).reshape(-1, 2)[order])

    def __len__(self) -> int:
        return len(self.chosen)

    def history(self, prompt: int) -> Int64:
        """All items before the gold one, oldest first."""
        index, cut = self.chosen[prompt]
        before: Int64 = self.histories[index][:cut]
        return before

    def gold(self, prompt: int) -> int:
        """The item that came next, as an item index."""
        index, cut = self.chosen[prompt]
        return int(self.histories[index][cut])


@dataclass(frozen=True)
class TeacherShard:
    """What the target says on n consecutive training prompts.

    beams: int32 [n, L, K], trie nodes of each level, best first, -1 where there are fewer.
    gold: int32 [n], the gold item's leaf. logp: float16, nats, over the whole vocabulary, of the children of `tree_nodes`, in
    order, prompt after prompt; those of prompt i are logp[start[i] : start[i + 1]]. start: int64 [n + 1].
    """

    beams: Int32
    gold: Int32
    logp: npt.NDArray[np.float16]
    start: Int64

    def __len__(self) -> int:
        return len(self.gold)

    def save(self, path: Path) -> None:
        """Write it in one step, so that a kill never leaves half a shard."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({field.name: getattr(self, field.name) for field in fields(self)}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        return cls(**load_file(path))


def tree_nodes(trie: Trie, beams: npt.NDArray[np.integer], gold: npt.NDArray[np.integer]) -> Int64:
    """The prefixes of beams [b, L, K] and gold leaves [b], root included: ascending, then -1; [b, m]."""
    every = np.concatenate([ancestors(trie, gold), beams[:, :-1].reshape(len(beams), -1)], axis=1)
    distinct = [np.unique(row[row >= 0]) for row in every]
    nodes = np.full((len(beams), max(map(len, distinct))), -1, dtype=np.int64)
    for row, found in enumerate(distinct):
        nodes[row, : len(found)] = found
    return nodes


def ancestors(trie: Trie, leaves: npt.NDArray[np.integer]) -> Int64:
    """The prefixes of leaves [b], from the root down to the parent: [b, L]."""
    above = [leaves.astype(np.int64)]
    for _ in range(trie.levels):
        above.append(trie.parent[above[-1]].astype(np.int64))
    return np.stack(above[:0:-1], axis=1)


@dataclass(frozen=True)
class Teacher:
    """The target with what it takes to ask it. beams: K."""

    model: PreTrainedModel
    sequencer: Sequencer
    catalogue: Catalogue
    rule: ScoringRule
    beams: int

    def shard(self, prompts: TrainingPrompts, first: int, count: int) -> TeacherShard:
        """Its beams and log-probabilities on `count` prompts from `first` on."""
        asked = range(first, first + count)
        tokens = [self.sequencer.prompt(prompts.history(index)) for index in asked]
        gold = self.catalogue.leaf_of(np.array([prompts.gold(index) for index in asked]))
        beams = np.full((count, self.catalogue.trie.levels, self.beams), -1, dtype=np.int32)
        logp: dict[int, npt.NDArray[np.float16]] = {}
        search = BeamSearch(self.model, self.sequencer.spelling, self.catalogue.trie, self.rule, self.beams)
        for group in batches_of_equal_length(tokens, _BATCH):
            found, said = self._ask(search, np.stack([tokens[index] for index in group]), gold[group])
            beams[group, :, : found.shape[2]] = found
            logp |= zip(group, said, strict=True)
        ordered = [logp[index] for index in range(count)]
        start = np.concatenate([[0], np.cumsum([len(part) for part in ordered])]).astype(np.int64)
        return TeacherShard(beams, gold.astype(np.int32), np.concatenate(ordered), start)

    def _ask(self, search: BeamSearch, prompts: Int64, gold: Int64) -> tuple[Int32, list[npt.NDArray[np.float16]]]:
        """Of prompts of one length: the beams [b, L, K], and of each prompt what `TeacherShard.logp` holds."""
        trie = self.catalogue.trie
        levels = list(search.levels(prompts, along=ancestors(trie, gold)[:, 1:]))
        beams = np.full((len(prompts), trie.levels, self.beams), -1, dtype=np.int32)
        for level, step in enumerate(levels):
            beams[:, level, : step.node.shape[1]] = step.node.cpu().numpy()
        said: list[list[npt.NDArray[np.float16]]] = [[] for _ in prompts]
        for step in levels:
            prefix, logp = step.prefix.cpu().numpy(), step.logp.to(torch.float16).cpu().numpy()
            # Ascending, so equal ones, the gold path on a beam, are neighbours.
            kept = (prefix >= 0) & np.diff(prefix, axis=1, prepend=-1).astype(bool)
            row, place = np.nonzero(kept)
            which, child = trie.children_of(prefix[row, place])
            values = logp[row[which], place[which], trie.code[child]]
            ends = np.cumsum(np.bincount(row[which], minlength=len(prompts)))[:-1]
            for part, found in zip(said, np.split(values, ends), strict=True):
                part.append(found)
        return beams, [np.concatenate(parts) for parts in said]


def write_teacher_data(
    teacher: Teacher,
    prompts: TrainingPrompts,
    folder: Path,
    *,
    shard: int = SHARD,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Write every shard that is not there yet; a shard is named after its first prompt. Raises Paused between shards.

    Several processes take turns, each with a model on its own device.
    """
    firsts, us = range(0, len(prompts), shard), processes()
    mine = firsts[us.process_index :: us.num_processes]
    for first in track(mine, description="teacher data", transient=True, disable=not us.is_main_process):
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
    """Raise DataError unless the shards of a folder can be read and hold so many prompts together."""
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
    """The shards of a folder by their first prompt, ascending."""
    return {int(path.stem): path for path in sorted(folder.glob("*.safetensors"))}
