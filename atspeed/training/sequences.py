"""Builds training sequences, whose prompts are exactly those of serving.

A training sequence is the prompt of a window of history (atspeed.engine.bundle.prompt.PromptTemplate), then the next item's
codes. Every item of the window is also predicted from the tokens before it. If the template has neither separator nor
suffix, these tokens are a prompt of serving themselves, so one sequence trains as many prompts as it has items.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from zlib import crc32

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.item_texts import ItemTexts
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.files.atomic_write import replace_text
from atspeed.engine.search.trie import ENDED
from atspeed.training.data import Histories

IGNORED = -100  # the label of a token that is not predicted; torch's default
_POOL_BATCHES = 16  # batches whose sequences are sorted by length together: little padding, still a random mix
SPELLING = "spelling.json"


class Spelling(BaseModel):
    """The tokens of a model's prompts and codes.

    Attributes:
        code_tokens: the token id of each code column, level by level, [C].
        prompt: the template of prompts.
        pad_token: the token id of padding.
        vocab_size: the size of the vocabulary.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    code_tokens: tuple[NonNegativeInt, ...]
    prompt: PromptTemplate
    pad_token: NonNegativeInt
    vocab_size: PositiveInt

    def save(self, checkpoint: Path) -> None:
        """Write the spelling beside the model's weights."""
        replace_text(checkpoint / SPELLING, self.model_dump_json() + "\n")

    @classmethod
    def load(cls, checkpoint: Path) -> Spelling:
        """Read a spelling that `save` wrote."""
        return cls.model_validate_json((checkpoint / SPELLING).read_bytes())


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Attributes:
        tokens: int64 [s].
        labels: int64 [s]. The token itself if it is predicted, else IGNORED.
    """

    tokens: Int64
    labels: Int64


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right. Causal attention never sees the padding.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s].
    """

    tokens: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], pad_token: int) -> Batch:
        """Pad and stack examples."""
        longest = max(len(example.tokens) for example in examples)
        tokens = torch.full((len(examples), longest), pad_token)
        labels = torch.full((len(examples), longest), IGNORED)
        for row, example in enumerate(examples):
            tokens[row, : len(example.tokens)] = torch.from_numpy(example.tokens)
            labels[row, : len(example.labels)] = torch.from_numpy(example.labels)
        return cls(tokens, labels)

    def inputs(self, _dtype: torch.dtype, /) -> dict[str, Any]:
        """Return the arguments of the model; its logits are [b, s, V]."""
        return {"input_ids": self.tokens}

    def to(self, device: torch.device) -> Self:
        """Move the batch to a device."""
        return replace(self, tokens=self.tokens.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Sequencer:
    """Builds prompts and training examples from histories of item indices.

    Attributes:
        spelling: the tokens of prompts and codes.
        item_tokens: int64 [items, L]. The tokens of every item's path, its tail included; -1 after the end of a path.
        spelled: int64 [items]. The tokens of each item in a prompt: those before its tail.
        predict_first: whether a window's first item is predicted, from an empty history.
        texts: the texts of the items in prompts, if the template has any. Only their codes are predicted.
    """

    spelling: Spelling
    item_tokens: Int64
    spelled: Int64
    predict_first: bool
    texts: ItemTexts | None = None

    @classmethod
    def of(cls, spelling: Spelling, catalogue: Catalogue, predict_first: bool, texts: ItemTexts | None = None) -> Self:
        """Return the sequencer of a catalogue's items."""
        columns = catalogue.codes + catalogue.trie.codebook_offset
        tokens = np.asarray(spelling.code_tokens, dtype=np.int64)[columns]
        spelled = catalogue.spelled_lengths(np.arange(catalogue.items))
        return cls(spelling, np.where(catalogue.codes == ENDED, -1, tokens), spelled, predict_first, texts)

    @property
    def window(self) -> int:
        """Items of a full training window: those of the longest prompt and the next one."""
        return self.spelling.prompt.max_items + 1

    def prompt(self, history: Int64) -> Int64:
        """Build the prompt [s] of a whole history [h] as serving does: its newest items, in the template.

        Histories name no fields of users. If prompts hold some, each history gets values that depend on its items only.
        """
        template = self.spelling.prompt
        return self._prompt(history[template.window_start(len(history)) :])

    def example(self, items: Int64, *, only_last: bool = False) -> Example:
        """Build an example: the prompt of all but the last of `items` (at most `window` of them), then the last one's codes.

        only_last: predict only the last item, as an evaluation does.
        """
        context, target = items[:-1], self.item_tokens[items[-1]]
        target = target[target >= 0]
        tokens = np.concatenate([self._prompt(context), target])
        labels = np.full(len(tokens), IGNORED)
        if not only_last:
            self._label_context(tokens, labels, context)
        labels[-len(target) :] = target
        return Example(tokens, labels)

    def last_of(self, history: Int64, item: int) -> Example:
        """Build the serving prompt of a whole history [h], then the codes of the item to predict."""
        start = self.spelling.prompt.window_start(len(history))
        return self.example(np.append(history[start:], item), only_last=True)

    def _prompt(self, window: Int64) -> Int64:
        template = self.spelling.prompt
        return template.tokens(self._spelled_tokens(window), template.mixed(crc32(window.astype(np.int64).tobytes())))

    def _spelled_tokens(self, items: Int64) -> list[Int64]:
        if self.texts is not None:
            return self.texts.of(items)
        return [self.item_tokens[item, : self.spelled[item]] for item in items]

    def _label_context(self, tokens: Int64, labels: Int64, items: Int64) -> None:
        """Label the codes of the prompt's items; the first one only if an empty history is allowed.

        The codes inside of texts, and those beside fields of users, are not labelled.
        """
        template = self.spelling.prompt
        if self.texts is not None or template.user_fields:
            return
        start = len(template.prefix)
        for index, codes in enumerate(self.spelled[items].tolist()):
            if index or self.predict_first:
                labels[start : start + codes] = tokens[start : start + codes]
            start += codes + (len(template.before(index + 1)) if index + 1 < len(items) else 0)


def index_histories(catalogue: Catalogue, histories: Histories) -> list[Int64]:
    """Return each user's items as catalogue item indices, in the order of `histories`."""
    return [catalogue.find(items) for items in histories.values()]


@dataclass(frozen=True)
class WindowBatches:
    """The training batches of each epoch, a pure function of (seed, epoch), so a resumed run uses the same ones.

    A history longer than a window is cut into windows at a random offset per epoch: every item is a target about once, after
    contexts of every length. Batches hold sequences of similar length, in random order.

    Attributes:
        sequencer: builds the examples.
        histories: the users' histories as item indices.
        batch_size: sequences per batch.
        item_dropout: the chance that an item is left out, against overfitting on small data.
        seed: the seed of windows and order.
        run: batches that stay neighbours; see `batches_of_like_length`.
    """

    sequencer: Sequencer
    histories: list[Int64]
    batch_size: int
    item_dropout: float
    seed: int
    run: int = 1

    def __call__(self, epoch: int) -> list[Batch]:
        """Return all batches of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        examples = [self.sequencer.example(window) for window in self._windows(rng)]
        pad = self.sequencer.spelling.pad_token
        groups = batches_of_like_length([len(example.tokens) for example in examples], self.batch_size, rng, self.run)
        return [Batch.of([examples[index] for index in group], pad) for group in groups]

    def _windows(self, rng: np.random.Generator) -> Iterator[Int64]:
        shortest = 1 if self.sequencer.predict_first else 2
        for history in self.histories:
            kept = history[rng.random(len(history)) >= self.item_dropout] if self.item_dropout else history
            for start, stop in _cuts(len(kept), self.sequencer.window, rng):
                if stop - start >= shortest:
                    yield kept[start:stop]


def _cuts(length: int, window: int, rng: np.random.Generator) -> Iterable[tuple[int, int]]:
    """Return spans that tile a history: one if it fits one window, else windows from a random offset on."""
    if length <= window:
        return [(0, length)]
    offset = int(rng.integers(window))
    return [(max(0, start), min(length, start + window)) for start in range(offset - window, length, window)]


def batches_of_like_length(lengths: Sequence[int], size: int, rng: np.random.Generator, run: int = 1) -> list[Int64]:
    """Return indices in batches of `size`, sorted by length within random pools of 16 batches, then shuffled.

    run: batches that stay neighbours. Processes that make a step together wait for the longest of their batches.
    """
    order, pool, every = rng.permutation(len(lengths)), _POOL_BATCHES * size, np.asarray(lengths)
    groups: list[Int64] = []
    for start in range(0, len(order), pool):
        alike = order[start : start + pool]
        alike = alike[np.argsort(every[alike], kind="stable")]
        groups += [alike[first : first + size] for first in range(0, len(alike), size)]
    # Shuffle groups of `run` neighbouring batches.
    runs = [groups[start : start + run] for start in range(0, len(groups), run)]
    return [group for index in rng.permutation(len(runs)) for group in runs[index]]
