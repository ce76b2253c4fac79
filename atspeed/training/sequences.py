"""What a model reads and what it has to predict: token sequences that are exactly the prompts of serving time.

A training sequence is the prompt of a window of history (atspeed.engine.bundle.prompt.PromptTemplate), then the next item's codes.
Every item of the window is predicted too, from what stands before it. Where the template has neither separator nor
suffix, that is itself a prompt of serving time, so one sequence trains as many prompts as it has items.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.files.atomic_write import replace_text
from atspeed.training.data import Histories

IGNORED = -100  # the label of a token that is not predicted; torch's default
SPELLING = "spelling.json"


class Spelling(BaseModel):
    """How a model spells prompts and codes. code_tokens: token id of each code column, level by level, [C]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code_tokens: tuple[NonNegativeInt, ...]
    prompt: PromptTemplate
    pad_token: NonNegativeInt
    vocab_size: PositiveInt

    def item_tokens(self, catalogue: Catalogue) -> Int64:
        """The code tokens of every item of the catalogue, [items, L], by item index."""
        columns = catalogue.codes + catalogue.trie.codebook_offset
        tokens: Int64 = np.asarray(self.code_tokens, dtype=np.int64)[columns]
        return tokens

    def save(self, checkpoint: Path) -> None:
        """Write it beside the model's weights."""
        replace_text(checkpoint / SPELLING, self.model_dump_json() + "\n")

    @classmethod
    def load(cls, checkpoint: Path) -> Spelling:
        """Read what `save` wrote."""
        return cls.model_validate_json((checkpoint / SPELLING).read_bytes())


@dataclass(frozen=True)
class Example:
    """One sequence: tokens int64 [s]; labels int64 [s], the token itself where it is to be predicted, else IGNORED."""

    tokens: Int64
    labels: Int64


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right: tokens and labels, int64 [b, s]. Causal attention never looks at the padding."""

    tokens: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], pad_token: int) -> Batch:
        """Pad and stack."""
        longest = max(len(example.tokens) for example in examples)
        tokens = torch.full((len(examples), longest), pad_token)
        labels = torch.full((len(examples), longest), IGNORED)
        for row, example in enumerate(examples):
            tokens[row, : len(example.tokens)] = torch.from_numpy(example.tokens)
            labels[row, : len(example.labels)] = torch.from_numpy(example.labels)
        return cls(tokens, labels)

    def inputs(self, _dtype: torch.dtype, /) -> dict[str, Any]:
        """Arguments of the model whose logits [b, s, V] the loss takes."""
        return {"input_ids": self.tokens}

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return replace(self, tokens=self.tokens.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Sequencer:
    """Builds examples from histories of item indices.

    item_tokens: int64 [items, L]. predict_first: whether a window's first item is predicted, from an empty history.
    """

    spelling: Spelling
    item_tokens: Int64
    predict_first: bool

    @property
    def window(self) -> int:
        """Items of a full training window: the longest prompt's and the one that comes next."""
        return self.spelling.prompt.max_items + 1

    def prompt(self, history: Int64) -> Int64:
        """The prompt of a whole history [h], as serving builds it: its newest items, in the template. [s]."""
        template = self.spelling.prompt
        return template.tokens(list(self.item_tokens[history[template.window_start(len(history)) :]]))

    def example(self, items: Int64, *, only_last: bool = False) -> Example:
        """The prompt of all but the last of `items` (at most `window` of them), then the last one's codes.

        only_last: predict only the last item, as an evaluation does.
        """
        context, target = items[:-1], self.item_tokens[items[-1]]
        template = self.spelling.prompt
        tokens = np.concatenate([template.tokens(list(self.item_tokens[context])), target])
        labels = np.full(len(tokens), IGNORED)
        if not only_last:
            self._label_context(tokens, labels, len(context))
        labels[-len(target) :] = target
        return Example(tokens, labels)

    def last_of(self, history: Int64, item: int) -> Example:
        """The serving prompt of a whole history [h], then the codes of the item to predict."""
        start = self.spelling.prompt.window_start(len(history))
        return self.example(np.append(history[start:], item), only_last=True)

    def _label_context(self, tokens: Int64, labels: Int64, items: int) -> None:
        """Label the codes of the prompt's items, of the first one only where an empty history is allowed."""
        template, levels = self.spelling.prompt, self.item_tokens.shape[1]
        stride = levels + len(template.separator)
        for index in range(0 if self.predict_first else 1, items):
            start = len(template.prefix) + index * stride
            labels[start : start + levels] = tokens[start : start + levels]


def index_histories(catalogue: Catalogue, histories: Histories) -> list[Int64]:
    """Each user's items as catalogue item indices, in the order of `histories`."""
    return [catalogue.find(items) for items in histories.values()]


@dataclass(frozen=True)
class WindowBatches:
    """The training batches of each epoch, a pure function of (seed, epoch), so a resumed run sees the same ones.

    A history longer than a window is cut into windows at an offset drawn anew each epoch: every item is a target about
    once, after contexts of every length. item_dropout: chance that an item is left out, which keeps small data from
    being learned by heart. Batches hold sequences of like length, in random order; see `batches_of_like_length` for `run`.
    """

    sequencer: Sequencer
    histories: list[Int64]
    batch_size: int
    item_dropout: float
    seed: int
    run: int = 1

    def __call__(self, epoch: int) -> list[Batch]:
        """All batches of an epoch."""
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
    """Spans that tile a history: whole where it fits one window, else windows from a random offset on."""
    if length <= window:
        return [(0, length)]
    offset = int(rng.integers(window))
    return [(max(0, start), min(length, start + window)) for start in range(offset - window, length, window)]


def batches_of_like_length(lengths: Sequence[int], size: int, rng: np.random.Generator, run: int = 1) -> list[Int64]:
    """Indices in batches of `size`: sorted by length within random pools of 16 batches, then shuffled.

    run: batches that stay neighbours. Processes that make a step together wait for the longest of their batches.
    """
    order, pool, every = rng.permutation(len(lengths)), 16 * size, np.asarray(lengths)
    groups: list[Int64] = []
    for start in range(0, len(order), pool):
        alike = order[start : start + pool]
        alike = alike[np.argsort(every[alike], kind="stable")]
        groups += [alike[first : first + size] for first in range(0, len(alike), size)]
    runs = [groups[start : start + run] for start in range(0, len(groups), run)]
    return [group for index in rng.permutation(len(runs)) for group in runs[index]]
