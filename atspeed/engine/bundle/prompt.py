"""The prompt template: from a history to token ids, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator


class TextsEntry(BaseModel):
    """The texts of items in prompts, which are files of the bundle (atspeed.engine.bundle.item_texts)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    catalogue: str
    """The version of the catalogue whose items they are."""
    digest: str
    """The hash of all texts."""
    longest: PositiveInt
    """The most tokens of a text."""
    usual: PositiveInt
    """The median of their tokens."""


class PromptTemplate(BaseModel):
    """The form of a prompt: prefix + item (+ separator + item)* + suffix.

    An item is the tokens of its codes, without its tail, or those of its text. A prompt holds the newest items of a history.
    Beyond `max_items` items the oldest are dropped, `drop_block` at a time. So the beginning of the prompt, and its cached KV,
    stays the same for `drop_block` new items. `drop_block = 1` is the sliding window of the AtSpeed paper. Places, and so the
    numbers of items, count from the oldest item of the window.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: tuple[NonNegativeInt, ...]
    """Tokens before the history; at least a BOS, unless the model has an encoder."""
    separator: tuple[NonNegativeInt, ...] = ()
    """Tokens between two items."""
    suffix: tuple[NonNegativeInt, ...] = ()
    """Tokens after the history."""
    max_items: PositiveInt = 20
    drop_block: PositiveInt = 1
    # The fields below are not written when they have their default: a bundle without them keeps its version.
    separators: tuple[tuple[NonNegativeInt, ...], ...] = Field(default=(), exclude_if=lambda separators: not separators)
    """Tokens before the second item and each later one, where they change with the place, as numbers do."""
    texts: TextsEntry | None = Field(default=None, exclude_if=lambda texts: texts is None)
    """The texts of items, if an item is more than its codes."""

    @model_validator(mode="after")
    def _a_separator_per_place(self) -> PromptTemplate:
        if self.separators and (self.separator or len(self.separators) != self.max_items - 1):
            raise ValueError(f"separators: must be {self.max_items - 1}, one less than max_items, without a separator")
        return self

    @model_validator(mode="after")
    def _block_within_window(self) -> PromptTemplate:
        if self.drop_block > self.max_items:
            raise ValueError(f"drop_block: {self.drop_block} is larger than max_items, {self.max_items}")
        return self

    def window_start(self, items: int) -> int:
        """Return the index of the first item in the prompt, for a history of `items` items."""
        excess = max(0, items - self.max_items)
        return -(-excess // self.drop_block) * self.drop_block

    @property
    def fixed_tokens(self) -> tuple[int, ...]:
        """Return the tokens of every segment, but those of items."""
        return (*self.prefix, *self.separator, *(token for each in self.separators for token in each), *self.suffix)

    def before(self, place: int) -> tuple[int, ...]:
        """Return the tokens between the item at a place, from 1 on, and the item before it."""
        return self.separators[place - 1] if self.separators else self.separator

    def tokens(self, items: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        """Return the prompt of a window of items, int64 [prompt length]. Each item is given as its tokens."""
        parts: list[npt.NDArray[np.int64] | tuple[int, ...]] = [self.prefix]
        for place, item in enumerate(items):
            if place:
                parts.append(self.before(place))
            parts.append(item)
        parts.append(self.suffix)
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])

    def item_stride(self, codes: int) -> int:
        """Return the tokens from the beginning of a usual item to that of the next. codes: those of an item in a prompt."""
        usual = self.texts.usual if self.texts else codes
        return usual + (len(self.before(1)) if self.max_items > 1 else 0)

    def max_tokens(self, codes: int) -> int:
        """Return the most tokens that a prompt may have. codes: those of the longest item."""
        longest = self.texts.longest if self.texts else codes
        between = sum(len(self.before(place)) for place in range(1, self.max_items))
        return len(self.prefix) + len(self.suffix) + self.max_items * longest + between
